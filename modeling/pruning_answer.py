"""What follows a prompt whose cache is trimmed, in the same pass: it sees what is left at the end, in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from .pruning_cache import CACHE, remember, remembered
from .pruning_inputs import DecoderInputs, positions_gathered, translate
from .pruning_ops import rows_at
from .pruning_sequence import PADDING, Compaction, of_caller, plan_compaction
from .pruning_stage import DecoderPruning


def decode_apart(
    decoder: Any, pruning: DecoderPruning, inputs: DecoderInputs, cache: Cache | None, kwargs: dict[str, Any]
) -> Any:
    """Runs the decoder on the prompts and, on the trimmed cache, on what follows them, as a generation would.

    Args:
        decoder: the decoder; pruning, inputs, kwargs: as for one run; cache: to be filled, or None.

    Raises:
        ValueError: where checkpointed layers would have no cache.
    """
    if decoder.gradient_checkpointing and decoder.training:
        raise ValueError(
            "sparse_options: with trim_cache=True what follows a prompt sees its trimmed cache, and checkpointed "
            "layers have none: train with trim_cache=False, or without gradient checkpointing."
        )
    use_cache = kwargs.get("use_cache")
    keeps = decoder.config.use_cache if use_cache is None else use_cache
    held: Any = DynamicCache(config=decoder.config) if cache is None else cache
    kwargs = kwargs | {"use_cache": True, CACHE: held}
    layout, embeds, positions = pruning.layout, inputs.embeds, inputs.position_ids
    batch, length, _ = embeds.shape
    counts, none = layout.answer_counts, [0] * batch
    front = plan_compaction(~layout.answer, counts, layout.valid, (layout.lengths, none))
    behind = plan_compaction(layout.answer, [length - n for n in counts], None, ([length] * batch, none))
    prompts = layout.moved(front, answers=True)
    first = decoder(
        inputs_embeds=front.apply(embeds),
        attention_mask=prompts.valid,
        position_ids=_moved(positions, front, batch),
        pruning=replace(pruning, layout=prompts),
        **kwargs | ({"visual_pos_masks": prompts.visual} if "visual_pos_masks" in kwargs else {}),
    )
    for name in ("visual_pos_masks", "deepstack_visual_embeds"):  # They are of the prompts.
        kwargs.pop(name, None)
    plain = front.valid is None and behind.valid is None
    mask = None if plain else torch.cat([front.there, behind.there], dim=1)
    rest = DecoderInputs(behind.apply(embeds), mask, None)
    rest = translate(rest, remembered(held)[0], held)
    if pruning.gathered:
        rest = replace(rest, position_ids=_moved(positions, behind, batch))
    second = decoder(
        inputs_embeds=rest.embeds, attention_mask=rest.attention_mask, position_ids=rest.position_ids, **kwargs
    )
    for layer, prompt in remembered(held).items() if keeps else ():
        remember(held, layer, prompt.followed_by(behind.valid, behind.source.shape[1], None if layer else length))
    stages = first.selection and tuple(
        replace(stage, raters=of_caller(stage.raters, front.columns)) for stage in first.selection
    )
    columns = torch.cat([of_caller(first.columns, front.columns), behind.columns], dim=1)
    # Padding between a prompt and what follows it goes to the left.
    order = (columns != PADDING).int().argsort(dim=1, stable=True)
    states = [first.last_hidden_state, second.last_hidden_state]
    second.last_hidden_state = rows_at(torch.cat(states, dim=1), order.to(states[0].device))
    if second.hidden_states is not None:
        pairs = zip(first.hidden_states, second.hidden_states, strict=True)
        second.hidden_states = tuple(torch.cat(pair, dim=1) for pair in pairs)
    second.attentions = None
    second.columns, second.selection, second[CACHE] = columns.gather(1, order), stages, held if keeps else None
    return second


def _moved(positions: Tensor | None, plan: Compaction, batch: int) -> Tensor | None:
    """Position ids, of one axis or several, after a compaction."""
    if positions is None or positions.dim() == 2:
        return None if positions is None else plan.apply(positions.expand(batch, -1))
    return positions_gathered(positions.expand(-1, batch, -1), plan)
