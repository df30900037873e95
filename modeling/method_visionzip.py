"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): text-agnostic pruning in the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pruning_methods import EncoderSparsifier
from .pruning_ops import best, cluster_mean, rows_at, to_float
from .pruning_registry import register_method
from .pruning_settings import Sparsity, as_lists, check_budget, check_counts, check_options, is_count, option, shown
from .pruning_types import Geometry, VisionFeatures, VisualTokens

SALIENCIES = ("cls", "received")


def contextual_tokens(
    hidden: Tensor, metric: Tensor, dominant: Tensor, contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The contextual tokens (paper, section 3.2): the other tokens merged into a uniform sample of themselves.

    Every other token joins the target of most similar key; a contextual token is target + mean of its members.

    Args:
        hidden: `(items, N, channels)` patches; metric: `(items, N, head_dim)` their keys, averaged over heads.
        dominant: `(items, d)` int64, the patches that are dominant.
        contextual: M, the number of targets; at most N - d.

    Returns:
        tokens `(items, M, channels)`, the target `(items, N)` of every patch, -1 for dominant ones, and the patches
        `(items, M)` that are targets, ascending.
    """
    items, length, _ = hidden.shape
    others = length - dominant.shape[1]
    taken = torch.zeros(items, length, dtype=torch.int64, device=hidden.device).scatter(1, dominant, 1)
    remaining = taken.argsort(dim=-1, stable=True)[:, :others]
    rest, keys = rows_at(hidden, remaining), rows_at(metric, remaining)
    keys = keys / keys.norm(dim=-1, keepdim=True)

    step = max(1, others // contextual)
    nearest = (keys @ keys[:, : step * contextual : step].transpose(1, 2)).argmax(-1)
    position = torch.arange(others, device=hidden.device)
    is_target = (position % step == 0) & (position < step * contextual)
    members = torch.where(is_target, -1, nearest)
    tokens = rest[:, : step * contextual : step] + cluster_mean(rest, members, contextual, epsilon=0.0)

    owner = torch.where(is_target, position // step, nearest)
    targets = remaining[:, : step * contextual : step]
    return tokens, torch.full_like(taken, -1).scatter(1, remaining, owner), targets


@register_method
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

    Towers without CLS (as published for Qwen2.5-VL): s_p is the attention that p receives from all patches, mean over
    heads; all D dominant tokens are patches; both kinds are made of the features that enter the decoder, and a
    contextual token stands where its target stood, among the dominant ones. A ratio d is D = int(d N) of the N tokens
    of a picture; where numbers are more than N, M is less, then D.
    Nobody has published that for other towers: `saliency="received"` is the same rule, ours, at layer q of a SigLIP
    tower, which has to be asked for. In a CLIP tower it replaces s_p alone, by what p receives, from CLS too.
    """

    name = "visionzip"
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467)"
    summary = "keeps what CLS attends to, merges the rest into contextual tokens; does not look at the question"
    cost = "N H d + N M d"
    needs_attention = True
    keeps_cls = True

    saliency: str = option(
        "cls",
        "what rates patches: the attention of CLS, or that received from all tokens; Qwen-VL knows the latter alone",
        choices=SALIENCIES,
    )

    @classmethod
    def entering(cls, patches: int, settings: Sparsity) -> int:
        return sum(cls._counts(patches, settings))

    @classmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> VisionZip:
        layer = cls.check_layer(geometry, settings.layers)
        counts = cls._counts(geometry.patches, settings, geometry.has_cls, geometry.dynamic)
        return cls((layer,), counts, **check_options(cls, settings.options))

    @classmethod
    def _counts(
        cls, patches: int, settings: Sparsity, has_cls: bool | None = None, dynamic: bool = False
    ) -> tuple[int, int]:
        """D and M; of a picture that has fewer tokens, where these are of any size, M is less.

        Args:
            has_cls: whether the tower has it; None where that is not known, as to processors.
        """
        check_options(cls, settings.options)
        budget, budgets = check_budget(settings.budget, patches), settings.budgets
        if budgets is None:
            if budget is None:
                raise cls.needs_budget("[dominant, contextual]")
            contextual = int(budget * 5 / 32 + 0.5)
            return budget - contextual, contextual
        most = patches + (has_cls is not False)
        dominant, contextual = check_counts("sparse_budgets", budgets, 0, most, 2, of=patches)
        if dynamic and (patches == 1 or not any(isinstance(v, float) for v in budgets)):
            contextual = min(contextual, most - dominant)
        if not is_count(dominant, 1, most - contextual):
            counted = {True: " (it counts CLS)", False: "", None: " (it counts CLS, where the tower has it)"}[has_cls]
            raise ValueError(
                f"`sparse_budgets` must be [dominant, contextual]: dominant must be at least 1{counted}, both "
                f"together at most {most}, the tokens of the encoder, got {shown(as_lists(budgets))}."
            )
        return dominant, contextual

    @property
    def tokens(self) -> int:
        return sum(self.budgets)

    @property
    def receives(self) -> bool:
        return self.saliency == "received"

    @property
    def new_tokens(self) -> int:
        return self.budgets[1]

    def flops(self, patches: int, width: int, channels: int) -> float:
        rows = patches + 1 if self.receives else 0
        return super().flops(patches, width, channels) + 2.0 * rows * width**2 + 2.0 * rows**2 * width

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        cls, saliency, keys = (getattr(vision, name) for name in ("cls", "saliency", "keys"))
        dominant, contextual = self.budgets
        hidden, scores = vision.features, saliency.sum(1)
        index = best(scores, dominant - (cls is not None))
        features, patch_index, anchors = rows_at(hidden, index), index, index
        if cls is not None:
            features = torch.cat([cls[:, None], features], dim=1)
            patch_index = torch.nn.functional.pad(index, (1, 0), value=-1)
        merged = None
        if contextual:
            tokens, merged, targets = contextual_tokens(to_float(hidden), to_float(keys).mean(1), index, contextual)
            features = torch.cat([features, tokens.to(hidden.dtype)], dim=1)
            made = torch.arange(contextual, device=index.device) + scores.shape[1]
            patch_index = torch.cat([patch_index, made.expand(len(index), -1)], dim=1)
            anchors = torch.cat([index, targets], dim=1)
        if cls is not None:
            return VisualTokens(features, patch_index, scores, merged)
        anchors, order = anchors.sort(dim=-1)
        return VisualTokens(rows_at(features, order), rows_at(patch_index, order), scores, merged, anchors=anchors)
