"""From image placeholders to visual tokens: what enters the decoder of a LLaVA, in the caller's terms and in ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .attention_rows import take_rows
from .pruned_cache import ShortenedPrompt, remembered, surplus
from .sparsifier import Question
from .token_layout import PADDING, PromptLayout, following_positions, on_device, plan_compaction


@dataclass(frozen=True)
class DecoderInputs:
    """What enters the decoder.

    Attributes:
        embeds: `(batch, length, channels)`.
        attention_mask: `(batch, past + length)` or None; position_ids: `(batch, length)` or None.
        columns: `(batch, length)` int64, the caller's columns, `PADDING` for padding; None if they are the same.
        shortened: what layer 0 of the cache then holds; None if that is what the caller counts.
    """

    embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    columns: Tensor | None = None
    shortened: ShortenedPrompt | None = None


def newest_mask(attention_mask: Any, length: int) -> Tensor | None:
    """The part of a `(batch, past + length)` mask that belongs to the newest `length` tokens.

    Raises:
        ValueError: for a mask of another shape.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, dict) or attention_mask.dim() != 2:
        raise ValueError("A pruned model needs an attention_mask of shape (batch, length).")
    return attention_mask[:, attention_mask.shape[1] - length :]


def images_per_prompt(layout: PromptLayout, images: int, tokens: int, dense_tokens: int) -> list[int]:
    """How many of the `images` belong to each prompt, for which `tokens` or `dense_tokens` placeholders are written.

    Raises:
        ValueError: if placeholders and images do not match.
    """
    total = sum(layout.visual_counts)
    written = next((n for n in (tokens, dense_tokens) if n >= tokens and total == images * n), None)
    if written is None or any(count % written for count in layout.visual_counts):
        raise ValueError(
            f"Image features and image tokens do not match: {images} images, and prompts with {layout.visual_counts} "
            f"image tokens. Each image needs {tokens} tokens (SparseLlavaProcessor writes them) or {dense_tokens} "
            "(LlavaProcessor)."
        )
    return [count // written for count in layout.visual_counts]


def question_of(embeds: Tensor, layout: PromptLayout, images: list[int], ids: Tensor | None) -> Question:
    """What is asked about each image: the text of its prompt in `(batch, length, channels)` embeddings.

    Args:
        images: per prompt; ids: `(batch, n)` int64 or None, see `Question`.
    """
    most = max([1] + [count for count, n in zip(layout.text_counts, images, strict=True) if n])
    columns = (~layout.text).int().argsort(dim=1, stable=True)[:, :most]
    question = Question(take_rows(embeds, columns), layout.text.gather(1, columns), ids)
    return question.rows(on_device([row for row, n in enumerate(images) for _ in range(n)], embeds.device))


def insert_features(
    inputs: DecoderInputs, layout: PromptLayout, features: Tensor, dense_tokens: int, cache: Cache | None
) -> tuple[DecoderInputs, PromptLayout, list[int]]:
    """Puts `(images, tokens, channels)` features in place of the placeholders that `layout` marks.

    A stock processor writes `dense_tokens` placeholders for each image; those left over are dropped.

    Returns:
        the inputs, their layout, and the images per prompt.

    Raises:
        ValueError: if placeholders and images do not match.
    """
    tokens = features.shape[1]
    per_prompt = images_per_prompt(layout, features.shape[0], tokens, dense_tokens)
    written = sum(layout.visual_counts) // max(1, features.shape[0])
    if written != tokens:
        inputs, layout = drop_surplus(inputs, layout, written, tokens, cache)
    mask = layout.visual[..., None].expand_as(inputs.embeds)
    return replace(inputs, embeds=inputs.embeds.masked_scatter(mask, features)), layout, per_prompt


def drop_surplus(
    inputs: DecoderInputs, layout: PromptLayout, written: int, tokens: int, cache: Cache | None
) -> tuple[DecoderInputs, PromptLayout]:
    """Of the `written` placeholders of every image the first `tokens` stay."""
    embeds = inputs.embeds
    batch, length, _ = embeds.shape
    rank = (layout.visual.cumsum(1) - 1) % written
    keep = ~layout.visual | (rank < tokens)
    removed = [count // written * (written - tokens) for count in layout.visual_counts]
    plan = plan_compaction(keep, removed, layout.valid, (layout.lengths, [0] * batch))
    columns = plan.apply(torch.arange(length, device=embeds.device).expand(batch, -1))
    valid = torch.ones_like(columns, dtype=torch.bool) if plan.valid is None else plan.valid

    held = 0 if cache is None else int(cache.get_seq_length())
    before = held + surplus(cache)
    mask = plan.valid
    if held:
        earlier = None if inputs.attention_mask is None else inputs.attention_mask[:, :before].bool()
        if (past := remembered(cache).get(0)) is not None:
            earlier = past.mask_with(earlier, held)
        if earlier is not None or mask is not None:
            earlier = valid.new_ones(batch, held) if earlier is None else earlier
            mask = torch.cat([earlier, valid], dim=1)
    total = held + columns.shape[1]
    positions = following_positions(mask, held, columns)
    shortened = ShortenedPrompt(mask, total, before + length, "compact")
    new_layout = layout.moved(plan)
    if plan.valid is not None:
        columns = columns.masked_fill(~plan.valid, PADDING)
    return DecoderInputs(plan.apply(embeds), mask, positions, columns, shortened), new_layout


def translate(inputs: DecoderInputs, prompt: ShortenedPrompt, cache: Any) -> DecoderInputs:
    """Mask and positions of new tokens in terms of the tokens that layer 0 holds: `prompt` and what followed it."""
    mask = prompt.mask_with(
        inputs.attention_mask, prompt.total(inputs.attention_mask, cache, 0, inputs.embeds.shape[1])
    )
    positions = prompt.positions_of(inputs.embeds, mask, cache.get_seq_length())
    return replace(inputs, attention_mask=mask, position_ids=positions)


def weigh(
    inputs: DecoderInputs, layout: PromptLayout | None, weights: Tensor | None, cache: Any, config: Any
) -> DecoderInputs:
    """Lets visual tokens count for several in attention: the mask becomes `(batch, 1, length, held)`, additive.

    Args:
        layout: of the new tokens; weights: `(images, tokens)` of the visual ones among them, or None.
        config: of the decoder.

    Raises:
        ValueError: for an attention backend that takes no such mask, and a decoder whose layers need different ones.
    """
    backend = config._attn_implementation
    if backend not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation={backend!r} takes no mask, which proportional attention needs: 'sdpa' or 'eager' is "
            "allowed, or sparse_options={'proportional': False}."
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ValueError(
            f"layer_types: {', '.join(sorted(kinds))} attention in one decoder needs a mask for each, and proportional "
            "attention makes one: sparse_options={'proportional': False} is allowed."
        )
    window = None if kinds == {"full_attention"} else getattr(config, "sliding_window", None)
    embeds = inputs.embeds
    batch, new, _ = embeds.shape
    past = 0 if cache is None else cache.get_seq_length()
    bias = torch.zeros(batch, new, device=embeds.device)
    if weights is not None:
        assert layout is not None
        bias = bias.masked_scatter(layout.visual, weights.to(bias.device, bias.dtype).log())
    earlier = remembered(cache).get(0)
    if earlier is not None and earlier.bias is not None:
        known = earlier.bias.to(bias.device)
        between = int(past) - known.shape[1] if weights is not None else 0
        # Without new weights the mask alone needs them: what follows the prompt has none.
        bias = torch.cat([nn.functional.pad(known, (0, between)), bias], dim=1) if weights is not None else known
    elif weights is not None and int(past):
        bias = nn.functional.pad(bias, (int(past), 0))
    mask = _additive_mask(inputs, bias, past, cache, window)
    if weights is None:
        return replace(inputs, attention_mask=mask)
    total = int(past) + new
    held = inputs.shortened
    if held is None:
        valid = None if inputs.attention_mask is None else inputs.attention_mask.bool()
        held = ShortenedPrompt(valid, total, total + surplus(cache), "compact")
    return replace(inputs, attention_mask=mask, shortened=replace(held, bias=bias))


def _additive_mask(inputs: DecoderInputs, bias: Tensor, past: int | Tensor, cache: Any, window: int | None) -> Tensor:
    """The `(batch, 1, length, held)` mask of the new tokens, with the `bias` of the first columns."""
    embeds, valid = inputs.embeds, inputs.attention_mask
    batch, new, _ = embeds.shape
    width = int(past) + new if cache is None else int(cache.get_mask_sizes(new, 0)[0])
    columns = torch.arange(width, device=embeds.device)
    rows = past + torch.arange(new, device=embeds.device)[:, None]
    visible = (columns <= rows).expand(batch, -1, -1)
    if window is not None:
        visible = visible & (columns > rows - window)
    if valid is not None:
        there = nn.functional.pad(valid.bool(), (0, max(0, width - valid.shape[1])), value=True)[:, :width]
        visible = visible & there[:, None]
    wide = nn.functional.pad(bias, (0, max(0, width - bias.shape[1])))[:, None].expand(-1, new, -1)
    return wide.masked_fill(~visible, torch.finfo(embeds.dtype).min).to(embeds.dtype)[:, None]
