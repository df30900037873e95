"""Questions of a source, whole or in part: checked, chosen by ids or a limit, with the pictures they are about."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from llava_sparse.evaluation.files import Report, refuse, show

from .rows import FEATURES, PictureChecks, Row, checked
from .sources import Source

# question_id -> answer, by split, in the order of the rows.
Labels = dict[str, dict[str, str]]


class ReportOnce:
    """Reports every message once, however often the rows are read."""

    def __init__(self, on_bad: Report) -> None:
        self._on_bad, self._seen = on_bad, set[str]()

    def __call__(self, message: str) -> None:
        if message not in self._seen:
            self._seen.add(message)
            self._on_bad(message)


@dataclass
class Questions:
    """The valid questions of a source.

    Attributes:
        splits: to load; allowed: labels.
        report: called with the message of every row that cannot be used.
        chosen: ids by split; None for all.
    """

    source: Source
    splits: list[str]
    allowed: Sequence[str]
    report: Report = refuse
    chosen: dict[str, set[str]] | None = None
    pictures: PictureChecks = field(default_factory=PictureChecks)

    def labels(self) -> Labels:
        """The answers of all questions, whose pictures are not looked at.

        Raises:
            ValueError: if there is none in a split.
        """
        labels = {}
        for split in self.splits:
            labels[split] = {row.values["question_id"]: row.values["answer"] for row in self.valid_texts(split)}
            if not labels[split]:
                self._refuse_empty(split)
        return labels

    def choose(self, labels: Labels, ids: Path | None, limit: int | None) -> None:
        """Chooses the questions that a file of ids lists, and of these as many a split as the limit says."""
        if ids is not None:
            labels = _with_ids(labels, ids, self.source.categories)
        self.chosen = {name: _first(answers, limit, self.allowed) for name, answers in labels.items()}

    def load(self, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
        """The chosen questions with the columns of `FEATURES`; when streaming, read and checked as they are drawn."""
        if streaming:
            return datasets.IterableDataset.from_generator(self.examples, features=FEATURES)
        return self.source.collect(self.rows())

    def rows(self) -> Iterator[Row]:
        """The chosen questions whose pictures are valid, too.

        Raises:
            ValueError: if there is none in a split, unless none of it was chosen.
        """
        for split in self.splits:
            chosen = None if self.chosen is None else self.chosen[split]
            missing = chosen != set()
            for row in self.valid_texts(split):
                if (chosen is None or row.values["question_id"] in chosen) and self._has_picture(row):
                    missing = False
                    yield row
            if missing:
                self._refuse_empty(split)

    def examples(self) -> Iterator[dict[str, Any]]:
        """`rows` in the columns of `FEATURES`, pictures undecoded."""
        for row in self.rows():
            yield self.source.example(row)

    def valid_texts(self, split: str) -> Iterator[Row]:
        """The questions that are valid themselves, in order."""
        return checked(self.source.rows(split, self.report), self.allowed, self.report)

    def _refuse_empty(self, split: str) -> None:
        raise ValueError(
            f"{self.source.name(split)}: there are no questions of the split {split}; at least one is needed."
        )

    def _has_picture(self, row: Row) -> bool:
        try:
            self.pictures.check(row.values["image_source"], self.source.picture(row))
        except ValueError as error:
            self.report(f"{row.where}: {error}")
            return False
        return True


def _first(answers: dict[str, str], limit: int | None, labels: Sequence[str]) -> set[str]:
    """The ids of `limit` questions, of all if it is None; of yes/no questions half of each label, if it can be."""
    if limit is None:
        return set(answers)
    ids = list(answers)
    kinds = list(answers.values()) if len(labels) == 2 else [""] * len(ids)
    return {ids[row] for row in _spread(kinds, limit, labels[0] if len(labels) == 2 else "")}


def _spread(labels: list[str], limit: int, first: str = "yes") -> list[int]:
    """`limit` positions, half of each label as far as there are so many, evenly spread; ascending."""
    yes = [i for i, label in enumerate(labels) if label == first]
    no = [i for i, label in enumerate(labels) if label != first]
    limit = min(limit, len(labels))
    n_yes = min(len(yes), max((limit + 1) // 2, limit - len(no)))
    return sorted(rows[k * len(rows) // n] for rows, n in ((yes, n_yes), (no, limit - n_yes)) for k in range(n))


def _with_ids(labels: Labels, file: Path, categories: Sequence[str]) -> Labels:
    """The labels of the questions that a file lists.

    Raises:
        ValueError: for an id that is not found or is listed twice, and for a file without ids.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: the file is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    found: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start=1):
        listed = re.fullmatch(rf"(?:({'|'.join(categories)})[/\s]\s*)?(.+)", line.strip())
        if listed is None:
            continue
        only, key = listed.groups()
        names = [name for name in labels if key in labels[name] and only in (None, name)]
        where = f"{file.name}, row {number}: question_id {show(key)}"
        if not names:
            raise ValueError(
                f"{where} is not among the valid questions of {f'the split {only}' if only else ', '.join(labels)}"
                f"{'' if only in (None, *labels) else ', which is not loaded'}."
            )
        for name in names:
            if (name, key) in found:
                raise ValueError(f"{where} of the split {name} is listed in row {found[name, key]} already.")
            found[name, key] = number
    if not found:
        raise ValueError(f"{file.name}: there are no ids; one a line is allowed.")
    return {name: {key: answers[key] for key in answers if (name, key) in found} for name, answers in labels.items()}
