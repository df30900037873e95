"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): text-agnostic pruning in the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_counts, is_count
from .sparsifier import EncoderSparsifier, Geometry, Images, Reduced
from .tensors import cluster_mean, to_float


def dominant_tokens(scores: Tensor, dominant: int) -> Tensor:
    """The dominant tokens (paper, section 3.2): CLS and the `dominant - 1` patches of highest score.

    Args:
        scores: `(images, patches)` attention of CLS to each patch, summed over heads.

    Returns:
        `(images, dominant)` int64 token indices, ascending, CLS = 0 first; ties go to the earlier patch.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, : dominant - 1]
    return torch.nn.functional.pad(order.sort(dim=-1).values + 1, (1, 0))


def contextual_tokens(hidden: Tensor, metric: Tensor, dominant: Tensor, contextual: int) -> tuple[Tensor, Tensor]:
    """The contextual tokens (paper, section 3.2): the other tokens merged into a uniform sample of themselves.

    Every other token joins the target of most similar key; a contextual token is target + mean of its members.

    Args:
        hidden: `(images, N, channels)` tokens with CLS.
        metric: `(images, N, head_dim)` keys, averaged over heads.
        dominant: `(images, D)` token indices.
        contextual: M, the number of targets; at most N - D.

    Returns:
        tokens `(images, M, channels)` and the target `(images, N)` of every token, -1 for dominant ones.
    """
    images, length, channels = hidden.shape
    others = length - dominant.shape[1]
    taken = torch.zeros(images, length, dtype=torch.int64, device=hidden.device).scatter(1, dominant, 1)
    remaining = taken.argsort(dim=-1, stable=True)[:, :others]
    rest = hidden.gather(1, remaining[..., None].expand(-1, -1, channels))
    keys = metric.gather(1, remaining[..., None].expand(-1, -1, metric.shape[-1]))
    keys = keys / keys.norm(dim=-1, keepdim=True)

    step = max(1, others // contextual)
    nearest = (keys @ keys[:, : step * contextual : step].transpose(1, 2)).argmax(-1)
    position = torch.arange(others, device=hidden.device)
    is_target = (position % step == 0) & (position < step * contextual)
    members = torch.where(is_target, -1, nearest)
    tokens = rest[:, : step * contextual : step] + cluster_mean(rest, members, contextual, epsilon=0.0)

    owner = torch.where(is_target, position // step, nearest)
    return tokens, torch.full_like(taken, -1).scatter(1, remaining, owner)


@dataclass(frozen=True)
class VisionZip(EncoderSparsifier):
    """Keeps the patches that CLS attends to (dominant) and merges the rest by key similarity (contextual).

    At encoder layer q (`layers[0]`; the one before last), with A its attention, X its output, K its keys:

    - s_p = sum over heads of A[CLS, p]; the D - 1 patches of highest s and CLS itself are the dominant tokens;
    - of the R = N - D other tokens every (R // M)-th, M in all, is a target; each remaining one joins the target with
      the most similar key (cosine of head-averaged K); contextual token = target + mean of those that joined.

    `budgets` is (D, M) as published: D counts CLS. `sparse_budget` b gives M = round(5b / 32), D = b - M, which is the
    published split (54+10, 108+20, 162+30) continued to every b from 1 to the number of patches. Ablations at a total
    of b tokens: (b, 0) is dominant only, (1, b - 1) contextual only, (b - m, m) any split between them; CLS is always
    there, so that they differ in the patches alone.
    Complexity: N x M similarities per image; no attention matrix, one row of it per head.
    Several images: each is reduced on its own. The layer is the one LLaVA takes its features from, -2 if there are
    several. Departs from the published code in that M = 0 is allowed.
    """

    name = "visionzip"
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467)"
    summary = "keeps what CLS attends to, merges the rest into contextual tokens; does not look at the question"
    cost = "N H d + N M d"
    needs_attention = True

    @classmethod
    def resolve(
        cls,
        geometry: Geometry,
        budget: float | None,
        layers: Sequence[int] | None,
        budgets: Sequence[int] | None,
        options: dict[str, Any] | None,
    ) -> VisionZip:
        cls.check_options(options)
        budget = cls.check_budget(budget, geometry.patches)
        layer = cls.check_layer(geometry, layers)
        if budgets is None:
            if budget is None:
                raise ValueError(
                    "sparse_method='visionzip' needs sparse_budget (64, say) or sparse_budgets=[dominant, contextual]."
                )
            contextual = int(budget * 5 / 32 + 0.5)
            budgets = (budget - contextual, contextual)
        tokens = geometry.patches + 1
        dominant, contextual = check_counts("sparse_budgets", budgets, 0, tokens, 2)
        if not is_count(dominant, 1, tokens - contextual):
            raise ValueError(
                f"sparse_budgets={[dominant, contextual]}: dominant must be at least 1 (it counts CLS) and "
                f"dominant + contextual at most {tokens}, the tokens of the encoder."
            )
        return cls(layers=(layer,), budgets=(dominant, contextual))

    @property
    def tokens(self) -> int:
        return sum(self.budgets)

    @property
    def new_tokens(self) -> int:
        return self.budgets[1]

    def reduce(self, images: Images) -> Reduced:
        assert images.cls_attention is not None
        assert images.keys is not None
        dominant, contextual = self.budgets
        hidden, scores = images.hidden, images.cls_attention.sum(1)
        index = dominant_tokens(scores, dominant)
        features = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        numbers = index - 1
        merged = None
        if contextual:
            tokens, owner = contextual_tokens(to_float(hidden), to_float(images.keys).mean(1), index, contextual)
            features = torch.cat([features, tokens.to(hidden.dtype)], dim=1)
            made = torch.arange(contextual, device=index.device) + scores.shape[1]
            numbers = torch.cat([numbers, made.expand(len(numbers), -1)], dim=1)
            merged = owner[:, 1:]
        return Reduced(features, numbers, scores, merged)
