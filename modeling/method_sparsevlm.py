"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): text-aware pruning between decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .pruning_methods import DecoderSparsifier
from .pruning_ops import cluster_mean, to_float
from .pruning_registry import register_method
from .pruning_settings import (
    POSITIONS,
    PRESET_PATCHES,
    Sparsity,
    check_budget,
    check_options,
    check_stages,
    option,
    scale_layers,
    shown,
)
from .pruning_types import Geometry, RaterAttention

RECYCLED_SHARE = 0.3  # tau of the paper
CLUSTER_SHARE = 10  # 1 / theta of the paper
GRAVITY_HEADS = 14

# Tokens kept at the three layers, by budget, as published for 576 patches.
PRESETS: dict[str, dict[int, tuple[int, ...]]] = {
    "1.5": {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    "2.0": {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}
RATERS = ("selected", "text", "all")
LAYERS = {"1.0": (2, 6, 15, 19), "1.5": (2, 6, 15), "2.0": (2, 6, 15)}
RANK_SETTINGS = {64: (0.8, 0.0), 128: (9.0, 6.0), 192: (13.5, 0.0)}


def text_raters(visual: Tensor, text: Tensor, text_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Text tokens that are visually relevant (paper, section 3.2, "relevant text token selection").

    Args:
        visual: `(rows, V, channels)` input embeddings of the visual tokens.
        text: `(rows, T, channels)` input embeddings of the text; text_valid: `(rows, T)` bool.

    Returns:
        raters `(rows, T)` bool: tokens whose mean probability is strictly above the mean over the text, or the whole
        text where there is none; and the mean probabilities `(rows, T)`, 0 for padding.
    """
    logits = to_float(visual) @ to_float(text).transpose(1, 2)
    logits = logits.masked_fill(~text_valid[:, None], torch.finfo(logits.dtype).min)
    relevance = logits.softmax(-1).mean(1).masked_fill(~text_valid, 0)
    mean = relevance.sum(-1, keepdim=True) / text_valid.sum(-1, keepdim=True).clamp(min=1)
    raters = (relevance > mean) & text_valid
    return torch.where(raters.any(-1, keepdim=True), raters, text_valid), relevance


def rater_mean(values: Tensor, raters: Tensor) -> Tensor:
    """Mean of `(rows, raters, V)` over the raters that `(rows, raters)` bool marks: `(rows, V)`."""
    weights = raters.to(values.dtype)
    return (weights[:, None] @ values).squeeze(1) / weights.sum(-1, keepdim=True).clamp(min=1)


def gravity(attention: RaterAttention) -> Tensor:
    """SparseVLM+ divisor R(m, n) = <rope(1, m), rope(1, n)> / sqrt(head_dim), `(rows, raters, V)`, one for all heads.

    It is the share of the attention that distance alone explains; 1 is the all-ones query and key.
    """

    def rotated_ones(positions: Tensor) -> Tensor:
        cos, sin = attention.rotary(positions)
        half = cos.shape[-1] // 2
        return cos + torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    query, key = rotated_ones(attention.rater_positions), rotated_ones(attention.visual_positions)
    return query @ key.transpose(1, 2) / query.shape[-1] ** 0.5


def corrected_heads(attention: RaterAttention) -> tuple[Tensor, Tensor]:
    """SparseVLM+ scores per rater: gravity-corrected attention, mean over the 14 heads of largest sum.

    Returns:
        `(rows, raters, V)` values and `(rows, min(14, heads))` int64 chosen heads, in descending order of sum.
    """
    corrected = attention.probabilities / gravity(attention)[:, None]
    corrected = corrected.masked_fill(~attention.raters[:, None, :, None], 0)
    heads = corrected.sum((-1, -2)).argsort(dim=-1, descending=True, stable=True)[:, :GRAVITY_HEADS]
    chosen = torch.zeros(corrected.shape[:2], dtype=corrected.dtype, device=corrected.device).scatter(1, heads, 1)
    return torch.einsum("bh,bhrv->brv", chosen, corrected) / heads.shape[1], heads


def attention_rank(attention: RaterAttention) -> Tensor:
    """Matrix rank of the head-mean attention of the raters to the visual tokens, `(rows,)` int64.

    Padding rows are zero and leave the singular values alone; the tolerance is that of the unpadded matrix.
    """
    matrix = attention.probabilities.mean(1).masked_fill(~attention.raters[..., None], 0)
    values = torch.linalg.svdvals(matrix)
    size = attention.raters.sum(-1).clamp(min=matrix.shape[-1])
    tolerance = size * torch.finfo(values.dtype).eps * values[:, 0]
    return (values > tolerance[:, None]).sum(-1)


def density_clusters(x: Tensor, clusters: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Density-peak clustering with k nearest neighbours (paper, section 3.3, "token reconstruction"), k = clusters.

    Args:
        x: `(rows, n, channels)`; clusters: from 1 to n; noise: `(rows, n)` uniform, added to the density times 1e-6.

    Returns:
        assignment `(rows, n)`, centres `(rows, clusters)` in descending order of score, density and centre scores
        `(rows, n)`.
    """
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    neighbours = distance.square().topk(clusters, dim=-1, largest=False).values
    density = (-neighbours.mean(-1)).exp()
    if noise is not None:
        density = density + noise * 1e-6
    denser = density[:, None, :] > density[:, :, None]
    furthest = distance.amax((-1, -2))[:, None, None]
    score = torch.where(denser, distance, furthest).amin(-1) * density
    # Two clusters without noise tie exactly: as in the published code, topk decides which of the two comes first.
    centres = score.topk(clusters, dim=-1).indices
    to_centre = distance.gather(2, centres[:, None].expand(-1, x.shape[1], -1))
    own = torch.arange(clusters, device=x.device).expand_as(centres)
    return to_centre.argmin(-1).scatter(1, centres, own), centres, density, score


def default_layers(version: str, depth: int) -> tuple[int, ...]:
    """The published layers, see `scale_layers`."""
    return scale_layers(LAYERS[version], depth)


def default_budgets(version: str, budget: int, patches: int, stages: int) -> tuple[int, ...]:
    """The published tokens per layer; other budgets are interpolated between them, as shares of the patches.

    Below the smallest published budget all stages shrink in proportion (to 1 at least), above the largest they grow
    towards all patches. A model with fewer stages takes the last ones.
    """
    if patches == PRESET_PATCHES and budget in PRESETS[version]:
        return PRESETS[version][budget][-stages:]
    points = {0: (0, 0, 0), **PRESETS[version], PRESET_PATCHES: (PRESET_PATCHES,) * 3}
    position = budget * PRESET_PATCHES / patches
    low = max(p for p in points if p <= position)
    high = min(p for p in points if p >= position)
    weight = 0.0 if high == low else (position - low) / (high - low)
    mixed = [a + weight * (b - a) for a, b in zip(points[low], points[high], strict=True)]
    return tuple(max(1, int(m * patches / PRESET_PATCHES + 0.5)) for m in mixed)[-stages:]


def recycled(dropped: int) -> tuple[int, int]:
    """Of so many dropped tokens, how many are recycled, and into how many clusters."""
    count = int(RECYCLED_SHARE * dropped) + 1
    return count, count // CLUSTER_SHARE + 1


def with_recycled(budgets: Sequence[int], patches: int) -> tuple[int, ...]:
    """The tokens that leave each stage if `budgets` stay and dropped ones are recycled: 66, 30, 17 give 82, 32, 18."""
    totals: list[int] = []
    entering = patches
    for budget in budgets:
        kept = min(budget, entering - 1)
        entering = kept + recycled(entering - kept)[1]
        totals.append(entering)
    return tuple(totals)


@register_method
@dataclass(frozen=True)
class SparseVLM(DecoderSparsifier):
    """Visually relevant question tokens rate the visual tokens; dropped ones are recycled into clusters.

    Raters, once, from the input embeddings V (visual) and T (text): m = mean over V of softmax(V T^t over the text);
    the raters are the tokens with m above its mean. At a pruning layer, P being the raters' attention to visual tokens:

    - score = mean over heads and raters of P; the `budgets[stage]` best stay, at least one always goes;
    - of the n dropped, the int(0.3 n) + 1 best are clustered into int(that / 10) + 1 (density peaks over the layer's
      output) and each cluster's mean stands behind the last visual token; there it is a visual token like any other.

    Options: `version`: "1.5" (default), "2.0" (SparseVLM+: P divided by its positional gravity, the 14 heads with the
    largest sum, no merging, original positions) or "1.0" (the tokens kept follow from the rank r of the head-mean P:
    int(r * scale + bias), or with `lam` the paper's form V - lam * (V - r); fourth layer 19). `positions`: "compact"
    (renumbered after every pruning; default of 1.0 and 1.5) or "original" (default of 2.0; a merged token stands at the
    mean position of its members). `scale`, `bias`, `lam`: version 1.0 alone. `trim_cache`:
    see `DecoderSparsifier`; false, as published.

    Ablations of the paper (section 5). `raters`: "selected" (default, as above), "text" (all the text that may rate) or
    "all" (every token: text, and each visual token with what it sees, at each layer those still there; version 1.5;
    text before the image sees none of it and is left out). `recycle`: all versions but 2.0 do by default; with False
    dropped tokens are gone and `sparse_budgets` is all that stays. In version 1.5 `sparse_budget` then stands for the
    published tokens and the merged ones that would have joined them (82, 32, 18 for 64), so that every layer holds as
    many tokens of an image as with recycling. Fixed against rank-adaptive budgets: versions 1.5 and 1.0, with the same
    `sparse_layers`; the number of tokens of 1.0 follows from the data: set `scale` for the mean that is wanted.

    `sparse_budget` is the papers' mean over the layers of 32: see `default_budgets` and `default_layers`. In version
    1.0 it chooses the published scale and bias (64, 128, 192; others scale 13.5 / 192 in proportion).

    What the paper leaves open: several images compete together for the sum of their budgets. Text is what follows the
    last image; where nothing does, the text before it rates, as if it could see the image. If no token is above the
    mean the whole text rates. Prompts without image are left alone. Ties go to the earlier token. The published
    code adds random noise to the clustering density; it is off here (`density_noise` is the place to pass it in).
    Complexity: T x L attention logits per head and pruning layer, never L x L at once ("all" goes through the rows in
    blocks); n^2 distances.
    """

    name = "sparsevlm"
    paper = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (arXiv 2410.04417)"
    summary = "question tokens rate the visual tokens between decoder layers; dropped tokens are recycled as clusters"
    cost = "R L d + (0.3 V)^2 d at each of 3 layers"

    version: str = option("1.5", "of the method", choices=tuple(LAYERS))
    positions: str = option(None, "what becomes of position ids; by default as the version does", choices=POSITIONS)
    raters: str = option("selected", "which tokens rate", choices=RATERS)
    recycle: bool = option(None, "whether dropped tokens are merged into new ones; not in version 2.0", kind=bool)
    trim_cache: bool = option(False, "whether earlier layers forget what was pruned, too")
    scale: float = option(None, "version 1.0: tokens kept per rank", kind=float, low=0)
    bias: float = option(None, "version 1.0: tokens kept besides", kind=float, low=0)
    lam: float | None = option(None, "version 1.0: the paper's form in place of scale and bias", kind=float, low=0)

    def __post_init__(self) -> None:
        own: dict[str, Any] = {
            "positions": "original" if self.version == "2.0" else "compact",
            "recycle": self.version != "2.0",
            "scale": 13.5,
            "bias": 0.0,
        }
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @classmethod
    def entering(cls, patches: int, settings: Sparsity) -> None:
        if cls._check_version(settings)["version"] != "1.0":
            return super().entering(patches, settings)
        check_budget(settings.budget, patches)
        return None

    @classmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> SparseVLM:
        options = cls._check_version(settings)
        budget, budgets = check_budget(settings.budget, geometry.patches), settings.budgets
        version, depth = options["version"], geometry.decoder_layers
        stages = check_stages(depth, settings.layers, default_layers(version, depth), budgets)
        method = cls(stages, (), **options)
        if version == "1.0":
            scale, bias = (13.5, 0.0) if budget is None else RANK_SETTINGS.get(budget, (13.5 * budget / 192, 0.0))
            own: dict[str, Any] = {"scale": scale, "bias": bias}
            return replace(method, **{name: value for name, value in own.items() if options[name] is None})
        if budgets is not None:
            return replace(method, budgets=cls.check_falling(budgets, geometry.patches, len(stages)))
        if budget is None:
            raise cls.needs_budget("[tokens per layer]")
        if len(stages) > 3:
            raise ValueError(
                f"`sparse_layers`={list(stages)}: `sparse_budget` expands to 3 layers at most; give `sparse_budgets` "
                "too."
            )
        counts = default_budgets(version, budget, geometry.patches, len(stages))
        if version == "1.5" and not method.recycle:
            counts = with_recycled(counts, geometry.patches)
        return replace(method, budgets=counts)

    @classmethod
    def _check_version(cls, settings: Sparsity) -> dict[str, Any]:
        """The options, of which not all belong to all versions."""
        options = check_options(cls, settings.options)
        version = options["version"]
        if options["raters"] == "all" and version != "1.5":
            raise ValueError(
                f"`sparse_options`: raters='all' belongs to version '1.5', not to {version!r}; allowed: selected, text."
            )
        if options["recycle"] and version == "2.0":
            raise ValueError("`sparse_options`: recycle=True: version '2.0' recycles nothing; take '1.5' or '1.0'.")
        given = [name for name in ("scale", "bias", "lam") if options[name] is not None]
        if given and version != "1.0":
            raise ValueError(f"`sparse_options`: {given[0]!r} belongs to version '1.0', not to {version!r}.")
        if "lam" in given and len(given) > 1:
            raise ValueError("`sparse_options`: give lam (the paper's form) or scale and bias (the code's), not both.")
        if version == "1.0" and settings.budgets is not None:
            raise ValueError(
                f"`sparse_budgets`={shown(settings.budgets)}: version '1.0' finds them from the attention's rank."
            )
        return options

    @property
    def visual_raters(self) -> bool:
        return self.raters == "all"

    def rate(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        return text_raters(visual, text, text_valid)[0] if self.raters == "selected" else text_valid

    def scores(self, attention: RaterAttention) -> Tensor:
        per_rater = corrected_heads(attention)[0] if self.version == "2.0" else attention.probabilities.mean(1)
        return rater_mean(per_rater, attention.raters)

    def counts(self, stage: int, images: int, attention: RaterAttention) -> list[int]:
        rows, visual = attention.visual_positions.shape[:2]
        if self.version != "1.0":
            # Published: one always goes. Recycled it is there again; gone, it would make the ablation shorter.
            most = visual if self.version == "1.5" and not self.recycle else visual - 1
            return [min(self.budgets[stage] * images, most)] * rows
        return [self._ranked_count(rank, visual) for rank in attention_rank(attention).tolist()]

    def _ranked_count(self, rank: int, visual: int) -> int:
        if rank >= visual:
            return visual
        if self.lam is not None:
            return max(0, visual - int(self.lam * (visual - rank)))
        return min(int(rank * self.scale + self.bias), visual - 1)

    def merge(self, layer: int, dropped: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.recycle:
            return None
        rows, dropped_count, _ = dropped.shape
        count, clusters = recycled(dropped_count)
        x = to_float(dropped[:, :count])
        noise = self.density_noise(layer, x)
        with torch.no_grad():
            assignment = density_clusters(x, clusters, noise)[0]
        merged = cluster_mean(x, assignment, clusters, epsilon=1e-6).to(dropped.dtype)
        padding = assignment.new_full((rows, dropped_count - count), -1)
        return merged, torch.cat([assignment, padding], dim=1)

    def density_noise(self, layer: int, x: Tensor) -> Tensor | None:
        """Uniform noise `(rows, n)` for the clustering at a pruning layer; None, the default, is deterministic."""
        return None
