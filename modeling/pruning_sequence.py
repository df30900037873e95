"""Where the visual tokens of a batch of prompts lie, and how a batch is compacted when some of them leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pruning_ops import rows_at

# In tensors that map tokens to the caller's columns: a token made by merging, and a column of padding.
MERGED, PADDING = -1, -2


@dataclass(frozen=True)
class PromptLayout:
    """Visual tokens and padding of a batch of prompts, with the counts that shapes depend on already on the host.

    Attributes:
        visual: `(batch, length)` bool.
        valid: `(batch, length)` bool, false for padding; None without padding.
        visual_counts, text_counts, lengths: per row: visual tokens, text tokens that may rate, tokens without padding.
        text: `(batch, length)` bool, the text that may rate: after the last visual token, else all text; of the prompt.
        last: `(batch,)` int64, column of the last visual token, -1 without one.
        answer: `(batch, length)` bool, the tokens behind the prompt, and answer_counts, how many each row has.
    """

    visual: Tensor
    valid: Tensor | None
    visual_counts: list[int]
    text_counts: list[int]
    lengths: list[int]
    text: Tensor
    last: Tensor
    answer: Tensor
    answer_counts: list[int]

    @classmethod
    def of(
        cls,
        visual: Tensor,
        attention_mask: Tensor | None,
        prompt_length: int | Tensor | None = None,
        counts: list[int] | None = None,
    ) -> PromptLayout:
        """Reads the layout from masks `(batch, length)`; the one transfer to the host of a prefill.

        Args:
            prompt_length: columns of each prompt, `(batch,)` int64 or one number; None where whole rows are prompts.
            counts: of visual tokens, where nothing can be read; the device compares them with what is there, and the
                text is not counted.

        Raises:
            ValueError: for a prompt that ends in front of its last visual token, or is longer than the row.
        """
        visual = visual.bool()
        valid = torch.ones_like(visual) if attention_mask is None else attention_mask.bool()
        visual = visual & valid
        columns = torch.arange(visual.shape[1], device=visual.device)
        last = torch.where(visual, columns, -1).amax(-1)
        ends = _ends_of(prompt_length, last, len(columns))
        text = valid & ~visual & (columns < ends[:, None])
        after = text & (columns > last[:, None])
        text = torch.where(after.any(-1, keepdim=True), after, text)
        answer = valid & (columns >= ends[:, None])
        if counts is not None:
            none, whole = [0] * len(counts), [len(columns)] * len(counts)
            valid_mask = None if attention_mask is None else valid
            said = on_device(counts, visual.device)
            torch._assert_async((visual.sum(-1) == said).all(), f"Prompts of {counts} image tokens are expected.")
            return cls(visual, valid_mask, counts, none, whole, text, last, answer, none)
        refused = (ends <= last) | (ends < 1) | (ends > len(columns))
        parts = (visual, text, valid, answer, refused[:, None])
        visual_counts, text_counts, lengths, answer_counts, wrong = torch.stack([x.sum(-1) for x in parts]).tolist()
        if prompt_length is not None and any(wrong):
            row = wrong.index(1)
            raise ValueError(
                f"prompt_length: prompt {row} is said to have {int(ends[row])} columns. They are those of input_ids as "
                f"passed, padding on the left included: {max(1, int(last[row]) + 1)}, with which its last image is "
                f"through, to {len(columns)} are allowed."
            )
        padded = min(lengths) < visual.shape[1]
        valid_mask = valid if padded else None
        return cls(visual, valid_mask, visual_counts, text_counts, lengths, text, last, answer, answer_counts)

    def moved(self, plan: Compaction, answers: bool = False) -> PromptLayout:
        """The layout after a compaction that drops visual tokens, or else all answers, and inserts none."""
        there = True if plan.valid is None else plan.valid
        visual = plan.apply(self.visual) & there
        columns = torch.arange(visual.shape[1], device=visual.device)
        counts, lengths = (
            [n - less for n, less in zip(values, plan.less, strict=True)]
            for values in (self.visual_counts, self.lengths)
        )
        counts, answer_counts = (self.visual_counts, [0] * len(counts)) if answers else (counts, self.answer_counts)
        last = torch.where(visual, columns, -1).amax(-1)
        text, answer = plan.apply(self.text) & there, plan.apply(self.answer) & there
        return PromptLayout(visual, plan.valid, counts, self.text_counts, lengths, text, last, answer, answer_counts)


def _ends_of(prompt_length: int | Tensor | None, last: Tensor, length: int) -> Tensor:
    """`(batch,)` int64, the column behind each prompt."""
    if not torch.is_tensor(prompt_length):
        return torch.full_like(last, length if prompt_length is None else prompt_length)
    if prompt_length.shape != last.shape or prompt_length.is_floating_point():
        raise ValueError(
            f"prompt_length must be an int or an int64 tensor of shape ({len(last)},), one number for each prompt, got "
            f"{prompt_length.dtype} of shape {tuple(prompt_length.shape)}."
        )
    return prompt_length.to(last.device, last.dtype)


@dataclass(frozen=True)
class Compaction:
    """A plan for shortening `(batch, length)` sequences, the same for every tensor that has that shape.

    Attributes:
        source: `(batch, new_length)` int64, the old column of each new one; `length + j` is the j-th inserted token.
        destination: `(batch, length)` int64, the new column of each column that stays; undefined for the others.
        inserted: `(batch, c)` int64, the new columns of inserted tokens, or None.
        valid: `(batch, new_length)` bool, false for padding; None without padding.
        less: per row, by how many tokens it gets shorter.
    """

    source: Tensor
    destination: Tensor
    inserted: Tensor | None
    valid: Tensor | None
    less: list[int]

    @property
    def there(self) -> Tensor:
        """`(batch, new_length)` bool, false for padding."""
        return torch.ones_like(self.source, dtype=torch.bool) if self.valid is None else self.valid

    @property
    def columns(self) -> Tensor:
        """`source`, with `PADDING` for padding."""
        return self.source if self.valid is None else self.source.masked_fill(~self.valid, PADDING)

    def apply(self, x: Tensor, inserted: Tensor | None = None) -> Tensor:
        """Compacts `(batch, length, ...)`; `inserted` `(batch, c, ...)` is needed if the plan inserts."""
        if inserted is not None:
            x = torch.cat([x, inserted], dim=1)
        return rows_at(x, self.source)


def of_caller(columns: Tensor, known: Tensor) -> Tensor:
    """Columns `(batch, n)` of a shorter sequence as those of the longer one, which are `known`; negative ones stay."""
    columns = columns.to(known.device)
    return torch.where(columns < 0, columns, known.gather(1, columns.clamp(min=0)))


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host as int64, without waiting for the device."""
    return torch.tensor(values).to(device, non_blocking=True)


