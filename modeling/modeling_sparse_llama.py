"""Decoders that can drop visual tokens between layers: LLaMA, Mistral and Qwen2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_rows import TAP, RowTap, row_probabilities, take_rows, watch
from .pruned_cache import ShortenedPrompt, remember, remembered
from .sparsifier import DecoderSparsifier, RaterAttention, Selection
from .token_layout import (
    PromptLayout,
    VisualGroup,
    compact_positions,
    plan_compaction,
    visual_groups,
)


@dataclass
class SparseDecoderOutput(BaseModelOutputWithPast):
    """Adds to the stock output what a pruned prefill leaves.

    Attributes:
        columns: `(batch, new_length)` int64, the prompt column of each row of `last_hidden_state`, -1 for merged
            tokens and padding; None where nothing was dropped.
        selection: the stages, if they were asked for.
    """

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None


@dataclass
class _Prompt:
    """The prompt as the layers now see it; replaced after every pruning layer."""

    valid: Tensor | None
    lengths: list[int]
    position_ids: Tensor
    columns: Tensor
    last: Tensor
    groups: list[VisualGroup]
    rater_columns: Tensor
    raters: Tensor


class PrunedDecoderMixin:
    """Modifications: `forward` takes a prompt's layout and a method, and prunes between layers.

    Without them, and with a cache of whole prompts, it is the stock forward. The state of a request is in arguments and
    in the cache: the model can serve several threads.
    """

    config: Any
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    gradient_checkpointing: bool
    training: bool

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.watch_layers()

    def watch_layers(self) -> None:
        for layer in self.layers:
            watch(layer.self_attn)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        layout: PromptLayout | None = None,
        tokens_per_image: int = 1,
        sparsifier: DecoderSparsifier | None = None,
        output_selection: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Runs the decoder.

        Args:
            layout: where the visual tokens of `inputs_embeds` `(batch, length, channels)` are; None to prune nothing.
            tokens_per_image: visual tokens of one image, by which `sparsifier`'s budgets count.
            sparsifier: the method; needed with a layout.
            output_selection: whether to return the stages.

        Raises:
            ValueError: for visual tokens on a cache that is not empty, or a mask that is not `(batch, length)`.
        """
        if layout is None and not set(remembered(past_key_values)) - {0}:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # type: ignore[operator]
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2):
            raise ValueError("Pruning needs an attention_mask of shape (batch, length); masks per query are not supported.")
        return self._forward_pruned(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            layout=layout,
            tokens_per_image=tokens_per_image,
            sparsifier=sparsifier,
            output_selection=output_selection,
            **kwargs,
        )

    @merge_with_config_defaults
    @capture_outputs
    def _forward_pruned(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        layout: PromptLayout | None,
        tokens_per_image: int,
        sparsifier: DecoderSparsifier | None,
        output_selection: bool,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SparseDecoderOutput:
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        carried = remembered(cache)
        if position_ids is None:
            position_ids = past + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(
                inputs_embeds.shape[0], -1
            )
        stages: dict[int, int] = {}
        prompt = None
        if layout is not None and sparsifier is not None:
            if past:
                raise ValueError(
                    f"{sparsifier.name} prunes a prompt as a whole: a new image on a cache that is not empty is not "
                    "supported. Run the conversation from its start without the cache."
                )
            stages = {layer: i for i, layer in enumerate(sparsifier.layers)}
            prompt = _open_prompt(layout, sparsifier, inputs_embeds, position_ids, tokens_per_image)
            attention_mask = layout.valid

        elif attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None

        hidden = inputs_embeds
        selections: list[Selection] = []
        masks, rotary = self._run_of_layers(0, hidden, attention_mask, position_ids, cache)
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if index and index in carried:
                masks, rotary = self._resume(index, carried[index], hidden, attention_mask, position_ids, cache)
            tap = None
            if index in stages:
                assert prompt is not None
                # Checkpointed layers are not given a cache.
                checkpointed = self.gradient_checkpointing and self.training
                tap = RowTap(prompt.rater_columns, cache, project_keys=checkpointed)
            hidden = layer(
                hidden,
                attention_mask=masks[self._kind(index)],
                position_ids=position_ids,
                past_key_values=cache if tap is None else tap,
                use_cache=use_cache,
                position_embeddings=rotary,
                **({} if tap is None else {TAP: tap}),
                **kwargs,
            )
            if tap is not None:
                assert prompt is not None and sparsifier is not None
                stage = stages[index]
                hidden, prompt, selection = self._prune(stage, hidden, tap, prompt, sparsifier, output_selection)
                selections += selection
                if cache is not None and index + 1 < self.config.num_hidden_layers:
                    length = inputs_embeds.shape[1]
                    shortened = ShortenedPrompt(prompt.valid, hidden.shape[1], length, sparsifier.positions)
                    remember(cache, index + 1, shortened)
                masks, rotary = self._run_of_layers(index + 1, hidden, prompt.valid, prompt.position_ids, cache)

        return SparseDecoderOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=cache if use_cache else None,
            columns=None if prompt is None else prompt.columns,
            selection=tuple(selections) if output_selection else None,
        )

    def _resume(
        self,
        first: int,
        prompt: ShortenedPrompt,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Any,
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """Masks and rotary tables of new tokens for a run of layers that holds a shortened prompt."""
        batch, new, _ = hidden.shape
        total = int(cache.get_seq_length(first)) + new
        mask = prompt.mask_with(attention_mask, total)
        if prompt.positions == "compact":
            position_ids = compact_positions(mask, hidden.new_empty(batch, total, 0), newest=new)
        return self._run_of_layers(first, hidden, mask, position_ids, cache)

    def _kind(self, layer: int) -> str:
        """The kind of attention of a layer, in the words of `layer_types`."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None:
            return kinds[layer]
        return "full_attention" if getattr(self.config, "sliding_window", None) is None else "sliding_attention"

    def _run_of_layers(
        self, first: int, hidden: Tensor, valid: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """Masks (by kind of attention) and rotary tables for the layers from `first` on."""
        masks: dict[str, Any] = {}
        for layer in range(first, self.config.num_hidden_layers):
            kind = self._kind(layer)
            if kind not in masks:
                create = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
                # No position ids: gaps in them would be read as several sequences packed into one.
                masks[kind] = create(
                    config=self.config,
                    inputs_embeds=hidden,
                    attention_mask=valid,
                    past_key_values=cache,
                    layer_idx=layer,
                )
        return masks, self.rotary_emb(hidden, position_ids=position_ids)

    def _prune(
        self,
        stage: int,
        hidden: Tensor,
        tap: RowTap,
        prompt: _Prompt,
        sparsifier: DecoderSparsifier,
        output_selection: bool,
    ) -> tuple[Tensor, _Prompt, list[Selection]]:
        """Reduces the output of a pruning layer, `(batch, length, channels)`."""
        layer = sparsifier.layers[stage]
        reductions = []
        for group in prompt.groups:
            if not group.columns.shape[1]:
                continue
            attention = self._rater_attention(layer, tap, prompt, group)
            with torch.no_grad():
                scores = sparsifier.scores(attention)
                counts = sparsifier.counts(stage, group.images, attention)
            for count in sorted(set(counts)):
                members = [i for i, c in enumerate(counts) if c == count]
                part = group.subset(members)
                part_scores = scores if part is group else scores[torch.tensor(members, device=scores.device)]
                reductions.append(_reduce(layer, part, part_scores, count, hidden, prompt.position_ids, sparsifier))
        hidden, prompt = _apply(reductions, hidden, prompt, sparsifier.positions)
        if not output_selection:
            return hidden, prompt, []
        return hidden, prompt, [_record(layer, reductions, hidden.shape[0])]

    def _rater_attention(self, layer: int, tap: RowTap, prompt: _Prompt, group: VisualGroup) -> RaterAttention:
        query, key, columns = group.take(tap.query), group.take(tap.key), group.take(prompt.rater_columns)
        every = torch.arange(key.shape[2], device=key.device)
        # Raters in front of the image look at all of it, as if they stood right behind.
        horizon = torch.maximum(columns, group.take(prompt.last)[:, None])
        visible = every <= horizon[..., None]
        if self._kind(layer) == "sliding_attention":
            visible &= every > columns[..., None] - self.config.sliding_window
        if prompt.valid is not None:
            visible &= group.take(prompt.valid)[:, None]
        scaling = self.layers[layer].self_attn.scaling
        positions = group.take(prompt.position_ids)

        def rotary(position_ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.rotary_emb(query.new_empty(0, dtype=torch.float32), position_ids=position_ids)

        return RaterAttention(
            probabilities=row_probabilities(query, key, scaling, group.columns, visible),
            raters=group.take(prompt.raters),
            rater_positions=positions.gather(1, columns),
            visual_positions=positions.gather(1, group.columns),
            rotary=rotary,
        )


@dataclass
class _Reduction:
    """What one stage does to one group of rows; shapes are per group, V tokens entered."""

    group: VisualGroup
    scores: Tensor
    kept: Tensor
    merged: Tensor | None
    merged_positions: Tensor | None
    merged_into: Tensor | None

    @property
    def merged_count(self) -> int:
        return 0 if self.merged is None else self.merged.shape[1]


def _open_prompt(
    layout: PromptLayout, sparsifier: DecoderSparsifier, embeds: Tensor, position_ids: Tensor, tokens_per_image: int
) -> _Prompt:
    """Finds the groups and the raters of a prompt before the first layer."""
    batch, length = layout.visual.shape
    groups = visual_groups(layout, tokens_per_image)
    most = max([layout.text_counts[row] for group in groups for row in group.rows], default=0)
    most = max(1, most)
    rater_columns = (~layout.text).int().argsort(dim=1, stable=True)[:, :most]
    text_valid = layout.text.gather(1, rater_columns)
    raters = torch.zeros_like(text_valid)
    with torch.no_grad():
        text = take_rows(embeds, rater_columns)
        for group in groups:
            visual = take_rows(group.take(embeds), group.columns)
            raters = group.put(raters, sparsifier.rate(visual, group.take(text), group.take(text_valid)))
    return _Prompt(
        valid=layout.valid,
        lengths=layout.lengths,
        position_ids=position_ids.expand(batch, -1),
        columns=torch.arange(length, device=embeds.device).expand(batch, -1),
        last=layout.last,
        groups=groups,
        rater_columns=rater_columns,
        raters=raters,
    )


def _reduce(
    layer: int,
    group: VisualGroup,
    scores: Tensor,
    count: int,
    hidden: Tensor,
    position_ids: Tensor,
    sparsifier: DecoderSparsifier,
) -> _Reduction:
    """Keeps the `count` best tokens of each row of a group and merges the others if the method does."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept, dropped = order[:, :count].sort(dim=-1).values, order[:, count:]
    if dropped.shape[1] == 0:
        return _Reduction(group, scores, kept, None, None, None)
    columns = group.columns.gather(1, dropped)
    outcome = sparsifier.merge(layer, take_rows(group.take(hidden), columns))
    if outcome is None:
        return _Reduction(group, scores, kept, None, None, None)
    merged, assignment = outcome
    member = assignment[:, None] == torch.arange(merged.shape[1], device=merged.device)[:, None]
    positions = group.take(position_ids).gather(1, columns).float()
    mean_position = (member * positions[:, None]).sum(-1) / member.sum(-1).clamp(min=1)
    into = torch.full_like(order, -1).scatter(1, dropped, assignment)
    return _Reduction(group, scores, kept, merged, mean_position.round().long(), into)


def _apply(
    reductions: Sequence[_Reduction], hidden: Tensor, prompt: _Prompt, positions: str
) -> tuple[Tensor, _Prompt]:
    """Compacts the batch after a stage: `hidden` `(batch, length, channels)` and all that goes with it."""
    batch, length, channels = hidden.shape
    keep = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    most = max((r.merged_count for r in reductions), default=0)
    merged = hidden.new_zeros(batch, most, channels)
    merged_positions = prompt.position_ids.new_zeros(batch, most)
    removed, inserted = [0] * batch, [0] * batch
    for r in reductions:
        group = r.group
        mask = group.take(keep).scatter(1, group.columns, False)
        keep = group.put(keep, mask.scatter(1, group.columns.gather(1, r.kept), True))
        for row in group.rows:
            removed[row] = group.columns.shape[1] - r.kept.shape[1]
            inserted[row] = r.merged_count
        if r.merged is not None and r.merged_positions is not None:
            missing = most - r.merged_count
            merged = group.put(merged, nn.functional.pad(r.merged, (0, 0, 0, missing)))
            merged_positions = group.put(merged_positions, nn.functional.pad(r.merged_positions, (0, missing)))

    plan = plan_compaction(keep, removed, prompt.valid, prompt.lengths, inserted, prompt.last)
    groups = [_next_group(r, plan.destination, plan.inserted) for r in reductions]
    last = prompt.last
    for group in groups:
        last = group.put(last, group.columns[:, -1] if group.columns.shape[1] else group.take(last) * 0 - 1)
    if positions == "original":
        position_ids = plan.apply(prompt.position_ids, merged_positions if most else None)
    else:
        position_ids = compact_positions(plan.valid, plan.source)
    no_column = prompt.columns.new_full((batch, most), -1)
    columns = plan.apply(prompt.columns, no_column if most else None)
    if plan.valid is not None:
        columns = columns.masked_fill(~plan.valid, -1)
    hidden = plan.apply(hidden, merged if most else None)
    rater_columns = plan.destination.gather(1, prompt.rater_columns).clamp(0, hidden.shape[1] - 1)
    return hidden, _Prompt(
        plan.valid, plan.lengths, position_ids, columns, last, groups, rater_columns, prompt.raters
    )


def _next_group(r: _Reduction, destination: Tensor, inserted: Tensor | None) -> VisualGroup:
    """The group after its reduction: where its visual tokens now are."""
    group = r.group
    columns = group.take(destination).gather(1, group.columns.gather(1, r.kept))
    numbers = group.numbers.gather(1, r.kept)
    if r.merged_count:
        assert inserted is not None
        new = group.next_number + torch.arange(r.merged_count, device=columns.device)
        columns = torch.cat([columns, group.take(inserted)[:, : r.merged_count]], dim=1)
        numbers = torch.cat([numbers, new.expand(len(group.rows), -1)], dim=1)
    return VisualGroup(group.rows, group.index, group.images, columns, numbers, group.next_number + r.merged_count)


def _record(layer: int, reductions: Sequence[_Reduction], batch: int) -> Selection:
    """The stage as `Selection` describes it, padded where groups differ."""
    device = reductions[0].scores.device if reductions else "cpu"
    widths = [
        max((x.shape[1] for x in column), default=0)
        for column in ([r.kept for r in reductions], [r.scores for r in reductions])
    ]
    numbers = max((r.group.next_number for r in reductions), default=0)
    kept = torch.full((batch, widths[0]), -1, dtype=torch.int64, device=device)
    scores = torch.full((batch, widths[1]), -torch.inf, device=device)
    merge_map = torch.full((batch, numbers), -1, dtype=torch.int64, device=device)
    merges = False
    for r in reductions:
        group = r.group
        own = group.numbers.gather(1, r.kept)
        kept = group.put(kept, nn.functional.pad(own, (0, widths[0] - own.shape[1]), value=-1))
        wide = nn.functional.pad(r.scores.to(scores.dtype), (0, widths[1] - r.scores.shape[1]), value=-torch.inf)
        scores = group.put(scores, wide)
        if r.merged_into is not None:
            merges = True
            into = torch.where(r.merged_into >= 0, r.merged_into + group.next_number, -1)
            merge_map = group.put(merge_map, group.take(merge_map).scatter(1, group.numbers, into))
    return Selection(layer, kept, scores, merge_map if merges else None)


class SparseLlamaModel(PrunedDecoderMixin, LlamaModel):
    """LLaMA decoder that can drop visual tokens between layers."""


class SparseMistralModel(PrunedDecoderMixin, MistralModel):
    """Mistral decoder that can drop visual tokens between layers."""


class SparseQwen2Model(PrunedDecoderMixin, Qwen2Model):
    """Qwen2 decoder that can drop visual tokens between layers."""


SPARSE_DECODERS: dict[str, type[PrunedDecoderMixin]] = {
    "llama": SparseLlamaModel,
    "mistral": SparseMistralModel,
    "qwen2": SparseQwen2Model,
}
