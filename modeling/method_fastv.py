"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): the last token's attention decides what later layers see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pruning_methods import DecoderSparsifier
from .pruning_registry import register_method
from .pruning_settings import POSITIONS, PRESET_DEPTH, PRESET_PATCHES, option, scale_layers
from .pruning_types import Geometry, RaterAttention

K = 2  # layers that see everything
SMALLEST = 64


def last_token(text_valid: Tensor) -> Tensor:
    """`(rows, T)` bool: the last text token of each row, of those that `(rows, T)` bool says are there."""
    place = torch.arange(text_valid.shape[1], device=text_valid.device)
    return place == torch.where(text_valid, place, -1).amax(-1, keepdim=True)


def last_token_scores(attention: RaterAttention) -> Tensor:
    """`(rows, V)`: attention of the one rater to the visual tokens, mean over heads."""
    weights = attention.raters.to(attention.probabilities.dtype)
    return (weights[:, None] @ attention.probabilities.mean(1)).squeeze(1)


def tokens_behind(budget: float, patches: int, whole: int, depth: int) -> float:
    """Tokens to keep behind `whole` of `depth` layers so that the mean over all layers is `budget`."""
    return (budget * depth - patches * whole) / (depth - whole)


@register_method
@dataclass(frozen=True)
class FastV(DecoderSparsifier):
    """Keeps the visual tokens that the last token of the prompt attends to, from decoder layer K on.

    With A the attention of layer K - 1 (0-based): score of visual token j = mean over heads of A[last token, j]; the
    `budgets[0]` = (1 - R) V best stay (none, for R = 1), in their order, at their positions; nothing is merged.

    `sparse_layers` is [K - 1], K = 2 by default. `sparse_budget` is the mean over all layers, as the papers' tables
    count: K V + (depth - K) kept = depth budget, for 64, 128, 192 tokens 30, 98, 166 kept. It is counted for 32 layers;
    a decoder of fewer scales the layer and keeps as many tokens behind it. Budgets below 64 shrink what is kept for 64
    in proportion. With a layer by hand the mean is that of the model's own layers.
    Options: `positions`: "original" (default, as published) or "compact"; `trim_cache`.
    Complexity: one attention row per head.

    Departs from the published code: a batch ranks each prompt by its own attention, not by that of the first one; a
    padding mask stays in force; several images compete for the sum of their budgets; nothing is selected anew while
    decoding.
    """

    name = "fastv"
    paper = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for LVLMs (arXiv 2403.06764)"
    )
    summary = "keeps what the last prompt token attends to after the second decoder layer"
    cost = "L D"
    fewest = 0

    positions: str = option("original", "what becomes of position ids", choices=POSITIONS)
    trim_cache: bool = option(False, "whether earlier layers forget what was pruned, too")

    @classmethod
    def preset_layers(cls, geometry: Geometry, budget: int | None) -> tuple[int, ...]:
        return scale_layers([K - 1], geometry.decoder_layers)

    @classmethod
    def preset_budgets(cls, geometry: Geometry, budget: int, layers: tuple[int, ...], by_hand: bool) -> tuple[int, ...]:
        patches, depth, whole = geometry.patches, geometry.decoder_layers, layers[-1] + 1
        if len(layers) > 1:
            raise ValueError(f"`sparse_layers` must be one layer, where FastV prunes once, got {list(layers)}.")
        if not by_hand:
            smallest = SMALLEST * patches / PRESET_PATCHES
            kept = tokens_behind(max(budget, smallest), patches, K, max(depth, PRESET_DEPTH))
            return (max(1, round(kept * min(1.0, budget / smallest))),)
        # Behind the last layer there is nothing whose tokens could make the mean any smaller.
        kept = tokens_behind(budget, patches, whole, depth) if whole < depth else patches * (budget == patches)
        if round(kept) < 1:
            least = -(-(patches * whole + depth - whole) // depth)
            raise ValueError(
                f"`sparse_budget`={budget!r}: with {whole} of {depth} layers whole, the mean over the layers is "
                f"{least} at least; allowed: {least} to {patches}, an earlier layer, or sparse_budgets."
            )
        return (round(kept),)

    def rate(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        return last_token(text_valid)

    def scores(self, attention: RaterAttention) -> Tensor:
        return last_token_scores(attention)
