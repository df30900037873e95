"""From image placeholders to visual tokens: what enters the decoder, in the caller's terms and in ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .pruning_cache import ShortenedPrompt, remembered, surplus
from .pruning_ops import rows_at
from .pruning_sequence import PADDING, Compaction, PromptLayout, following_positions, on_device, plan_compaction
from .pruning_types import Question

IGNORED_LABEL = -100


@dataclass(frozen=True)
class DecoderInputs:
    """What enters the decoder.

    Attributes:
        embeds: `(batch, length, channels)`.
        attention_mask: `(batch, past + length)` or None; position_ids: `(batch, length)`, `(axes, batch, length)` where
            they are gathered, or None.
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


def prompt_lengths(labels: Tensor, visual: Tensor) -> Tensor:
    """Where the prompts of labelled rows end, `(batch,)` int64: at the first label behind the last image.

    Labels in front of it are of earlier turns, which the image's own turn has in its prompt. A row that has none behind
    it is a prompt as a whole.

    Args:
        labels: `(batch, length)` int64, -100 for none; visual: `(batch, length)` bool, the image placeholders.
    """
    columns = torch.arange(visual.shape[1], device=visual.device)
    last = torch.where(visual, columns, -1).amax(-1, keepdim=True)
    answers = (labels.to(visual.device) != IGNORED_LABEL) & (columns > last)
    # No row predicts the first token.
    return torch.where(answers, columns, len(columns)).amin(-1).clamp(min=1)


def rows_as_passed(columns: Tensor, length: int) -> Tensor:
    """The row of the decoder's output that stands for each token of the caller's: `(batch, length)` int64.

    It is the row that predicts the token behind: the one in front of the next token that is left, which may be a merged
    one; behind the last token, the last row. Labels computed outside, shifted by one, then meet the logits that they
    meet inside.

    Args:
        columns: `(batch, rows)` int64, the caller's column of each row, see `SparseModelOutput`.
    """
    rows = torch.arange(columns.shape[1], device=columns.device).expand(len(columns), -1)
    behind = torch.where(columns > PADDING, rows, -1).amax(-1, keepdim=True) + 1
    # Column `length` takes what is no column of the caller's.
    there = behind.expand(-1, length + 1).scatter(1, torch.where(columns < 0, length, columns), rows)
    there = torch.cat([there[:, 1:-1], behind], dim=1)
    return (there.flip(1).cummin(1).values.flip(1) - 1).clamp(min=0)


def images_per_prompt(
    counts: Sequence[int], kept: Sequence[int], dense: Sequence[int], what: str = "image"
) -> tuple[list[int], list[int]]:
    """How many of the images belong to each prompt, and how many placeholders are written for each image.

    Args:
        counts: placeholders of each prompt; kept: tokens of each image that stay, which our processor writes; dense:
            tokens of each image in the dense model, which the stock processor writes; what: "image" or "video".

    Raises:
        ValueError: if placeholders and images do not match.
    """
    for written in (kept, dense):
        prompts = _shared_out(counts, written)
        if prompts is not None and all(n >= k for n, k in zip(written, kept, strict=True)):
            return prompts, list(written)
    of = "" if len(set(kept)) > 1 or len(set(dense)) > 1 or not kept else f" Each {what} needs {kept[0]} tokens "
    of += f"(the sparse processor writes them) or {dense[0]} (the stock one)." if of else ""
    raise ValueError(
        f"{what.capitalize()} features and {what} tokens do not match: {len(kept)} {what}s, and prompts with "
        f"{list(counts)} {what} tokens.{of}"
    )


def _shared_out(counts: Sequence[int], written: Sequence[int]) -> list[int] | None:
    """The images of each prompt, in order, if their placeholders fill the prompts exactly."""
    prompts, image = [], 0
    for count in counts:
        first = image
        while count > 0 and image < len(written):
            count -= written[image]
            image += 1
        if count:
            return None
        prompts.append(image - first)
    return prompts if image == len(written) else None


