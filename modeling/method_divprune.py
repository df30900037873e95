"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): the visual tokens that differ most from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pruning_methods import EncoderSparsifier
from .pruning_ops import cosines
from .pruning_registry import register_method
from .pruning_types import VisionFeatures, VisualTokens


def max_min_tokens(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy solution of the max-min diversity problem (paper, section 3.2).

    Args:
        similarity: `(rows, N, N)` symmetric; the distance of two tokens is 1 less it.

    Returns:
        the tokens in the order of choice, and the distance with which each was chosen, both `(rows, count)`.
    """
    distance = 1 - similarity
    diagonal = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    # The first is the one whose nearest other is farthest away; alone in its image, it has none.
    nearest = distance.masked_fill(diagonal, torch.inf).amin(-1)
    chosen, distances = [], []
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    for step in range(count):
        value, token = nearest.masked_fill(taken, -torch.inf).max(-1, keepdim=True)
        chosen.append(token)
        distances.append(value)
        taken = taken.scatter(1, token, True)
        row = distance.gather(1, token[..., None].expand(-1, -1, distance.shape[2])).squeeze(1)
        nearest = row if step == 0 else torch.minimum(nearest, row)
    return torch.cat(chosen, dim=1), torch.cat(distances, dim=1)


@register_method
@dataclass(frozen=True)
class DivPrune(EncoderSparsifier):
    """Keeps the projected features that are most diverse: the smallest distance between two of them is made large.

    With d(i, j) = 1 - cos(v_i, v_j) over the projected features v: the first token is the one whose nearest other is
    farthest; each next one is argmax over the rest of min over the chosen of d. So a smaller budget is a part of a
    larger one. The kept tokens stand in their order, with contiguous positions.

    `sparse_budgets` is [tokens]; the paper's ratio 0.098 is `sparse_budget=0.098`. All patches are the dense model.
    Complexity: N^2 C for the distances, k N for the choice.

    Departs from the published code: every image of a batch is reduced on its own, not all like the first; a token that
    was chosen is not chosen again, where there are duplicates; similarities are float32, not the model's dtype; the
    image may stand anywhere.
    """

    name = "divprune"
    paper = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175)"
    summary = "keeps the projected features that differ most from each other"
    cost = "N^2 C"
    place = "projector"
    unit = "picture"

    def flops(self, patches: int, width: int, channels: int) -> float:
        return 2.0 * patches**2 * channels

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        projected: Any = vision.projected
        order, distance = max_min_tokens(cosines(projected), self.tokens)
        # For the record: the distance to those chosen before; 0 for what stays away.
        scores = distance.new_zeros(projected.shape[:2]).scatter(1, order, distance)
        return VisualTokens.kept(projected, order.sort(dim=-1).values, scores)
