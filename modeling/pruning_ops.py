"""Small operations on tensors that several methods need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FEW = 64
LAST = 2**32 - 1


def autocast_disabled(x: Tensor) -> torch.autocast:
    """A context that keeps autocast away from scores on the device of `x`: they are float32 whatever is around them."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def to_float(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """`(batch, length, channels)` at `(batch, rows)` int64: `(batch, rows, channels)`; `(batch, length)` likewise."""
    return x.gather(1, index) if x.dim() == 2 else x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def cluster_mean(x: Tensor, assignment: Tensor, clusters: int, epsilon: float) -> Tensor:
    """Unweighted means of clusters, as a product of matrices (deterministic on every device).

    Args:
        x: `(rows, n, channels)`; assignment: `(rows, n)` int64 cluster of each vector, negative for none.
        clusters: how many there are; epsilon: what is added to the number of members.

    Returns:
        `(rows, clusters, channels)`: sums over members divided by (members + epsilon), or by 1 where that is less
        than 1 (an empty cluster is zero).
    """
    member = (assignment[:, None, :] == torch.arange(clusters, device=x.device)[None, :, None]).to(x.dtype)
    size = (member.sum(-1, keepdim=True) + epsilon).clamp(min=1)
    return (member @ x) / size


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of `(rows, n)` scores, ascending by place: `(rows, count)`; ties go to the earlier."""
    return ranked(scores)[:, :count].sort(dim=-1).values


def ranked(scores: Tensor) -> Tensor:
    """The places of `(rows, n)` scores, the highest first; ties go to the earlier."""
    return scores.argsort(dim=-1, descending=True, stable=True)


@torch.no_grad()
def greedy_coverage(
    similarity: Tensor, demand: Tensor, count: int, block: int = 1, value: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy choice of the tokens that represent all others best: facility location.

    Maximises F(K) = sum over i of demand_i * max over j in K of max(0, similarity_ij). One token at a time gives
    1 - 1/e of the best value at least (Nemhauser, Wolsey and Fisher 1978); several at a time see what was chosen before
    them, not each other, and take as many fewer steps, of which each costs a GPU a few launches.

    Args:
        similarity: `(rows, N, N)` symmetric; demand: `(rows, N)`, from 0 on.
        count: how many are chosen; block: how many at a time.
        value: of the gains `(rows, N)`, by what the next tokens are chosen; the gains themselves by default.

    Returns:
        the tokens in the order of choice, and the value of each when it was chosen, both `(rows, count)`; ties go to
        the earlier token.
    """
    covered = torch.zeros_like(demand)
    taken = torch.zeros_like(demand, dtype=torch.bool)
    chosen, values = [], []
    for start in range(0, count, block):
        # Not a product of matrices: of equal gains, rounding would choose another one in a batch than alone.
        gain = (similarity - covered[:, None]).relu_().mul_(demand[:, None]).sum(-1)
        gain = (gain if value is None else value(gain)).masked_fill(taken, -torch.inf)
        fewer = min(block, count - start)
        tokens = gain.argmax(-1, keepdim=True) if fewer == 1 else ranked(gain)[:, :fewer]
        chosen.append(tokens)
        values.append(gain.gather(1, tokens))
        taken = taken.scatter(1, tokens, True)
        covered = torch.maximum(covered, rows_at(similarity, tokens).amax(1))
    return torch.cat(chosen, dim=1), torch.cat(values, dim=1)


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


def scramble(x: Tensor) -> Tensor:
    """Mixes the bits of int64 numbers from 0 to 2^32 - 1, one to one; integers alone, so the same on every device."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & LAST
    return (x >> 16) ^ x


def image_fingerprints(pixels: Tensor) -> Tensor:
    """A number for every image, from the signs of its normalised pixels: no dtype and no device changes a sign.

    Args:
        pixels: `(images, 3, height, width)`.

    Returns:
        `(images,)` int64 from 0 to 2^32 - 1.
    """
    positive = pixels.flatten(1) > 0
    places = scramble(1 + torch.arange(positive.shape[1], device=pixels.device))
    return (positive * places).sum(-1) & LAST
