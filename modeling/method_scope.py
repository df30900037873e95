"""SCOPE (Deng et al., NeurIPS 2025, arXiv 2510.24214): saliency and coverage, together, decide what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pruning_methods import EncoderSparsifier
from .pruning_ops import cosines, greedy_coverage
from .pruning_registry import register_method
from .pruning_settings import option
from .pruning_types import VisionFeatures, VisualTokens

COMBINED = ("multi", "add")


def coverage_tokens(
    similarity: Tensor, saliency: Tensor, count: int, alpha: float = 1.0, combined: str = "multi", block: int = 1
) -> tuple[Tensor, Tensor]:
    """Greedy choice by gain of coverage, weighted by saliency (paper, section 3.3).

    Args:
        similarity: `(rows, N, N)`; saliency: `(rows, N)`, from 0 on; block: see `greedy_coverage`.

    Returns:
        the tokens in the order of choice, and the gain with which each was chosen, both `(rows, count)`.
    """
    weight = saliency**alpha

    def value(gain: Tensor) -> Tensor:
        return gain * weight if combined == "multi" else gain + weight

    return greedy_coverage(similarity, torch.ones_like(weight), count, block, value)


@register_method
@dataclass(frozen=True)
class Scope(EncoderSparsifier):
    """Keeps the patches that CLS attends to and that stand for what nothing kept so far is similar to.

    At the encoder layer before last, with X its output, S the cosines of X and a the attention of CLS to each patch,
    summed over heads: cov_i = max(0, max over the chosen c of S_ci) says how well patch i is covered. Each step takes

        argmax over the rest of (sum over i of max(0, S_ji - cov_i)) * a_j^alpha.

    Options: `alpha`, 1 by default; `combined`: "multi" (default, as above) or "add" (the gain plus a_j^alpha); `block`,
    1 by default, as published: see `greedy_coverage`.
    `sparse_budgets` is [tokens]. No CLS, nothing merged; all patches are the dense model. A smaller budget is a part of
    a larger one. Complexity: N^2 d for the similarities, k N^2 for the choice.

    Departs from the published code in that similarities are float32, not the model's dtype.
    """

    name = "scope"
    paper = "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs (arXiv 2510.24214)"
    summary = "keeps salient patches that cover what the others do not"
    cost = "N^2 d + k N^2"
    needs_attention = True
    needs_cls = True

    alpha: float = option(1.0, "exponent of the saliency of a patch", low=0)
    combined: str = option("multi", "how saliency joins the gain of coverage", choices=COMBINED)
    block: int = option(1, "tokens chosen at a time", low=1)

    def flops(self, patches: int, width: int, channels: int) -> float:
        return super().flops(patches, width, channels) + 2.0 * patches**2 * width

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        saliency: Any = vision.saliency
        x, scores = vision.features, saliency.sum(1)
        order = coverage_tokens(cosines(x), scores, self.tokens, self.alpha, self.combined, self.block)[0]
        return VisualTokens.kept(x, order.sort(dim=-1).values, scores)
