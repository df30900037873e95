"""Decoders that can drop visual tokens between layers: LLaMA, Mistral and Qwen2."""

from __future__ import annotations

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
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from .attention_rows import TAP, RowTap, row_probabilities, watch
from .pruned_cache import CACHE, ShortenedPrompt, remember, remembered, the_cache
from .sparsifier import DecoderSparsifier, RaterAttention, Selection
from .stages import Prompt, RatingRows, apply_reductions, open_prompt, record_stage, reduce_group, trim_cache
from .tensors import exact
from .token_layout import PromptLayout, VisualGroup

# Rows of attention that are there at a time where every token rates.
RATER_BLOCK = 64


@dataclass
class SparseDecoderOutput(BaseModelOutputWithPast):
    """Adds to the stock output what a pruned prefill leaves.

    Attributes:
        columns: `(batch, new_length)` int64, the prompt column of each row of `last_hidden_state`, -1 for merged
            tokens, -2 for padding; None where nothing was dropped.
        selection: the stages, if they were asked for.
    """

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None


class PrunedDecoderMixin:
    """Modifications: `forward` takes a prompt's layout and a method, and prunes between layers.

    Without them, and with a cache of whole prompts, it is the stock forward. The state of a request is in arguments and
    in the cache: the model can serve several threads.
    """

    config: Any
    embed_tokens: nn.Module
    layers: Any
    norm: nn.Module
    rotary_emb: nn.Module
    gradient_checkpointing: bool
    training: bool

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.watch_layers()

    def watch_layers(self) -> None:
        for layer in self.layers:
            watch(layer.self_attn)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        layout: PromptLayout | None = None,
        tokens_per_image: int = 1,
        sparsifier: DecoderSparsifier | None = None,
        fingerprints: Tensor | None = None,
        numbers: tuple[Tensor, int] | None = None,
        output_selection: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Runs the decoder.

        Args:
            layout: where the visual tokens of `inputs_embeds` `(batch, length, channels)` are; None to prune nothing.
            tokens_per_image: visual tokens of one image, by which `sparsifier`'s budgets count.
            sparsifier: the method; needed with a layout.
            fingerprints: `(batch,)` int64, what the method has drawn from the images of each prompt.
            numbers: what the visual tokens are, where an encoder method has chosen them: see `open_prompt`.
            output_selection: whether to return the stages.

        Raises:
            ValueError: for visual tokens on a cache that is not empty, or a mask that is not `(batch, length)`.
        """
        cache = the_cache(past_key_values, cache)
        if layout is None and not set(remembered(cache)) - {0}:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **{CACHE: cache},
                **kwargs,
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2):
            raise ValueError(
                "Pruning needs an attention_mask of shape (batch, length); masks per query are not supported."
            )
        return self._forward_pruned(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            layout=layout,
            tokens_per_image=tokens_per_image,
            sparsifier=sparsifier,
            fingerprints=fingerprints,
            numbers=numbers,
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
        cache: Cache | None,
        layout: PromptLayout | None,
        tokens_per_image: int,
        sparsifier: DecoderSparsifier | None,
        fingerprints: Tensor | None,
        numbers: tuple[Tensor, int] | None,
        output_selection: bool,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SparseDecoderOutput:
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        carried = remembered(cache)
        if position_ids is None:
            position_ids = past + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(
                inputs_embeds.shape[0], -1
            )
        # Pruning behind a layer, and ahead of one.
        stages: dict[int, int] = {}
        ahead: dict[int, int] = {}
        prompt = None
        if layout is not None and sparsifier is not None:
            if past:
                raise ValueError(
                    f"{sparsifier.name} prunes a prompt as a whole: a new image on a cache that is not empty is not "
                    "supported. Run the conversation from its start without the cache."
                )
            numbered = {layer: i for i, layer in enumerate(sparsifier.layers)}
            stages, ahead = ({}, numbered) if sparsifier.before_layer else (numbered, {})
            prompt = open_prompt(
                layout, sparsifier, inputs_embeds, position_ids, tokens_per_image, fingerprints, numbers
            )
            attention_mask = layout.valid

        elif attention_mask is not None and not is_torchdynamo_compiling() and bool(attention_mask.all()):
            attention_mask = None

        hidden = inputs_embeds
        selections: list[Selection] = []
        kinds = self._kinds()
        masks, rotary = self._run_of_layers(0, hidden, attention_mask, position_ids, cache)
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if index and index in carried:
                masks, rotary = self._resume(index, carried[index], hidden, attention_mask, position_ids, cache)
            tap = None
            if index in ahead:
                assert prompt is not None
                assert sparsifier is not None
                preview = self._preview(layer, hidden, prompt, rotary)
                hidden, prompt = hidden.to(preview.query.device), prompt.to(preview.query.device)
                hidden, prompt, selection = self._prune(
                    ahead[index], hidden, preview, prompt, sparsifier, output_selection
                )
                selections += selection
                masks, rotary = self._pruned_run(index, hidden, prompt, sparsifier, cache, inputs_embeds.shape[1])
            if index in stages:
                assert prompt is not None
                assert sparsifier is not None
                rows = prompt.rating_rows(sparsifier.visual_raters)
                # Checkpointed layers are not given a cache.
                checkpointed = self.gradient_checkpointing and self.training
                tap = RowTap(rows.columns, cache, project_keys=checkpointed)
            hidden = layer(
                hidden,
                attention_mask=masks[kinds[index]],
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=rotary,
                **({CACHE: cache} if tap is None else {CACHE: tap, TAP: tap}),
                **kwargs,
            )
            if tap is not None:
                assert prompt is not None
                assert sparsifier is not None
                stage = stages[index]
                prompt = prompt.to(hidden.device)
                hidden, prompt, selection = self._prune(stage, hidden, tap, prompt, sparsifier, output_selection)
                selections += selection
                masks, rotary = self._pruned_run(index + 1, hidden, prompt, sparsifier, cache, inputs_embeds.shape[1])

        if prompt is not None and sparsifier is not None and sparsifier.trim_cache and cache is not None:
            trim_cache(cache, sparsifier.pruned_layers, prompt, inputs_embeds.shape[1], sparsifier.positions)
        return SparseDecoderOutput(
            last_hidden_state=self.norm(hidden),
            **{CACHE: cache if use_cache else None},
            columns=None if prompt is None else prompt.columns,
            selection=tuple(selections) if output_selection else None,
        )

    def _preview(self, layer: Any, hidden: Tensor, prompt: Prompt, rotary: tuple[Tensor, Tensor]) -> RowTap:
        """The rating rows of a layer's attention, before the layer is run."""
        device = layer.input_layernorm.weight.device
        if device.type != "meta":  # Offloaded; then hooks of the modules see to it.
            hidden, prompt = hidden.to(device), prompt.to(device)
            rotary = (rotary[0].to(device), rotary[1].to(device))
        tap = RowTap(prompt.rating_rows(False).columns, project_keys=True)
        with torch.no_grad():
            tap.take(layer.self_attn, layer.input_layernorm(hidden), rotary)
        return tap

    def _pruned_run(
        self,
        first: int,
        hidden: Tensor,
        prompt: Prompt,
        sparsifier: DecoderSparsifier,
        cache: Cache | None,
        length: int,
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """Masks and rotary tables for the layers from `first` on, which see the prompt pruned; the cache is told."""
        if cache is not None and first < self.config.num_hidden_layers:
            remember(cache, first, ShortenedPrompt(prompt.valid, hidden.shape[1], length, sparsifier.positions))
        return self._run_of_layers(first, hidden, prompt.valid, prompt.position_ids, cache)

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
        mask = prompt.mask_with(attention_mask, prompt.total(attention_mask, cache, first, hidden.shape[1]))
        if prompt.positions == "compact":
            position_ids = prompt.positions_of(hidden, mask, cache.get_seq_length(first))
        return self._run_of_layers(first, hidden, mask, position_ids, cache)

    def _kinds(self) -> list[str]:
        """The kind of attention of every layer, in the words of `layer_types`."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None:
            return list(kinds)
        windowless = getattr(self.config, "sliding_window", None) is None
        return ["full_attention" if windowless else "sliding_attention"] * self.config.num_hidden_layers

    def _run_of_layers(
        self, first: int, hidden: Tensor, valid: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """Masks (by kind of attention) and rotary tables for the layers from `first` on."""
        masks: dict[str, Any] = {}
        for layer, kind in enumerate(self._kinds()):
            if layer >= first and kind not in masks:
                create = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
                # No position ids: gaps in them would be read as several sequences packed into one.
                masks[kind] = create(
                    config=self.config,
                    inputs_embeds=hidden,
                    attention_mask=valid,
                    layer_idx=layer,
                    **{CACHE: cache},
                )
        return masks, self.rotary_emb(hidden, position_ids=position_ids.to(hidden.device))

    def _prune(
        self,
        stage: int,
        hidden: Tensor,
        tap: RowTap,
        prompt: Prompt,
        sparsifier: DecoderSparsifier,
        output_selection: bool,
    ) -> tuple[Tensor, Prompt, list[Selection]]:
        """Reduces the output of a pruning layer, `(batch, length, channels)`."""
        layer = sparsifier.pruned_layers[stage]
        rows = prompt.rating_rows(sparsifier.visual_raters)
        reductions = []
        for group in prompt.groups:
            if not group.columns.shape[1]:
                continue
            with torch.no_grad(), exact(hidden):
                scores, attention = self._scores(sparsifier.layers[stage], tap, prompt, rows, group, sparsifier)
                counts = sparsifier.counts(stage, group.images, attention)
            for count in sorted(set(counts)):
                members = [i for i, c in enumerate(counts) if c == count]
                part = group.subset(members)
                part_scores = scores if part is group else scores[torch.tensor(members, device=scores.device)]
                reductions.append(
                    reduce_group(layer, part, part_scores, count, hidden, prompt.position_ids, sparsifier)
                )
        raters = torch.where(rows.rates, prompt.columns.gather(1, rows.columns), -1) if output_selection else None
        hidden, prompt = apply_reductions(reductions, hidden, prompt, sparsifier.positions)
        return hidden, prompt, [] if raters is None else [record_stage(layer, reductions, raters)]

    def _scores(
        self,
        layer: int,
        tap: RowTap,
        prompt: Prompt,
        rows: RatingRows,
        group: VisualGroup,
        sparsifier: DecoderSparsifier,
    ) -> tuple[Tensor, RaterAttention]:
        """Scores of a group's visual tokens, with the (last) attention that gave them."""
        if not sparsifier.visual_raters:
            attention = self._rater_attention(layer, tap, prompt, rows, group, slice(None))
            return sparsifier.scores(attention), attention
        # Every token rates: in blocks, the attention of all of them is never there at once.
        total = raters = torch.zeros((), device=rows.columns.device)
        for block in rows.blocks(RATER_BLOCK):
            attention = self._rater_attention(layer, tap, prompt, rows, group, block)
            weight = attention.raters.sum(-1, keepdim=True)
            total = total + sparsifier.scores(attention) * weight
            raters = raters + weight
        return total / raters, attention

    def _rater_attention(
        self, layer: int, tap: RowTap, prompt: Prompt, rows: RatingRows, group: VisualGroup, block: slice
    ) -> RaterAttention:
        """The attention of some of the `rows` to the visual tokens of a group."""
        query, key = group.take(tap.query)[:, :, block], group.take(tap.key)
        columns, horizon = group.take(rows.columns)[:, block], group.take(rows.horizon)[:, block]
        every = torch.arange(key.shape[2], device=key.device)
        visible = every <= horizon[..., None]
        if self._kinds()[layer] == "sliding_attention":
            visible &= every > columns[..., None] - self.config.sliding_window
        if prompt.valid is not None:
            visible &= group.take(prompt.valid)[:, None]
        scaling = self.layers[layer].self_attn.scaling
        positions = group.take(prompt.position_ids)

        def rotary(position_ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.rotary_emb(query.new_empty(0, dtype=torch.float32), position_ids=position_ids)

        return RaterAttention(
            probabilities=row_probabilities(query, key, scaling, group.columns, visible),
            raters=group.take(rows.rates)[:, block],
            rater_positions=positions.gather(1, columns),
            visual_positions=positions.gather(1, group.columns),
            rotary=rotary,
            numbers=group.numbers,
            fingerprints=group.take(prompt.fingerprints),
        )


class SparseLlamaModel(PrunedDecoderMixin, LlamaModel):
    """LLaMA decoder that can drop visual tokens between layers."""


class SparseMistralModel(PrunedDecoderMixin, MistralModel):
    """Mistral decoder that can drop visual tokens between layers."""


class SparseQwen2Model(PrunedDecoderMixin, Qwen2Model):
    """Qwen2 decoder that can drop visual tokens between layers."""


SPARSE_DECODERS: dict[str, Any] = {
    "llama": SparseLlamaModel,
    "mistral": SparseMistralModel,
    "qwen2": SparseQwen2Model,
}
