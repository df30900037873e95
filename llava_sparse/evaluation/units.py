"""Questions in the order in which they are asked, and the pictures they are about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets

from llava_sparse.pictures import read_picture

# An image and a question about it.
Pair = tuple[str, str]
# Pairs that are answered together.
Unit = list[Pair]


def read_rows(dataset: datasets.Dataset | datasets.IterableDataset) -> list[dict[str, Any]]:
    """All questions, without their pictures."""
    return list(dataset.remove_columns("image"))


def pictures_digest(dataset: datasets.Dataset | datasets.IterableDataset, rows: Sequence[dict[str, Any]]) -> str:
    """A digest of the stored pictures: pictures that were exchanged under the same names have other answers."""
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    if isinstance(undecoded, datasets.Dataset):
        undecoded = undecoded.select(sorted(_first_rows(rows).values()))
    found: dict[str, str] = {}
    for row in undecoded:
        if row["image_source"] not in found:
            image = row["image"]
            content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            found[row["image_source"]] = hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _first_rows(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The first row of each picture."""
    return {row["image_source"]: number for number, row in reversed(list(enumerate(rows)))}


def plan_units(rows: Sequence[dict[str, Any]], batch_size: int, streamed: bool = False) -> list[Unit]:
    """Distinct pairs, those about one picture together, in units of whole pictures.

    A unit has `batch_size` questions at most, unless a single picture has more.

    Args:
        streamed: whether pictures come in the order of the rows, and only once: a picture that comes back later
            then begins another unit.
    """
    pairs = list(dict.fromkeys((row["image_source"], row["question"]) for row in rows))
    if not streamed:
        pairs.sort(key=lambda pair: pair[0])
    units: list[Unit] = []
    for _, group in groupby(pairs, key=lambda pair: pair[0]):
        about = list(group)
        if units and len(units[-1]) + len(about) <= batch_size:
            units[-1] += about
        else:
            units.append(about)
    return units


class Pictures:
    """The pictures of a dataset, by the name of their source."""

    def __init__(self, dataset: datasets.Dataset | datasets.IterableDataset, rows: Sequence[dict[str, Any]]) -> None:
        self._dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self._row_of = _first_rows(rows)
        self._stream: Iterator[dict[str, Any]] | None = None

    def of(self, unit: Unit) -> dict[str, Any]:
        """The unit's pictures in RGB, as large as they are stored; from a stream, units must come in order.

        Raises:
            ValueError: if one cannot be read, naming it.
        """
        return {source: self._rgb(source) for source in dict.fromkeys(source for source, _ in unit)}

    def _rgb(self, source: str) -> Any:
        stored = self._row(source)["image"] or {"bytes": b""}
        return read_picture(stored["path"] if stored["bytes"] is None else stored["bytes"], f"image {source!r}")

    def _row(self, source: str) -> dict[str, Any]:
        if isinstance(self._dataset, datasets.Dataset):
            return self._dataset[self._row_of[source]]
        if self._stream is None:
            self._stream = iter(self._dataset)
        return next(row for row in self._stream if row["image_source"] == source)
