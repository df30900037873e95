"""POPE's questions as a dataset, from any of its sources, whole or in part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import datasets

from llava_sparse.reference import SCENES

from .data_checks import FEATURES, SPLITS, PictureChecks, Report, Row, checked, refuse, show
from .sources import HUB_DATASET, Source, from_annotations, from_hub, from_path

__all__ = ["FEATURES", "HUB_DATASET", "SPLITS", "load_pope"]

# LLaVA's scripts score an older version of the random split, which does not have these questions (all of them are about
# absent objects; docs/data.md says how they were found). The digest is that of their images and texts.
DROPPED_BY_LLAVA = """
    18 40 62 70 72 76 104 114 126 180 192 234 250 272 276 332 366 372 498 502 520 560 570 574 632 664 718 722 724
    820 868 922 958 1004 1014 1060 1144 1194 1248 1264 1318 1342 1398 1406 1472 1474 1508 1538 1630 1642 1660 1704
    1718 1794 1818 1866 1888 1932 1942 1944 1968 2010 2028 2126 2130 2154 2216 2222 2256 2262 2322 2358 2412 2450
    2474 2558 2616 2658 2688 2698 2746 2778 2786 2828 2844 2854 2880 2884 2912 2988
"""
DROPPED_DIGEST = "9a41ca4e50fb7dc7df31b69fff2229d3a2f4b82fdeaa5bbd9aff4dd6f8e8f80b"

# question_id -> answer, by split, in the order of the rows.
Labels = dict[str, dict[str, str]]


def load_pope(
    source: str | Path = "reference",
    limit: int | None = None,
    *,
    config: str | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    split: str | Sequence[str] | None = None,
    ids: str | Path | None = None,
    variant: str | None = None,
    streaming: bool = False,
    on_bad: Report | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads POPE's questions.

    Args:
        source: `"reference"` (the embedded scenes), `"lmms-lab/POPE"` (from the Hub), a parquet file, or a folder: with
            `images/` and the official `*_pope_random.json`, `*_pope_popular.json`, `*_pope_adversarial.json`; with
            `metadata.jsonl` or `metadata.csv`; with parquet files; or written by `save_to_disk`.
        limit: questions per split, spread evenly over the file and over both labels; None or more than there are: all.
        config: of the dataset on the Hub: `"default"` or `"Full"`.
        annotations, images: instead of `source`, a folder with the official question files, and one with the pictures.
        split: one or several of `SPLITS`; None for all.
        ids: a text file with the ids of questions, one a line: `random/12`, `random 12`, or `12` for the questions of
            that id in all splits that are loaded.
        variant: `"8910"` for the questions that LLaVA's scripts score: without 90 of the random split.
        streaming: whether rows are read, and checked, as they are drawn.
        on_bad: called with the message of every invalid row, once, which is then left out; None: it is an error.

    Returns:
        Questions with columns question_id, question, answer ("yes" or "no"), image_source, image (decoded when it is
        accessed) and category (the split), in the order of `SPLITS`. Of several subsets, variant comes first, then
        ids, then limit.

    Raises:
        ValueError: for invalid data, naming file and row; for a split that nothing is left of; for ids that are not
            found; for invalid arguments. When streaming, invalid rows raise it as they are drawn.
        FileNotFoundError: if a folder or file does not exist.
        ConnectionError: if the Hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: a positive number of questions per split is allowed.")
    splits = _splits(split)
    opened = _open(source, config, annotations, images, splits, streaming)
    questions = _Questions(opened, splits, refuse if on_bad is None else _ReportOnce(on_bad))
    if (limit, ids, variant) != (None, None, None):
        labels = questions.labels()
        if variant is not None:
            _drop_from(labels, variant, questions)
        if ids is not None:
            labels = _with_ids(labels, Path(ids))
        questions.chosen = {name: _first(answers, limit) for name, answers in labels.items()}
        empty = [name for name in splits if not questions.chosen[name]]
        if split is not None and empty:
            raise ValueError(f"{ids}: there are no ids of the split {empty[0]}, which was asked for.")
    if streaming:
        return datasets.IterableDataset.from_generator(questions.examples, features=FEATURES)
    return opened.collect(questions.rows())


def _splits(split: str | Sequence[str] | None) -> list[str]:
    asked = SPLITS if split is None else [split] if isinstance(split, str) else list(split)
    unknown = [name for name in asked if name not in SPLITS]
    if unknown or not asked:
        raise ValueError(f"split={split!r}: one or several of {', '.join(SPLITS)} are allowed.")
    return [name for name in SPLITS if name in asked]


def _open(
    source: str | Path,
    config: str | None,
    annotations: str | Path | None,
    images: str | Path | None,
    splits: Sequence[str],
    streaming: bool,
) -> Source:
    if config is not None and (source != HUB_DATASET or annotations is not None):
        raise ValueError(f"config={config!r}: only {HUB_DATASET} has configurations.")
    if annotations is None and images is None:
        if source == HUB_DATASET:
            return from_hub(config, splits, streaming)
        return from_path(SCENES if source == "reference" else Path(source), splits, streaming)
    if annotations is None or images is None:
        raise ValueError("annotations and images: both folders are needed, or neither.")
    if source != "reference":
        raise ValueError(f"annotations={str(annotations)!r} and source={str(source)!r}: one of the two is allowed.")
    for folder in (annotations, images):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder.")
    return from_annotations(Path(annotations), Path(images).resolve(), splits)


class _ReportOnce:
    """Reports every message once, however often the rows are read."""

    def __init__(self, on_bad: Report) -> None:
        self._on_bad, self._seen = on_bad, set[str]()

    def __call__(self, message: str) -> None:
        if message not in self._seen:
            self._seen.add(message)
            self._on_bad(message)


@dataclass
class _Questions:
    """The valid questions of a source.

    Attributes:
        chosen: ids by split; None for all.
    """

    source: Source
    splits: list[str]
    report: Report
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
        return checked(self.source.rows(split, self.report), self.report)

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


def _first(answers: dict[str, str], limit: int | None) -> set[str]:
    """The ids of `limit` questions, of all if it is None."""
    if limit is None:
        return set(answers)
    ids = list(answers)
    return {ids[row] for row in _spread(list(answers.values()), limit)}


def _spread(labels: list[str], limit: int) -> list[int]:
    """`limit` positions, half of each label as far as there are so many, evenly spread; ascending."""
    yes = [i for i, label in enumerate(labels) if label == "yes"]
    no = [i for i, label in enumerate(labels) if label == "no"]
    limit = min(limit, len(labels))
    n_yes = min(len(yes), max((limit + 1) // 2, limit - len(no)))
    return sorted(rows[k * len(rows) // n] for rows, n in ((yes, n_yes), (no, limit - n_yes)) for k in range(n))


def _with_ids(labels: Labels, file: Path) -> Labels:
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
        listed = re.fullmatch(rf"(?:({'|'.join(SPLITS)})[/\s]\s*)?(.+)", line.strip())
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


def _drop_from(labels: Labels, variant: str, questions: _Questions) -> None:
    """Drops from the official questions what a variant leaves out.

    Raises:
        ValueError: for an unknown variant, and if the random split is not loaded or not the official one.
    """
    if variant != "8910":
        raise ValueError(f"variant={variant!r}: '8910' is allowed.")
    if "random" not in labels:
        raise ValueError("variant='8910' drops questions of the split random, which is not loaded.")
    dropped = DROPPED_BY_LLAVA.split()
    told: dict[str, str] = {}
    for row in questions.valid_texts("random"):
        if row.values["question_id"] in dropped:
            image = PurePath(row.values["image_source"]).stem
            told[row.values["question_id"]] = f"{image}\t{row.values['question']}\n"
    if hashlib.sha256("".join(told.get(key, "") for key in dropped).encode()).hexdigest() != DROPPED_DIGEST:
        raise ValueError(
            f"{questions.source.name('random')}: variant='8910' is known for the official questions about COCO only; "
            "these are others. List the wanted ones in a file (ids)."
        )
    for key in dropped:
        del labels["random"][key]
