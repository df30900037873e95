"""The record of what was kept: stages of the decoder, and those of a tower as stages of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def count_visual_tokens(entering: Sequence[int], stages: Sequence[Selection], layers: int) -> Tensor:
    """How many visual tokens each prompt has, `(batch, 1 + layers)` int64: entering the decoder, and behind each layer.

    Args:
        entering: of each prompt; stages: of the tower, which are counted in that, and of the decoder.
    """
    counts = torch.tensor(entering)[:, None].repeat(1, 1 + layers)
    for stage in stages:
        if stage.raters is None:
            continue
        left = (stage.kept >= 0).sum(-1)
        if stage.merge_map is not None:
            into = nn.functional.pad(stage.merge_map, (1, 0), value=-1).sort(-1).values
            left = left + (into.diff(dim=-1) > 0).sum(-1)
        counts[:, 1 + stage.layer :] = left[:, None].cpu()
    return counts


def by_prompt(items: Sequence[Any], images: Sequence[int]) -> list[list[Any]]:
    """What there is of each image as a list for each prompt, which has so many."""
    starts = [sum(images[:row]) for row in range(len(images))]
    return [list(items[start : start + count]) for start, count in zip(starts, images, strict=True)]


def tokens_by_prompt(tokens: Sequence[VisualTokens], images: Sequence[int]) -> list[VisualTokens]:
    """The images of each prompt as one."""
    nothing = tokens[0].map(lambda x: x[:, :0])
    return [VisualTokens.joined(prompt) if prompt else nothing for prompt in by_prompt(tokens, images)]


def numbers_by_prompt(
    tokens: Sequence[VisualTokens], images: Sequence[int], new_tokens: Sequence[Sequence[int]]
) -> tuple[Tensor, list[int]]:
    """The visual tokens of each prompt as `Selection` numbers them, and the number that follows.

    Tokens that stand for no patch come behind the `new_tokens` that each part of each image, a tile, say, may have at
    most; a part has one of them at most.

    Returns:
        `(batch, most)` int64, 0 where a prompt has fewer, and a number for each prompt.
    """
    rows, following = [], []
    for prompt, made in zip(tokens_by_prompt(tokens, images), by_prompt(new_tokens, images), strict=True):
        parts = [count for image in made for count in image]
        index, behind = prompt.patch_index[0], prompt.patches + sum(parts)
        none = index < 0
        rows.append(torch.where(none, behind + none.cumsum(0) - 1, index))
        following.append(behind + len(parts))
    return pad_sequence(rows, batch_first=True), following


def stage_of_encoder(layer: int, tokens: Sequence[VisualTokens], images: Sequence[int]) -> Selection:
    """What an encoder method made of the images as a stage of the prompts, a row for each."""
    kept, scores, into = [], [], []
    for prompt in tokens_by_prompt(tokens, images):
        index = prompt.patch_index[0]
        kept.append(index[(index >= 0) & (index < prompt.patches)].sort().values)
        scores.append(prompt.scores[0])
        merged = index[:0] if prompt.merged is None else prompt.merged[0]
        into.append(torch.where(merged < 0, merged, merged + prompt.patches))
    merges = tokens[0].merged is not None
    return Selection(
        layer,
        pad_sequence(kept, batch_first=True, padding_value=-1),
        pad_sequence(scores, batch_first=True, padding_value=-torch.inf),
        pad_sequence(into, batch_first=True, padding_value=-1) if merges else None,
    )
