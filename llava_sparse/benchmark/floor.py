"""The least time that a stage can take on a machine: its arithmetic and its memory traffic at full speed."""

from __future__ import annotations

from typing import Any

import torch

from .shapes import parts_of
from .timing import Clock

REPEATS = 5


@torch.inference_mode()
def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches with one large product of matrices, and copying one large tensor.

    Returns:
        `flops`, operations a second; `bandwidth`, bytes a second.
    """
    clock = Clock(device)
    size, length = (8192, 2**30) if clock.on_gpu else (1536, 2**28)
    a = torch.randn(size, size, device=device).to(dtype)
    data = torch.ones(length // dtype.itemsize, dtype=dtype, device=device)
    copy = torch.empty_like(data)

    def best(call: Any) -> float:
        call()
        return min(clock.time(call) for _ in range(REPEATS))

    return {"flops": 2 * size**3 / best(lambda: a @ a), "bandwidth": 2 * length / best(lambda: copy.copy_(data))}


def floors(model: Any, entry: dict[str, Any], rates: dict[str, float]) -> dict[str, float]:
    """Seconds below which a result of `bench` cannot fall.

    Arithmetic overlaps with memory traffic: the longer of the two counts. A prefill reads every weight once; a step of
    decoding reads the decoder's and the whole cache.

    Returns:
        `prefill`; `decode`, for a token of every prompt; and those of the stages, `vision tower`, `projector`,
        `selection` (the encoder's second key projection alone) and `decoder`.
    """
    batch = entry["place"]["batch_size"]
    weights = {name: sum(map(_bytes, modules)) for name, modules in parts_of(model).items()} | {"selection": 0}
    weights["decoder"] += _bytes(model.lm_head)
    flops = {name: batch * count for name, count in entry["flops_by_formula"].items()}
    step = 2 * batch * weights["decoder"] / model.dtype.itemsize

    def least(arithmetic: float, traffic: float) -> float:
        return max(arithmetic / rates["flops"], traffic / rates["bandwidth"])

    return {
        "prefill": least(sum(flops.values()), sum(weights.values())),
        "decode": least(step, weights["decoder"] + entry["kv_bytes"]),
        **{name: least(flops[name], weights[name]) for name in flops},
    }


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
