"""VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818): important tokens, and others that are unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .sparsifier import EncoderSparsifier, Images, Reduced
from .tensors import best, cosines

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


@dataclass(frozen=True)
class VisPruner(EncoderSparsifier):
    """Keeps the patches that CLS attends to, and of the others those that are unlike each other.

    At the encoder layer before last, with A its attention and X its output: the round(`important` k) patches of
    highest mean over heads of A[CLS, p] stay; of the others, duplicates by cosine of X are removed, 8 at a time, until
    k stay in all (`distinct_tokens`). They stand in their order.

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
    option_defaults: ClassVar[dict[str, Any]] = {"important": 0.5}

    important: float = 0.5

    @classmethod
    def check_option(cls, name: str, value: Any) -> Any:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"sparse_options: important={value!r}: a number from 0 to 1 is allowed.")
        return float(value)

    def flops(self, patches: int, width: int, channels: int) -> float:
        return super().flops(patches, width, channels) + 2.0 * patches**2 * width

    def reduce(self, images: Images) -> Reduced:
        assert images.cls_attention is not None
        hidden, scores = images.hidden[:, 1:], images.cls_attention.mean(1)
        important = best(scores, round(self.important * self.tokens))
        taken = torch.zeros_like(scores, dtype=torch.int64).scatter(1, important, 1)
        rest = taken.argsort(dim=-1, stable=True)[:, : scores.shape[1] - important.shape[1]]
        distinct = distinct_tokens(cosines(hidden), rest, self.tokens - important.shape[1])
        kept = torch.cat([important, distinct], dim=1).sort(dim=-1).values
        return Reduced.kept(hidden, kept, scores)