def question_of(embeds: Tensor, layout: PromptLayout, images: Sequence[int], ids: Tensor | None) -> Question:
    """What is asked about each image: the text of its prompt in `(batch, length, channels)` embeddings.

    Args:
        layout: of the prompts; images: of each; ids: `(batch, n)` int64 or None, see `Question`.
    """
    most = max([1] + [count for count, n in zip(layout.text_counts, images, strict=True) if n])
    columns = (~layout.text).int().argsort(dim=1, stable=True)[:, :most]
    question = Question(rows_at(embeds, columns), layout.text.gather(1, columns), ids)
    rows: Question = question.rows(on_device([row for row, n in enumerate(images) for _ in range(n)], embeds.device))
    return rows


def place_features(
    inputs: DecoderInputs,
    layout: PromptLayout,
    features: Sequence[Tensor],
    written: Sequence[int],
    cache: Cache | None,
    places: Sequence[Tensor] | None = None,
) -> tuple[DecoderInputs, PromptLayout]:
    """Puts the features of each image, `(tokens, channels)`, in place of the placeholders that `layout` marks.

    Args:
        written: placeholders of each image; those that no token is left for are dropped, behind the others.
        places: where positions are gathered, which placeholders of each image stay, `(tokens,)` int64, ascending.

    Returns:
        the inputs and their layout.
    """
    if not features:
        return inputs, layout
    kept = [len(image) for image in features]
    if places is not None or kept != list(written):
        inputs, layout = drop_surplus(inputs, layout, kept, written, cache, places)
    mask = layout.visual[..., None].expand_as(inputs.embeds)
    values = torch.cat(list(features)).to(inputs.embeds.device, inputs.embeds.dtype)
    return replace(inputs, embeds=inputs.embeds.masked_scatter(mask, values)), layout


