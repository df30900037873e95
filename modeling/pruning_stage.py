"""One pruning stage between decoder layers: which tokens go, what becomes of them, where the others then are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils.import_utils import is_torchdynamo_compiling

from .pruning_cache import ShortenedPrompt, remember, trim
from .pruning_ops import autocast_disabled, cluster_mean, ranked, rows_at
from .pruning_sequence import (
    MERGED,
    PADDING,
    Compaction,
    PromptLayout,
    VisualGroup,
    compact_positions,
    plan_compaction,
    visual_groups,
)


@dataclass
class Prompt:
    """The prompt as the layers now see it; replaced after every pruning layer.

    Attributes:
        lengths: per row, tokens without padding before the first layer; gone: how many of them have left since.
        earlier: for every run of layers before, `(batch, length)` int64 columns that the tokens had there, negative for
            none, and `(batch, 1)` the position behind the last one.
    """

    valid: Tensor | None
    lengths: list[int]
    gone: list[int]
    position_ids: Tensor
    columns: Tensor
    last: Tensor
    groups: list[VisualGroup]
    rater_columns: Tensor
    raters: Tensor
    fingerprints: Tensor
    earlier: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def to(self, device: torch.device) -> Prompt:
        """The prompt where a layer of a model that is spread over devices has left its output."""
        if self.columns.device == device:
            return self
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if torch.is_tensor(getattr(self, f.name))
        }
        earlier = [(columns.to(device), position.to(device)) for columns, position in self.earlier]
        return replace(self, **moved, groups=[group.to(device) for group in self.groups], earlier=earlier)

    def rating_rows(self, visual: bool) -> RatingRows:
        """The text that may rate at the next pruning layer, behind the visual tokens where these rate too."""
        # Text in front of the image looks at all of it, as if it stood right behind.
        text = RatingRows(self.rater_columns, self.raters, torch.maximum(self.rater_columns, self.last[:, None]))
        if not visual:
            return text
        most = max([0] + [group.columns.shape[1] for group in self.groups])
        columns = self.columns.new_zeros(self.columns.shape[0], most)
        rates = torch.zeros_like(columns, dtype=torch.bool)
        for group in self.groups:
            padding = (0, most - group.columns.shape[1])
            columns = group.put(columns, nn.functional.pad(group.columns, padding))
            rates = group.put(rates, nn.functional.pad(torch.ones_like(group.columns, dtype=torch.bool), padding))
        return RatingRows(
            torch.cat([columns, text.columns], dim=1),
            torch.cat([rates, text.rates], dim=1),
            torch.cat([columns, text.horizon], dim=1),
        )


@dataclass
class RatingRows:
    """The rows of attention that a pruning layer is asked for, each `(batch, rows)`.

    Attributes:
        columns: int64, where they are in the prompt; rates: bool, false for padding and for text that does not rate.
        horizon: int64, the last column that a row looks at.
    """

    columns: Tensor
    rates: Tensor
    horizon: Tensor

    def blocks(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` rows."""
        return (slice(start, start + size) for start in range(0, self.columns.shape[1], size))


@dataclass
class Reduction:
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


@dataclass(frozen=True)
class DecoderPruning:
    """What a decoder is told of the visual tokens of a prompt, and of what to do with them.

    Attributes:
        method: a `DecoderSparsifier`; layout: where the visual tokens are.
        images: of each prompt, by which the method's budgets count.
        budgets: of each prompt, where its items are of several sizes, and budgets are of them together; else None.
        numbers: what the visual tokens are, where an encoder method has chosen them: see `visual_groups`.
        fingerprints: `(batch,)` int64, what the method draws from; None for nothing.
        output_selection: whether the stages are recorded.
        gathered: whether tokens keep their positions, whatever the method does elsewhere.
    """

    method: Any
    layout: PromptLayout
    images: Sequence[int]
    numbers: tuple[Tensor, Sequence[int]] | None = None
    fingerprints: Tensor | None = None
    output_selection: bool = False
    budgets: Sequence[tuple[int, ...]] | None = None
    gathered: bool = False

    @property
    def positions(self) -> str:
        """What becomes of position ids, as of `DecoderSparsifier`."""
        return "original" if self.gathered else str(self.method.positions)

    def counts(self, stage: int, group: VisualGroup, attention: Any) -> list[int]:
        """As `DecoderSparsifier.counts`, of the rows of a group."""
        if group.budgets is None:
            counts: list[int] = self.method.counts(stage, group.images, attention)
            return counts
        return list(replace(self.method, budgets=group.budgets).counts(stage, 1, attention))


