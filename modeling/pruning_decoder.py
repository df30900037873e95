"""One forward pass of a decoder whose layers see prompts of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.import_utils import is_torchdynamo_compiling

from .pruning_attention import TAP, RowTap, row_probabilities
from .pruning_cache import CACHE, ShortenedPrompt, remember, remembered
from .pruning_ops import autocast_disabled, rows_at
from .pruning_record import record_stage
from .pruning_sequence import VisualGroup
from .pruning_stage import (
    DecoderPruning,
    Prompt,
    RatingRows,
    apply_reductions,
    open_prompt,
    reduce_group,
    trim_cache,
)
from .pruning_types import RaterAttention, Selection

# Rows of attention that are there at a time where every token rates.
RATER_BLOCK = 64


class DecoderRun:
    """The state of one forward pass, replaced layer by layer.

    Attributes:
        hidden: `(batch, length, channels)`, what enters the next layer.
        position_ids: `(batch, length)` of the tokens as they entered the decoder; `(batch, length, axes)` of M-RoPE.
    """

    def __init__(
        self, decoder: Any, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any
    ) -> None:
        self.decoder, self.cache, self.hidden, self.length = decoder, cache, embeds, embeds.shape[1]
        self.pruning: DecoderPruning | None = None
        self.prompt: Prompt | None = None
        self.tap: RowTap | None = None
        self.selections: list[Selection] = []
        self.carried = remembered(cache)
        self.kinds = attention_kinds(decoder.config)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = past + torch.arange(self.length, device=embeds.device).expand(len(embeds), -1)
        if decoder.position_axes > 1:
            # A row before the axes, of samples packed into one, is for masks that are not made here.
            axes = position_ids[-decoder.position_axes :] if position_ids.dim() == 3 else position_ids[None]
            position_ids = axes.expand(decoder.position_axes, -1, -1).movedim(0, -1)
        self.position_ids = position_ids
        self.attention_mask = attention_mask
        self.masks: dict[str, Any] = {}
        self.rotary: Any = None

    def open(self, pruning: DecoderPruning) -> None:
        """Prepares the pruning of a prompt.

        Raises:
            ValueError: on a cache that is not empty.
        """
        if self.cache is not None and self.cache.get_seq_length():
            raise ValueError(
                f"{pruning.method.name} prunes a prompt as a whole: a new image on a cache that is not empty is not "
                "supported. Run the conversation from its start without the cache."
            )
        self.pruning = pruning
        self.prompt = open_prompt(pruning, self.hidden, self.position_ids)
        self.attention_mask = pruning.layout.valid

    def before(self, index: int) -> dict[str, Any]:
        """What a layer is given besides its input; a method that acts right before the layer has pruned then."""
        if not index:
            mask = self.attention_mask
            if self.pruning is None and mask is not None and not is_torchdynamo_compiling() and bool(mask.all()):
                self.attention_mask = None
            self._begin(0, self.hidden, self.attention_mask, self.position_ids)
        elif index in self.carried:
            self._resume(index, self.carried[index])
        stage = self._stage(index)
        if stage is not None and self.pruning.method.before_layer:  # type: ignore[union-attr]
            self._preview(index)
            self._prune(stage)
            self._go_on(index)
        tap = None
        if stage is not None and not self.pruning.method.before_layer:  # type: ignore[union-attr]
            # Checkpointed layers are not given a cache.
            checkpointed = self.decoder.gradient_checkpointing and self.decoder.training
            tap = RowTap(self._rows().columns, self.cache, project_keys=checkpointed)
        self.tap = tap
        arguments = {"attention_mask": self.masks[self.kinds[index]], "position_embeddings": self.rotary}
        arguments["position_ids"] = self.position_ids if self.position_ids.dim() == 2 else None
        return arguments | ({CACHE: self.cache} if tap is None else {CACHE: tap, TAP: tap})

    def add(self, features: Tensor) -> None:
        """Adds `(batch, length, channels)`, of the tokens as they entered the decoder, to those that are left."""
        if self.prompt is not None:
            columns = self.prompt.columns.to(features.device)
            features = rows_at(features, columns.clamp(min=0)).masked_fill(columns[..., None] < 0, 0)
        self.hidden = self.hidden + features.to(self.hidden)

    def after(self, index: int) -> None:
        """Prunes a layer's output, where the method does."""
        if self.tap is not None:
            self.prompt = self.prompt.to(self.hidden.device)  # type: ignore[union-attr]
            self._prune(self._stage(index))  # type: ignore[arg-type]
            self._go_on(index + 1)

    def close(self) -> tuple[Tensor | None, tuple[Selection, ...] | None]:
        """The columns of the prompt that are left, and the stages where they were asked for."""
        if self.pruning is None or self.prompt is None:
            return None, None
        method = self.pruning.method
        if method.trim_cache and self.cache is not None:
            trim_cache(self.cache, method.pruned_layers, self.prompt, self.length, self.pruning.positions)
        return self.prompt.columns, tuple(self.selections) if self.pruning.output_selection else None

    def _stage(self, layer: int) -> int | None:
        layers = () if self.pruning is None else self.pruning.method.layers
        return layers.index(layer) if layer in layers else None

    def _rows(self) -> RatingRows:
        return self.prompt.rating_rows(self.pruning.method.visual_raters)  # type: ignore[union-attr]

    def _begin(self, first: int, hidden: Tensor, valid: Tensor | None, position_ids: Tensor) -> None:
        """Masks (by kind of attention) and rotary tables for the layers from `first` on."""
        self.masks = {}
        for layer, kind in enumerate(self.kinds):
            if layer >= first and kind not in self.masks:
                create = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
                # No position ids: gaps in them would be read as several sequences packed into one.
                self.masks[kind] = create(
                    config=self.decoder.config,
                    inputs_embeds=hidden,
                    attention_mask=valid,
                    layer_idx=layer,
                    # Where there is padding no mask can be left out; looking whether one can would wait for the device.
                    allow_is_causal_skip=valid is None,
                    **{CACHE: self.cache},
                )
        self.rotary = self._rotary(hidden, position_ids.to(hidden.device))

    def _rotary(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables, of the dtype of `like`."""
        if position_ids.dim() == 3:
            position_ids = position_ids.movedim(-1, 0)
        return self.decoder.rotary_emb(like, position_ids=position_ids)

    def _resume(self, first: int, prompt: ShortenedPrompt) -> None:
        """Goes on with new tokens in a run of layers that holds a shortened prompt."""
        total = prompt.total(self.attention_mask, self.cache, first, self.hidden.shape[1])
        mask, position_ids = prompt.mask_with(self.attention_mask, total), self.position_ids
        if prompt.positions == "compact":
            position_ids = prompt.positions_of(self.hidden, mask, self.cache.get_seq_length(first))
        self._begin(first, self.hidden, mask, position_ids)

    def _preview(self, index: int) -> None:
        """Takes the rating rows of a layer's attention, before the layer is run."""
        layer, hidden, prompt, rotary = self.decoder.layers[index], self.hidden, self.prompt, self.rotary
        device = layer.input_layernorm.weight.device
        if device.type != "meta":  # Offloaded; then hooks of the modules see to it.
            hidden, prompt = hidden.to(device), prompt.to(device)  # type: ignore[union-attr]
            rotary = tuple(table.to(device) for table in rotary)
        tap = RowTap(prompt.rating_rows(False).columns, project_keys=True)  # type: ignore[union-attr]
        if isinstance(layer, FSDPModule):  # Whose weights are there in its forward alone; that follows.
            layer.unshard()
        with torch.no_grad():
            tap.take(layer.self_attn, layer.input_layernorm(hidden), rotary)
        self.hidden = hidden.to(tap.query.device)
        self.prompt, self.tap = prompt.to(tap.query.device), tap  # type: ignore[union-attr]

    def _prune(self, stage: int) -> None:
        """Reduces `hidden` at a stage, by the rows that the tap holds."""
        pruning, prompt = self.pruning, self.prompt
        if pruning is None or prompt is None:
            return
        method, rows = pruning.method, self._rows()
        layer, reductions = method.pruned_layers[stage], []
        for group in prompt.groups:
            if not group.columns.shape[1]:
                continue
            with torch.no_grad(), autocast_disabled(self.hidden):
                scores, attention = self._scores(method, method.layers[stage], rows, group)
                counts = pruning.counts(stage, group, attention)
            for count in sorted(set(counts)):
                members = [i for i, c in enumerate(counts) if c == count]
                part = group.subset(members)
                own = scores if part is group else scores[torch.tensor(members, device=scores.device)]
                reductions.append(reduce_group(method, layer, part, own, count, self.hidden, prompt.position_ids))
        if pruning.output_selection:
            raters = torch.where(rows.rates, prompt.columns.gather(1, rows.columns), -1)
            self.selections.append(record_stage(layer, reductions, raters))
        self.hidden, self.prompt = apply_reductions(reductions, self.hidden, prompt, pruning.positions)

    def _go_on(self, following: int) -> None:
        """The layers from `following` on see what is left of the prompt; the cache is told."""
        pruning: Any = self.pruning
        prompt: Any = self.prompt
        if self.cache is not None and following < self.decoder.config.num_hidden_layers:
            held = ShortenedPrompt(prompt.valid, self.hidden.shape[1], self.length, pruning.positions)
            remember(self.cache, following, held)
        self._begin(following, self.hidden, prompt.valid, prompt.position_ids)

    def _scores(self, method: Any, layer: int, rows: RatingRows, group: VisualGroup) -> tuple[Tensor, RaterAttention]:
        """Scores of a group's visual tokens, with the (last) attention that gave them."""
        if not method.visual_raters:
            attention = self._rater_attention(layer, rows, group, slice(None))
            return method.scores(attention), attention
        # Every token rates: in blocks, the attention of all of them is never there at once.
        total = raters = torch.zeros((), device=rows.columns.device)
        for block in rows.blocks(RATER_BLOCK):
            attention = self._rater_attention(layer, rows, group, block)
            weight = attention.raters.sum(-1, keepdim=True)
            total = total + method.scores(attention) * weight
            raters = raters + weight
        return total / raters, attention

    def _rater_attention(self, layer: int, rows: RatingRows, group: VisualGroup, block: slice) -> RaterAttention:
        """The attention of some of the `rows` to the visual tokens of a group."""
        prompt: Any = self.prompt
        tap: Any = self.tap
        query, key = group.take(tap.query)[:, :, block], group.take(tap.key)
        columns, horizon = group.take(rows.columns)[:, block], group.take(rows.horizon)[:, block]
        every = torch.arange(key.shape[2], device=key.device)
        visible = every <= horizon[..., None]
        if self.kinds[layer] == "sliding_attention":
            visible &= every > columns[..., None] - self.decoder.config.sliding_window
        if prompt.valid is not None:
            visible &= group.take(prompt.valid)[:, None]
        scaling, positions = self.decoder.layers[layer].self_attn.scaling, group.take(prompt.position_ids)

        def rotary(position_ids: Tensor) -> tuple[Tensor, Tensor]:
            return self._rotary(query.new_empty(0, dtype=torch.float32), position_ids)

        return RaterAttention(
            probabilities=tap.of_all_heads(row_probabilities(query, key, scaling, group.columns, visible)),
            raters=group.take(rows.rates)[:, block],
            rater_positions=rows_at(positions, columns),
            visual_positions=rows_at(positions, group.columns),
            rotary=rotary,
            numbers=group.numbers,
            fingerprints=group.take(prompt.fingerprints),
        )


def attention_kinds(config: Any) -> list[str]:
    """The kind of attention of every layer, in the words of `layer_types`."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    windowless = getattr(config, "sliding_window", None) is None
    return ["full_attention" if windowless else "sliding_attention"] * config.num_hidden_layers
