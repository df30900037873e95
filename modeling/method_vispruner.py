"""VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818): important tokens, and others that are unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pruning_methods import EncoderSparsifier
from .pruning_ops import cosines, ranked
from .pruning_registry import register_method
from .pruning_settings import option
from .pruning_types import VisionFeatures, VisualTokens

AT_A_TIME = 8


def distinct_tokens(similarity: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Removes duplicates until `count` are left (paper, section 3.3).

    Again and again: of the tokens in their present order the even ones are compared with the odd ones, and the
    `AT_A_TIME` even ones with the most similar odd one go. The even ones that stay come first then, the least similar
    last, and the odd ones behind them.

    Args:
        similarity: `(rows, N, N)`; tokens: `(rows, n)` int64, those to choose from.

    Returns:
        `(rows, count)`, in no order.
    """
    while tokens.shape[1] > count:
        even, odd = tokens[:, ::2], tokens[:, 1::2]
        rows = similarity.gather(1, even[..., None].expand(-1, -1, similarity.shape[2]))
        nearest = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(-1) if odd.shape[1] else rows[..., 0]
        fewer = min(AT_A_TIME, tokens.shape[1] - count, even.shape[1])
        order = nearest.argsort(dim=-1, descending=True, stable=True)[:, fewer:]
        tokens = torch.cat([even.gather(1, order), odd], dim=1)
    return tokens


@register_method
@dataclass(frozen=True)
class VisPruner(EncoderSparsifier):
    """Keeps the patches that CLS attends to, and of the others those that are unlike each other.

    At the encoder layer before last, with A its attention and X its output: the int(`important` k) patches of
    highest mean over heads of A[CLS, p] stay; of the others, duplicates by cosine of X are removed, 8 at a time, until
    k stay in all (`distinct_tokens`), beginning in descending order of attention. They stand in their order.

    Equal similarities are compared in that order, so the choice amplifies rounding: noise of 1e-7 in the features can
    change a fifth of the tokens. The published numbers are reproduced in float64. Departs from the published code in
    that an odd number of the others, which fails there, has an even one more.

    Options: `important`, the share of the first kind, 0.5 by default. `sparse_budgets` is [tokens]. No CLS, nothing
    merged; all patches are the dense model. Complexity: N^2 d for the similarities, N^3 / 100 comparisons.
    """

    name = "vispruner"
    paper = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (arXiv 2412.01818)"
    )
    summary = "keeps what CLS attends to, and of the rest what is least alike"
    cost = "N^2 d"
    needs_attention = True
    needs_cls = True

    important: float = option(0.5, "the share of patches that stay for their attention", low=0, high=1)

    def flops(self, patches: int, width: int, channels: int) -> float:
        return super().flops(patches, width, channels) + 2.0 * patches**2 * width

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        saliency: Any = vision.saliency
        scores = saliency.mean(1)
        order, count = ranked(scores), int(self.important * self.tokens)
        distinct = distinct_tokens(cosines(vision.features), order[:, count:], self.tokens - count)
        kept = torch.cat([order[:, :count], distinct], dim=1).sort(dim=-1).values
        return VisualTokens.kept(vision.features, kept, scores)
