"""Token merging, ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461): similar tokens become one in every encoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .pruning_methods import EncoderSparsifier
from .pruning_ops import autocast_disabled, rows_at, to_float
from .pruning_registry import register_method
from .pruning_settings import Sparsity, check_budget, check_counts, check_options, option, shown
from .pruning_types import Geometry, VisionFeatures, VisualTokens


def bipartite_matching(metric: Tensor, removed: int, protected: int = 1) -> tuple[Tensor, int]:
    """Which token goes into which (paper, section 3, "bipartite soft matching").

    Tokens 0, 2, 4, ... are A, the others B. Each of A names its most similar of B, and the `removed` of A with the most
    similar ones are merged into them.

    Args:
        metric: `(images, N, channels)`; the cosine of it is the similarity.
        removed: tokens to merge, (N - protected) // 2 at most.
        protected: tokens at the start that are neither merged nor merged into: 1, CLS; 2, CLS and a distillation token.

    Returns:
        the token of the next layer that each one goes into, `(images, N)`, and how many there are. The tokens of A that
        stay come first, in their order without CLS in descending order of similarity, then those of B; a distillation
        token is second.
    """
    metric = to_float(metric)
    metric = metric / metric.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(metric.dtype).tiny)
    images, length, _ = metric.shape
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if protected >= 1:
        similarity[:, 0] = -torch.inf
    if protected >= 2:
        similarity[:, :, 0] = -torch.inf
    score, partner = similarity.max(-1)
    order = score.argsort(dim=-1, descending=True, stable=True)
    merged, stays = order[:, :removed], order[:, removed:]
    if protected:
        stays = stays.sort(dim=-1).values
    left = stays.shape[1]
    place_a = torch.zeros_like(order).scatter(1, stays, torch.arange(left, device=order.device).expand(images, -1))
    place_b = left + torch.arange(length // 2, device=order.device)
    if protected >= 2:
        place_a = place_a + (place_a > 0)
        place_b = torch.where(place_b == left, 1, place_b)
    place_a = place_a.scatter(1, merged, place_b[partner.gather(1, merged)])
    places = torch.empty(images, length, dtype=torch.int64, device=order.device)
    places[:, ::2], places[:, 1::2] = place_a, place_b
    return places, length - removed


def merge(x: Tensor, size: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Averages `(images, N, channels)` by `(images, N)` size into the `count` tokens that `places` `(images, N)` names.

    Returns:
        tokens `(images, count, channels)` and their sizes `(images, count)`.
    """
    order = places.argsort(dim=-1, stable=True)
    place = places.gather(1, order)
    again = nn.functional.pad(place[:, 1:] == place[:, :-1], (1, 0))
    order = order.gather(1, again.int().argsort(dim=-1, stable=True))
    # One token of each place, in their order; only the others are summed, as a product of matrices: deterministic.
    first, others = order[:, :count], order[:, count:]
    weight = size.gather(1, others)
    into = places.gather(1, others)[:, None] == torch.arange(count, device=x.device)[:, None]
    member, own = into.to(size.dtype) * weight[:, None], size.gather(1, first)
    total = own + member.sum(-1)
    merged = own[..., None] * to_float(rows_at(x, first)) + member @ to_float(rows_at(x, others))
    return (merged / total[..., None]).to(x.dtype), total