def plan_compaction(
    keep: Tensor,
    removed: Sequence[int],
    valid: Tensor | None,
    lengths: tuple[Sequence[int], Sequence[int]],
    inserted: Sequence[int] | None = None,
    insert_after: Tensor | None = None,
) -> Compaction:
    """Plans which columns stay and where they go, order preserved, without reading a tensor's values on the host.

    Rows that all get shorter by the same number keep their padding where it is. Otherwise padding is dropped first and
    shorter rows are padded on the left.

    Args:
        keep: `(batch, length)` bool.
        removed: per row, how many columns are false in `keep`.
        valid: `(batch, length)` bool or None.
        lengths: per row, how many are true, and how many of them had gone already when they were counted. They are read
            where rows shrink differently alone: a compiled graph does not depend on them elsewhere.
        inserted: per row, how many tokens are inserted behind column `insert_after` `(batch,)`; None for none.
    """
    (batch, length), device = keep.shape, keep.device
    added = list(inserted) if inserted is not None else [0] * batch
    net = [r - a for r, a in zip(removed, added, strict=True)]
    ragged = len(set(net)) > 1
    new_lengths = [n - gone - m for n, gone, m in zip(*lengths, net, strict=True)] if ragged else [length - net[0]]
    new_length = max(new_lengths)
    if ragged and valid is not None:
        keep = keep & valid

    columns = torch.arange(length, device=device).expand(batch, -1)
    offset = on_device([new_length - n for n in new_lengths], device)[:, None] if ragged else 0
    destination = keep.cumsum(1) - 1 + offset
    inserted_at = None
    most = max(added)
    if most and insert_after is not None:
        # One number for all rows needs no copy to the device.
        count = on_device(added, device)[:, None] if len(set(added)) > 1 else torch.full((1, 1), most, device=device)
        behind = columns > insert_after[:, None]
        slot = torch.arange(most, device=device)
        inserted_at = (keep & ~behind).sum(1, keepdim=True) + offset + slot
        destination = destination + torch.where(behind, count, 0)
    # Column `new_length` takes what goes nowhere and is cut off.
    source = torch.zeros(batch, new_length + 1, dtype=torch.int64, device=device)
    source = source.scatter(1, torch.where(keep, destination, new_length), columns)
    if inserted_at is not None:
        source = source.scatter(
            1, torch.where(slot < count, inserted_at, new_length), (length + slot).expand(batch, -1)
        )
    source = source[:, :-1]

    if ragged:
        padded = min(new_lengths) < new_length
        new_valid = torch.arange(new_length, device=device) >= offset if padded else None
    elif valid is not None:
        known = valid if not most else torch.cat([valid, valid.new_ones(batch, most)], dim=1)
        new_valid = known.gather(1, source)
    else:
        new_valid = None
    return Compaction(source, destination, inserted_at, new_valid, net)