def drop_surplus(
    inputs: DecoderInputs,
    layout: PromptLayout,
    kept: Sequence[int],
    written: Sequence[int],
    cache: Cache | None,
    places: Sequence[Tensor] | None = None,
) -> tuple[DecoderInputs, PromptLayout]:
    """Of the `written` placeholders of every image the first `kept` stay, or those at `places`."""
    embeds, batch = inputs.embeds, len(inputs.embeds)
    length = embeds.shape[1]
    if places is None and len(set(written)) == 1 and len(set(kept)) == 1:
        stays = (layout.visual.cumsum(1) - 1) % written[0] < kept[0]
        removed = [count // written[0] * (written[0] - kept[0]) for count in layout.visual_counts]
    else:
        each = torch.cat([torch.arange(n) < k for k, n in zip(kept, written, strict=True)]).to(embeds.device)
        if places is not None:
            starts = on_device([sum(written[:i]) for i, k in enumerate(kept) for _ in range(k)], embeds.device)
            each = torch.zeros_like(each).scatter(0, torch.cat(list(places)).to(starts.device) + starts, True)
        stays = torch.ones_like(layout.visual).masked_scatter(layout.visual, each)
        removed = (layout.visual & ~stays).sum(-1).tolist()
    keep = ~layout.visual | stays
    plan = plan_compaction(keep, removed, layout.valid, (layout.lengths, [0] * batch))
    columns, valid = plan.columns, plan.there
    held = 0 if cache is None else int(cache.get_seq_length())
    before = held + surplus(cache)
    past = remembered(cache).get(0)
    mask = _mask_behind(inputs.attention_mask, past, held, before, valid, plan.valid is not None)
    gone = (~keep).sum(1, keepdim=True) + (0 if past is None or past.removed is None else past.removed)
    given, behind = inputs.position_ids, None
    if given is None:
        positions = following_positions(mask, held, columns)
    elif places is None:
        positions = _positions_left(given.expand(batch, -1), keep, plan, past)
    else:
        # What follows stands behind the whole prompt, and is not less by what has gone.
        given, gone = given.expand(-1, batch, -1), torch.zeros_like(gone)
        behind = given[-3:].amax((0, 2))[:, None] + 1
        # A fourth row in front tells samples packed into one by where it does not count on, so it is counted anew.
        text = [_positions_left(row, keep, plan, past)[None] for row in given[:-3]]
        positions = torch.cat([*text, positions_gathered(given[-3:], plan)])
    shortened = ShortenedPrompt(mask, held + columns.shape[1], before + length, "compact", behind, removed=gone)
    return DecoderInputs(plan.apply(embeds), mask, positions, columns, shortened), layout.moved(plan)


def _mask_behind(
    attention_mask: Tensor | None, past: ShortenedPrompt | None, held: int, before: int, valid: Tensor, padded: bool
) -> Tensor | None:
    """The mask of the tokens held and of new ones, `valid`, behind them; None where nothing is masked."""
    if not held:
        return valid if padded else None
    earlier = None if attention_mask is None else attention_mask[:, :before].bool()
    if past is not None:
        earlier = past.mask_with(earlier, held)
    if earlier is None and not padded:
        return None
    earlier = valid.new_ones(len(valid), held) if earlier is None else earlier
    return torch.cat([earlier, valid], dim=1)


def _positions_left(positions: Tensor, keep: Tensor, plan: Compaction, past: ShortenedPrompt | None) -> Tensor:
    """The caller's positions, each less by what has gone before it; where they begin anew, counting does too."""
    gone = (~keep).cumsum(1)
    begins = nn.functional.pad(positions[:, 1:] < positions[:, :-1], (1, 0))
    before = torch.where(begins, gone - (~keep).long(), 0).cummax(1).values
    if past is not None and past.removed is not None:
        before = before - past.removed
    return plan.apply((positions - gone + before).clamp(min=0))


def positions_gathered(positions: Tensor, plan: Compaction) -> Tensor:
    """Positions `(axes, batch, length)` of M-RoPE after a compaction, each as it was."""
    return plan.apply(positions.movedim(0, -1)).movedim(-1, 0)


def check_unpacked(method: Any, inputs: DecoderInputs, cache: Any, shortens: bool) -> None:
    """Refuses several samples packed into a row, told by positions that begin anew, where the method cannot have them.

    Raises:
        ValueError: naming the method.
    """
    positions = inputs.position_ids
    if positions is not None and positions.dim() == 3:
        positions = positions[0] if len(positions) > 3 else None
    if positions is None or inputs.attention_mask is not None or (cache is not None and cache.get_seq_length()):
        return
    if torch.compiler.is_compiling() or not bool((positions[:, 1:] < positions[:, :-1]).any()):
        return
    whole = method.looks_at_question or method.needs_mask or method.kind != "encoder"
    if whole or (shortens and len(inputs.embeds) > 1):
        what = f"{method.name} needs a prompt as a whole" if whole else f"{method.name} shortens rows unequally"
        raise ValueError(
            f"position_ids begin anew within a row, so several samples are packed into it; {what}: give each sample a "
            "row of its own, or use a method that looks at no question, such as visionzip, with one packed row."
        )


def translate(inputs: DecoderInputs, prompt: ShortenedPrompt, cache: Any) -> DecoderInputs:
    """Mask and positions of new tokens in terms of the tokens that layer 0 holds: `prompt` and what followed it."""
    total = prompt.total(inputs.attention_mask, cache, 0, inputs.embeds.shape[1])
    mask = prompt.mask_with(inputs.attention_mask, total)
    if inputs.position_ids is not None and prompt.removed is not None:
        positions = (inputs.position_ids - prompt.removed.to(inputs.position_ids.device)).clamp(min=0)
    else:
        positions = prompt.positions_of(inputs.embeds, mask, cache.get_seq_length())
    return replace(inputs, attention_mask=mask, position_ids=positions)


def weigh(
    inputs: DecoderInputs, layout: PromptLayout | None, weights: Tensor | None, cache: Any, config: Any
) -> DecoderInputs:
    """Lets visual tokens count for several in attention: the mask becomes `(batch, 1, length, held)`, additive.

    Args:
        layout: of the new tokens; weights: `(V,)` of all visual ones among them, or None.
        cache: of earlier tokens; config: of the decoder.

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
    if weights is not None and layout is not None:
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
        none = torch.zeros(batch, 1, dtype=torch.int64, device=embeds.device)
        held = ShortenedPrompt(valid, total, total + surplus(cache), "compact", removed=none)
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
    return wide.to(embeds.dtype).masked_fill(~visible, torch.finfo(embeds.dtype).min)[:, None]