def merge_schedule(tokens: int, budget: int, layers: int) -> list[int]:
    """How many of so many tokens (CLS not counted) each layer merges, so that `budget` are left.

    The same number in every layer, as far as there are so many to merge, and fewer in the last ones.

    Raises:
        ValueError: if halving in every layer leaves more.
    """
    for r in range(tokens + 1):
        left, schedule = tokens, []
        for _ in range(layers):
            schedule.append(min(r, left // 2, left - budget))
            left -= schedule[-1]
        if left == budget:
            return schedule
    raise ValueError(
        f"`sparse_budget`={budget!r}: merging in {layers} encoder layers leaves {left} of {tokens} tokens; allowed: "
        f"{left} to {tokens}, or more layers (sparse_layers)."
    )


@register_method
@dataclass(frozen=True)
class ToMe(EncoderSparsifier):
    """Merges the most similar tokens inside the layers of the vision tower.

    In a layer, between attention and multilayer perceptron: the keys, averaged over heads, are matched
    (`bipartite_matching`), and matched tokens become their mean, weighted by how many patches each stands for
    (size s). Attention is proportional: softmax(Q K^T / sqrt(d) + log s). CLS is never merged and does not enter the
    decoder; the tokens stand in the order of the last layer, not of the image.

    `sparse_layers` are the encoder layers that merge, by default all up to the one that LLaVA takes its features from;
    `sparse_budgets` the patch tokens left after each. `sparse_budget` spreads evenly: see `merge_schedule`.
    Options: `proportional`, true by default. All patches are the dense model. Complexity: N^2 d / 4 per layer; later
    layers see fewer tokens, so the tower gets faster too.

    Departs from the published code, which is for classifiers: the tokens of LLaVA's feature layer go to the projector,
    whatever their size. Attention is PyTorch's scaled_dot_product_attention, whatever the model's backend, for others
    take no mask.
    """

    name = "tome"
    paper = "Token Merging: Your ViT But Faster (arXiv 2210.09461)"
    summary = "merges similar tokens in every layer of the vision tower"
    cost = "N^2 d at each encoder layer"
    place = "layers"

    proportional: bool = option(True, "whether a token counts in attention for all that went into it")
    last_layer: int = field(default=-2, metadata={"internal": True})

    @classmethod
    def entering(cls, patches: int, settings: Sparsity) -> int:
        check_options(cls, settings.options)
        tokens = check_budget(settings.budget, patches)
        if settings.budgets is not None:
            return cls._check_halves(settings.budgets, patches, None)[-1]
        if tokens is None:
            raise cls.needs_budget("[tokens after each layer]")
        return tokens

    @classmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> ToMe:
        options = check_options(cls, settings.options)
        tokens, depth, budgets = cls.entering(geometry.patches, settings), geometry.encoder_layers, settings.budgets
        last = cls.check_layer(geometry, None)
        used = last % depth + 1
        given = list(range(used)) if settings.layers is None else settings.layers
        stages = check_counts("sparse_layers", given, -depth, depth - 1)
        places = [layer % depth for layer in stages]
        if places != sorted(set(places)) or places[-1] >= used:
            raise ValueError(
                f"`sparse_layers` must be ascending layers up to {used - 1}, which the features are taken from, "
                f"got {shown(given)}."
            )
        if budgets is None:
            left, budgets = geometry.patches, []
            for removed in merge_schedule(geometry.patches, tokens, len(stages)):
                left -= removed
                budgets.append(left)
        counts = cls._check_halves(budgets, geometry.patches, len(stages))
        return cls(stages, counts, last_layer=last, **options)

    @classmethod
    def _check_halves(cls, budgets: object, patches: int, stages: int | None) -> tuple[int, ...]:
        """Tokens after each layer, of which each can merge half of its own at most."""
        counts = check_counts("sparse_budgets", budgets, 1, patches, stages)
        for before, after in zip((patches, *counts), counts, strict=False):
            if not before - before // 2 <= after <= before:
                raise ValueError(
                    f"`sparse_budgets`: a layer merges half of its tokens at most: behind {before}, "
                    f"{before - before // 2} to {before} are allowed, got {shown(list(counts))}."
                )
        return counts

    @property
    def new_tokens(self) -> int:
        return self.tokens

    @property
    def feature_layer(self) -> int:
        return self.last_layer

    def flops(self, patches: int, width: int, channels: int) -> float:
        # The sums; similarities of half the tokens with the other half, in the width of one head, are left out.
        before = [patches, *self.budgets[:-1]]
        pairs = ((n - left) * (left + 1) for n, left in zip(before, self.budgets, strict=True))
        return 2.0 * width * sum(pairs)

    def removed(self, layer: int, depth: int, patches: int) -> int:
        """Tokens that a layer merges, of so many patch tokens that are left."""
        places = [number % depth for number in self.layers]
        return patches - self.budgets[places.index(layer)] if layer in places else 0

    def tower_tokens(self, used: int, depth: int, patches: int) -> list[int]:
        tokens = [patches + 1]
        for layer in range(used):
            tokens.append(tokens[-1] - self.removed(layer, depth, tokens[-1] - 1))
        return tokens

    def run_layers(self, layers: Sequence[Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        size = None
        for index, layer in enumerate(layers[: self.feature_layer % len(layers) + 1]):
            removed = self.removed(index, len(layers), hidden.shape[1] - 1)
            # Within the layer's own call, where weights that are offloaded or sharded are there.
            run = partial(merging_layer, size=size, removed=removed, protected=1, proportional=self.proportional)
            hidden, size, moved = layer(hidden, None, run=run)
            places = places.to(hidden.device) if moved is None else moved.gather(1, places.to(hidden.device))
        return hidden, places

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        """The tokens of the last layer; `VisionFeatures.sources` says where each patch has gone."""
        places: Any = vision.sources
        size = torch.zeros(vision.features.shape[:2], dtype=torch.int64, device=places.device)
        size = size.scatter_add(1, places, torch.ones_like(places))
        made = (size > 1).cumsum(-1) - 1
        patch = torch.arange(places.shape[1], device=places.device).expand_as(places)
        own = torch.zeros_like(size).scatter(1, places, patch)
        index = torch.where(size > 1, places.shape[1] + made, own)
        merged = torch.where(size.gather(1, places) > 1, made.gather(1, places), -1)
        return VisualTokens(vision.features, index, 1.0 / size.gather(1, places), merged)


def merging_layer(
    layer: Any, hidden: Tensor, size: Tensor | None, removed: int, protected: int, proportional: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs a CLIP encoder layer `(images, N, channels)` that merges `removed` tokens behind its attention.

    Args:
        size: `(images, N)` float32 patches in each token; None before the first merge.

    Returns:
        the output, the sizes, and the place of every token in it, `(images, N)`, None where nothing was merged.
    """
    attention = layer.self_attn
    x = layer.layer_norm1(hidden)
    heads = (attention.num_heads, attention.head_dim)
    query, key, value = (
        project(x).unflatten(-1, heads).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    bias = size.log().to(x.dtype)[:, None, None] if proportional and size is not None else None
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scale)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    places = None
    if removed:
        with autocast_disabled(hidden):
            places, count = bipartite_matching(to_float(key.detach()).mean(1), removed, protected)
            known = torch.ones_like(places, dtype=to_float(hidden).dtype) if size is None else size
            hidden, size = merge(hidden, known, places, count)
    return hidden + layer.mlp(layer.layer_norm2(hidden)), size, places
