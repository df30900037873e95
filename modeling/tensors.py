"""Small operations on tensors that several methods need."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 64


def exact(x: Tensor) -> torch.autocast:
    """A context that keeps autocast away from scores on the device of `x`: they are float32 whatever is around them."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def to_float(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cluster_mean(x: Tensor, assignment: Tensor, clusters: int, epsilon: float) -> Tensor:
    """Unweighted means of clusters, as a product of matrices (deterministic on every device).

    Args:
        x: `(rows, n, channels)`; assignment: `(rows, n)` int64 cluster of each vector, negative for none.

    Returns:
        `(rows, clusters, channels)`: sums over members divided by (members + epsilon), or by 1 where that is less
        than 1 (an empty cluster is zero).
    """
    member = (assignment[:, None, :] == torch.arange(clusters, device=x.device)[None, :, None]).to(x.dtype)
    size = (member.sum(-1, keepdim=True) + epsilon).clamp(min=1)
    return (member @ x) / size


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of `(rows, n)` scores, ascending by place: `(rows, count)`; ties go to the earlier."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(dim=-1).values


def cosines(x: Tensor) -> Tensor:
    """Cosine similarity of all pairs of `(rows, n, channels)`: `(rows, n, n)` float, exactly symmetric, 1 at most.

    Equal vectors have equal rows, so that ties stay ties; a zero vector is similar to nothing.
    """
    unit = to_float(x)
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(unit.dtype).tiny)
    if x.shape[1] <= FEW:
        # The matrix product of few rows may round equal ones differently.
        return (unit[:, :, None] * unit[:, None]).sum(-1).clamp(max=1)
    similarity = unit @ unit.transpose(1, 2)
    return ((similarity + similarity.transpose(1, 2)) / 2).clamp(max=1)
