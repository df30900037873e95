"""The record of what was kept: stages of the decoder, and those of a tower as stages of the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .pruning_stage import Reduction
from .pruning_types import Selection, VisualTokens


def record_stage(layer: int, reductions: Sequence[Reduction], raters: Tensor) -> Selection:
    """The stage as `Selection` describes it, padded where groups differ."""
    batch = raters.shape[0]
    device = reductions[0].scores.device if reductions else "cpu"
    widths = [
        max([0] + [x.shape[1] for x in column])
        for column in ([r.kept for r in reductions], [r.scores for r in reductions])
    ]
    numbers = max([0] + [r.group.next_number for r in reductions])
    kept = torch.full((batch, widths[0]), -1, dtype=torch.int64, device=device)
    scores = torch.full((batch, widths[1]), -torch.inf, device=device)
    merge_map = torch.full((batch, numbers), -1, dtype=torch.int64, device=device)
    merges = False
    for r in reductions:
        group = r.group
        own = group.numbers.gather(1, r.kept).sort(dim=-1).values
        kept = group.put(kept, nn.functional.pad(own, (0, widths[0] - own.shape[1]), value=-1))
        wide = nn.functional.pad(r.scores.to(scores.dtype), (0, widths[1] - r.scores.shape[1]), value=-torch.inf)
        scores = group.put(scores, wide)
        if r.merged_into is not None:
            merges = True
            into = torch.where(r.merged_into >= 0, r.merged_into + group.next_number, -1)
            merge_map = group.put(merge_map, group.take(merge_map).scatter(1, group.numbers, into))
    return Selection(layer, kept, scores, merge_map if merges else None, raters)


def tokens_by_prompt(tokens: Sequence[VisualTokens], images: Sequence[int]) -> list[list[VisualTokens]]:
    """The images of each prompt, which has so many."""
    starts = [sum(images[:row]) for row in range(len(images))]
    return [list(tokens[start : start + count]) for start, count in zip(starts, images, strict=True)]


def numbers_by_prompt(
    tokens: Sequence[VisualTokens], images: Sequence[int], new_tokens: int
) -> tuple[Tensor, list[int]]:
    """The visual tokens of each prompt as `Selection` numbers them, and the number that follows.

    Tokens that stand for no patch come behind the `new_tokens` that each image may have.

    Returns:
        `(batch, most)` int64, 0 where a prompt has fewer, and a number for each prompt.
    """
    rows, following = [], []
    for prompt in tokens_by_prompt(tokens, images):
        patches = sum(image.patches for image in prompt)
        behind = patches + new_tokens * len(prompt)
        parts = [
            torch.where(image.patch_index[0] < 0, behind + order, numbers)
            for order, (image, numbers) in enumerate(zip(prompt, _renumbered(prompt, "patch_index"), strict=True))
        ]
        rows.append(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=tokens[0].scores.device))
        following.append(behind + len(prompt))
    return pad_sequence(rows, batch_first=True), following


def stage_of_encoder(layer: int, tokens: Sequence[VisualTokens], images: Sequence[int]) -> Selection:
    """What an encoder method made of the images as a stage of the prompts, a row for each."""
    device = tokens[0].scores.device
    kept, scores, into = [], [], []
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    for prompt in tokens_by_prompt(tokens, images):
        indices = _renumbered(prompt, "patch_index")
        own = [
            numbers[(image.patch_index[0] >= 0) & (image.patch_index[0] < image.patches)]
            for image, numbers in zip(prompt, indices, strict=True)
        ]
        kept.append(torch.cat([nothing, *own]).sort().values)
        scores.append(torch.cat([nothing.to(tokens[0].scores.dtype), *(image.scores[0] for image in prompt)]))
        into.append(torch.cat([nothing, *_renumbered(prompt, "merged")]))
    merges = tokens[0].merged is not None
    return Selection(
        layer,
        pad_sequence(kept, batch_first=True, padding_value=-1),
        pad_sequence(scores, batch_first=True, padding_value=-torch.inf),
        pad_sequence(into, batch_first=True, padding_value=-1) if merges else None,
    )


def _renumbered(prompt: Sequence[VisualTokens], name: str) -> list[Tensor]:
    """`patch_index`, or `merged`, of the images of a prompt, numbered within the prompt."""
    total, before = sum(image.patches for image in prompt), 0
    made: Tensor | int = 0
    parts = []
    for image in prompt:
        index = image.patch_index[0]
        if name == "patch_index":
            parts.append(torch.where(index < image.patches, index + before, index - image.patches + total + made))
        elif image.merged is not None:
            parts.append(torch.where(image.merged[0] >= 0, image.merged[0] + total + made, -1))
        before += image.patches
        made = made + (index >= image.patches).sum()
    return parts
