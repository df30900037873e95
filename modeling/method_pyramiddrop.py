"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): the deeper the layer, the fewer visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .method_fastv import last_token, last_token_scores
from .pruning_methods import DecoderSparsifier
from .pruning_registry import register_method
from .pruning_settings import POSITIONS, PRESET_DEPTH, PRESET_PATCHES, option, scale_layers
from .pruning_types import Geometry, RaterAttention

STAGES = 3
SMALLEST = 64


def pyramid(budget: float, patches: int = PRESET_PATCHES, depth: int = PRESET_DEPTH) -> tuple[int, tuple[float, ...]]:
    """A first layer l and shares of the tokens behind layers l, 2 l, 3 l, so that their mean over the layers is right.

    Shares are r, r^2, r^3 as in the paper; l is `depth` / 4 as there or, for small budgets, where the layers before it
    take 0.6 of the budget at most.
    """
    share = budget / patches
    # For 210 tokens 0.6 of the budget is 7 layers, in floating point a little less.
    first = min(depth // (STAGES + 1), max(1, int(0.6 * share * depth + 1e-9)))
    low, high = 0.0, 1.0
    for _ in range(60):
        r = (low + high) / 2
        mean = (first * (1 + r + r * r) + (depth - STAGES * first) * r**3) / depth
        low, high = (r, high) if mean < share else (low, r)
    return first, (high, high**2, high**3)


@register_method
@dataclass(frozen=True)
class PyramidDrop(DecoderSparsifier):
    """Drops visual tokens in stages; at each the last token of the prompt says which of them stay.

    A stage comes right before its layer l: score of visual token j = mean over heads of the attention that the last
    token of the prompt would pay j in layer l; `budgets[stage]` tokens stay, in their order. Nothing is merged.

    `sparse_layers` are those layers, as in the paper ([8, 16, 24] of 32); `sparse_budgets` the tokens behind each (of
    576, the published ratios 0.5, 0.25, 0.125 are [288, 144, 72]). `sparse_budget` is the mean over 32 layers; the
    layers are the paper's from about 240 tokens on, below that they begin earlier: see `pyramid`. Budgets below 64
    shrink those of 64 in proportion; a decoder of fewer layers scales the layers and keeps the tokens. With
    `sparse_layers` by hand, give `sparse_budgets` too. Options: `positions`: "compact" (default, as published:
    renumbered after every stage) or "original"; `trim_cache`.
    Complexity: queries of one token and keys of all, projected once more per stage.

    Departs from the published code: padding and eager attention work; rows stay on the left-padded side; several images
    compete for the sum of their budgets.
    """

    name = "pyramiddrop"
    paper = "PyramidDrop: Accelerating Large VLMs via Pyramid Visual Redundancy Reduction (arXiv 2410.17247)"
    summary = "drops tokens in stages, by the last prompt token's attention in the layer to come"
    cost = "L D^2 at each of 3 layers"
    before_layer = True

    positions: str = option("compact", "what becomes of position ids", choices=POSITIONS)
    trim_cache: bool = option(False, "whether earlier layers forget what was pruned, too")

    @classmethod
    def preset_layers(cls, geometry: Geometry, budget: int | None) -> tuple[int, ...]:
        scaled = PRESET_PATCHES if budget is None else budget * PRESET_PATCHES / geometry.patches
        first = pyramid(max(SMALLEST, scaled))[0]
        depth = geometry.decoder_layers
        if depth < 2:
            raise ValueError("`sparse_method`='pyramiddrop' acts ahead of any layer but the first: one is not enough.")
        layers = scale_layers([first * (i + 1) for i in range(STAGES)], depth)
        return tuple(sorted({max(1, layer) for layer in layers}))

    @classmethod
    def preset_budgets(cls, geometry: Geometry, budget: int, layers: tuple[int, ...], by_hand: bool) -> tuple[int, ...]:
        if by_hand:
            raise ValueError(f"`sparse_layers`={list(layers)}: give `sparse_budgets`, tokens per layer, too.")
        scaled = budget * PRESET_PATCHES / geometry.patches
        shares = pyramid(max(SMALLEST, scaled))[1][-len(layers) :]
        shrink = min(1.0, scaled / SMALLEST)
        return tuple(max(1, int(share * shrink * geometry.patches + 0.5)) for share in shares)

    def rate(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        return last_token(text_valid)

    def scores(self, attention: RaterAttention) -> Tensor:
        return last_token_scores(attention)
