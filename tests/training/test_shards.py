"""Models shared out among processes: by heads (tensor parallelism) and by layer (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.slow
NAMES = [case.name for case in tiny.CASES]


def found(kind: str, folder: Path) -> dict[str, dict]:
    """What two processes print of each method."""
    program = Path(__file__).with_name("sharded.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(program), kind, str(folder), ",".join(NAMES)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    lines = [json.loads(line.partition("FOUND ")[2]) for line in done.stdout.splitlines() if "FOUND " in line]
    assert done.returncode == 0 and {line["case"] for line in lines} == set(NAMES), done.stderr[-3000:]
    return {line["case"]: line for line in lines}


def test_tensor_parallel_processes_keep_what_one_keeps(checkpoint):
    """Also where groups of heads share a key: the tiny model has two for four."""
    for name, what in found("tensor_parallel", checkpoint).items():
        assert "error" not in what, what
        assert what["split"][1] == [32, 64], what
        assert what["kept"] and what["logits"] < 1e-4, (name, what)


def test_sharded_by_layer(checkpoint):
    for name, what in found("fsdp", checkpoint).items():
        assert "error" not in what, what
        assert what["answers"] and what["loss"] < 1e-5 and what["gradient"] < 1e-4, (name, what)