def open_prompt(pruning: DecoderPruning, embeds: Tensor, position_ids: Tensor) -> Prompt:
    """Finds the groups and the raters of a prompt before the first layer.

    Args:
        embeds: `(batch, length, channels)`; position_ids: `(batch or 1, length)`, or with axes behind.
    """
    layout, method, fingerprints = pruning.layout, pruning.method, pruning.fingerprints
    batch, length = layout.visual.shape
    groups = visual_groups(layout, pruning.images, pruning.numbers, pruning.budgets)
    if is_torchdynamo_compiling():
        # A bound that the shape tells: one graph for all prompts of a shape.
        most = max(1, length - min(layout.visual_counts))
    else:
        most = max([1] + [layout.text_counts[row] for group in groups for row in group.rows])
    rater_columns = (~layout.text).int().argsort(dim=1, stable=True)[:, :most]
    text_valid = layout.text.gather(1, rater_columns)
    raters = torch.zeros_like(text_valid)
    with torch.no_grad(), autocast_disabled(embeds):
        text = rows_at(embeds, rater_columns)
        for group in groups:
            visual = rows_at(group.take(embeds), group.columns)
            raters = group.put(raters, method.rate(visual, group.take(text), group.take(text_valid)))
    return Prompt(
        valid=layout.valid,
        lengths=layout.lengths,
        gone=[0] * batch,
        position_ids=position_ids.expand(batch, *position_ids.shape[1:]),
        columns=torch.arange(length, device=embeds.device).expand(batch, -1),
        last=layout.last,
        groups=groups,
        rater_columns=rater_columns,
        raters=raters,
        fingerprints=torch.zeros_like(layout.last) if fingerprints is None else fingerprints.to(embeds.device),
    )


def reduce_group(
    method: Any, layer: int, group: VisualGroup, scores: Tensor, count: int, hidden: Tensor, position_ids: Tensor
) -> Reduction:
    """Keeps the `count` best tokens of each row of a group and merges the others if the method does."""
    order = ranked(scores)
    kept, dropped = order[:, :count].sort(dim=-1).values, order[:, count:]
    if dropped.shape[1] == 0:
        return Reduction(group, scores, kept, None, None, None)
    columns = group.columns.gather(1, dropped)
    with autocast_disabled(hidden):
        outcome = method.merge(layer, rows_at(group.take(hidden), columns))
    if outcome is None:
        return Reduction(group, scores, kept, None, None, None)
    merged, assignment = outcome
    # Halves round up: padding, which shifts all positions of a row, must not change where a mean falls.
    positions = rows_at(group.take(position_ids), columns).double()
    mean_position = cluster_mean(positions.view(*columns.shape, -1), assignment, merged.shape[1], epsilon=0.0)
    mean_position = mean_position.add(0.5).floor().long().view(*merged.shape[:2], *position_ids.shape[2:])
    into = torch.full_like(order, -1).scatter(1, dropped, assignment)
    return Reduction(group, scores, kept, merged, mean_position, into)