def compact_positions(valid: Tensor | None, like: Tensor) -> Tensor:
    """Positions 0, 1, ... over the valid tokens of each row, 0 on left padding.

    Args:
        valid: `(batch, length)` bool; None without padding, and then `like` is `(batch, length, ...)`.
    """
    if valid is None:
        return torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)
    return (valid.cumsum(1) - 1).clamp(min=0)


def following_positions(valid: Tensor | None, past: int | Tensor, new: Tensor) -> Tensor:
    """Compact positions of the tokens `new` `(batch, n, ...)` behind `past` held ones.

    Args:
        valid: `(batch, at least past + n)` bool, or None without padding.
        past: a static cache counts it on the device; no shape depends on it then, so that a step can be compiled once.
    """
    columns = (past + torch.arange(new.shape[1], device=new.device)).expand(new.shape[0], -1)
    return columns if valid is None else compact_positions(valid, new).gather(1, columns)


@dataclass(frozen=True)
class VisualGroup:
    """Rows of a batch that hold equally many visual tokens.

    Attributes:
        rows: indices of the rows in the batch.
        index: the same, `(rows,)` int64 on the device, or None for the whole batch.
        images: images per prompt; budgets: of the method, in a row: see `DecoderPruning`.
        columns: `(rows, V)` int64, columns of the visual tokens, ascending.
        numbers: `(rows, V)` int64, their numbers as `Selection` counts them.
        next_number: the number that the next merged token gets.
    """

    rows: list[int]
    index: Tensor | None
    images: int
    columns: Tensor
    numbers: Tensor
    next_number: int
    budgets: tuple[int, ...] | None = None

    def take(self, x: Tensor) -> Tensor:
        """The group's rows of a `(batch, ...)` tensor."""
        return x if self.index is None else x.index_select(0, self.index)

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        """A `(batch, ...)` tensor with the group's rows replaced."""
        return value if self.index is None else x.index_copy(0, self.index, value)

    def to(self, device: torch.device) -> VisualGroup:
        index = None if self.index is None else self.index.to(device)
        return replace(self, index=index, columns=self.columns.to(device), numbers=self.numbers.to(device))

    def subset(self, members: list[int]) -> VisualGroup:
        """The group of some of its members, given by their place in it."""
        if len(members) == len(self.rows):
            return self
        rows = [self.rows[i] for i in members]
        local = on_device(members, self.columns.device)
        index = local if self.index is None else self.index.index_select(0, local)
        columns, numbers = self.columns.index_select(0, local), self.numbers.index_select(0, local)
        return replace(self, rows=rows, index=index, columns=columns, numbers=numbers)


def visual_groups(
    layout: PromptLayout,
    images: Sequence[int],
    numbers: tuple[Tensor, Sequence[int]] | None,
    budgets: Sequence[tuple[int, ...]] | None = None,
) -> list[VisualGroup]:
    """The rows that have visual tokens, grouped by how many, of how many images, and by budgets.

    Args:
        layout: of the prompts; images: of each; budgets: of each, or None where they follow from the images.
        numbers: `(batch, at least V)` of the visual tokens, and the number that follows them in each row; None for
            0, 1, 2, ...
    """
    order = (~layout.visual).int().argsort(dim=1, stable=True)
    following = layout.visual_counts if numbers is None else list(numbers[1])
    own_budgets = [None] * len(following) if budgets is None else budgets
    keys = list(zip(layout.visual_counts, images, following, own_budgets, strict=True))
    groups = []
    for key in sorted({key for key in keys if key[0]}, key=str):
        count = key[0]
        rows = [row for row, other in enumerate(keys) if other == key]
        index = None if len(rows) == len(keys) else on_device(rows, order.device)
        columns = (order if index is None else order.index_select(0, index))[:, :count]
        if numbers is None:
            own = torch.arange(count, device=order.device).expand(len(rows), -1)
        else:
            own = numbers[0].to(order.device)[:, :count]
            own = own if index is None else own.index_select(0, index)
        groups.append(VisualGroup(rows, index, key[1], columns, own, key[2], key[3]))
    return groups
