"""Data-parallel evaluation: the processes that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Processes:
    """The processes that share an evaluation; one by default.

    Attributes:
        rank: this one, from 0.
        count: all.
        group: torch's group of them; None for one.
        device: what accelerate gives this process; None for one.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    device: torch.device | None = None

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank.

        Raises:
            RuntimeError: if a process is gone.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"another of the {self.count} processes has stopped, so this one (rank {self.rank}) stops too; "
                "answers given so far are kept: the same command goes on"
            ) from error
        return values


def join_processes(device: str = "auto") -> Processes:
    """Joins the processes of `accelerate launch`, `torchrun` or `mpirun`, if there are several.

    Args:
        device: as for `load_model`; on CPUs the processes talk through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", os.environ.get("PMI_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))) < 2:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=device.startswith("cpu") or not torch.cuda.is_available())
    # Answers are small Python objects: they need no GPU, whatever the backend of the others is.
    group = torch.distributed.new_group(backend="gloo")
    return Processes(state.process_index, state.num_processes, group, state.device)