def apply_reductions(
    reductions: Sequence[Reduction], hidden: Tensor, prompt: Prompt, positions: str
) -> tuple[Tensor, Prompt]:
    """Compacts the batch after a stage: `hidden` `(batch, length, channels)` and all that goes with it."""
    batch, length, _ = hidden.shape
    plan, merged, merged_positions = _plan(reductions, hidden, prompt)
    groups = [_next_group(r, plan.destination, plan.inserted) for r in reductions]
    last = prompt.last
    for group in groups:
        last = group.put(last, group.columns[:, -1] if group.columns.shape[1] else group.take(last) * 0 - 1)
    if positions == "original":
        position_ids = plan.apply(prompt.position_ids, merged_positions)
    else:
        position_ids = compact_positions(plan.valid, plan.source)
    no_column = None if merged is None else prompt.columns.new_full(merged.shape[:2], MERGED)
    columns = plan.apply(prompt.columns, no_column)
    if plan.valid is not None:
        columns = columns.masked_fill(~plan.valid, PADDING)
    hidden = plan.apply(hidden, merged)
    here = torch.arange(length, device=hidden.device).expand(batch, -1)
    runs = [*prompt.earlier, (here, prompt.position_ids.flatten(1).amax(1, keepdim=True) + 1)]
    return hidden, replace(
        prompt,
        valid=plan.valid,
        gone=[gone + less for gone, less in zip(prompt.gone, plan.less, strict=True)],
        position_ids=position_ids,
        columns=columns,
        last=last,
        groups=groups,
        rater_columns=plan.destination.gather(1, prompt.rater_columns).clamp(0, hidden.shape[1] - 1),
        earlier=[(plan.apply(column, no_column), position) for column, position in runs],
    )


def _plan(
    reductions: Sequence[Reduction], hidden: Tensor, prompt: Prompt
) -> tuple[Compaction, Tensor | None, Tensor | None]:
    """Which columns stay, and the merged tokens that come in with their positions: None where there are none."""
    batch, length, channels = hidden.shape
    keep = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    most = max([0] + [r.merged_count for r in reductions])
    merged = hidden.new_zeros(batch, most, channels)
    positions = prompt.position_ids.new_zeros(batch, most, *prompt.position_ids.shape[2:])
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
            padding = (*[0] * 2 * (positions.dim() - 2), 0, missing)
            positions = group.put(positions, nn.functional.pad(r.merged_positions, padding))
    plan = plan_compaction(keep, removed, prompt.valid, (prompt.lengths, prompt.gone), inserted, prompt.last)
    return (plan, merged, positions) if most else (plan, None, None)


def trim_cache(cache: Cache, layers: Sequence[int], prompt: Prompt, length: int, positions: str) -> None:
    """Drops the pruned tokens of a prompt from the cache of the layers up to the last pruning layer too.

    All layers then hold as many tokens of it, those that were merged later being hidden slots.

    Args:
        layers: the pruning layers; length: of the prompt as the caller counts.
    """
    starts = [0, *(layer + 1 for layer in layers)]
    held = prompt.columns.shape[1]
    valid = torch.ones_like(prompt.columns, dtype=torch.bool) if prompt.valid is None else prompt.valid
    for first, end, (columns, position) in zip(starts, starts[1:], prompt.earlier, strict=False):
        there = (columns >= 0) & valid
        # Layer 0 is asked in the caller's terms, and the others in those of layer 0.
        shortened = ShortenedPrompt(there, held, length if first == 0 else held, positions, position)
        trim(cache, range(first, end), columns, there, shortened)
    last = starts[-1]
    if last < len(cache.layers):
        remember(cache, last, ShortenedPrompt(prompt.valid, held, held, positions))


def _next_group(r: Reduction, destination: Tensor, inserted: Tensor | None) -> VisualGroup:
    """The group after its reduction: where its visual tokens now are."""
    group = r.group
    columns = group.take(destination).gather(1, group.columns.gather(1, r.kept))
    numbers = group.numbers.gather(1, r.kept)
    if r.merged_count and inserted is not None:
        new = group.next_number + torch.arange(r.merged_count, device=columns.device)
        columns = torch.cat([columns, group.take(inserted)[:, : r.merged_count]], dim=1)
        numbers = torch.cat([numbers, new.expand(len(group.rows), -1)], dim=1)
    return replace(group, columns=columns, numbers=numbers, next_number=group.next_number + r.merged_count)
