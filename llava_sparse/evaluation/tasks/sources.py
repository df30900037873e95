"""Where questions come from: text files beside a folder of pictures, or tables with the pictures in them."""

from __future__ import annotations

import csv
import glob
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from llava_sparse.evaluation.files import Report, json_lines, reason, show

from .rows import FEATURES, TEXTS, Row, file_inside, stored

METADATA = {**{column: column for column in TEXTS}, "image": "file_name"}
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
SAVED_FILES = (datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASETDICT_JSON_FILENAME)
Entry = tuple[str, dict[str, Any]]
NamedTable = tuple[str, Any]


class Source(ABC):
    """Questions, and the pictures that they are about.

    Attributes:
        categories: all splits that rows may be of.
    """

    categories: Sequence[str] = ()

    @abstractmethod
    def name(self, split: str) -> str:
        """What holds the questions of a split, for messages."""

    @abstractmethod
    def rows(self, split: str, report: Report) -> Iterator[Row]:
        """The rows of a split, unchecked; what is no row is reported."""

    @abstractmethod
    def picture(self, row: Row) -> Path | bytes:
        """The picture of a row: its file, or the content of it.

        Raises:
            ValueError: if there is none, or none that may be read.
        """

    def of_split(self, split: str, where: str, values: dict[str, Any], image: Any, report: Report) -> Iterator[Row]:
        """The row, if it is of the split; one that is of no split is reported."""
        category = values["category"]
        if category == split:
            number = values["question_id"]
            yield Row(where, {**values, "question_id": str(number) if type(number) is int else number}, image)
        elif category not in self.categories:
            report(f"{where}: category {show(category)}; allowed: {', '.join(self.categories)}.")

    def example(self, row: Row) -> dict[str, Any]:
        """A row in the columns of `FEATURES`, its picture undecoded."""
        return {**row.values, "image": stored(self.picture(row))}

    def collect(self, rows: Iterable[Row]) -> datasets.Dataset:
        """The dataset of rows that were checked, pictures undecoded."""
        examples = [self.example(row) for row in rows]
        return datasets.Dataset.from_list(examples, features=FEATURES).select_columns(list(FEATURES))


class Files(Source):
    """A text file for each split, or the same for all, beside a folder of pictures.

    Args:
        files: of the splits that are loaded.
        keys: for each column, under which key a file holds it; `METADATA` say.
        images: the folder, without links.
        categories: all splits that rows may be of.
    """

    def __init__(self, files: dict[str, Path], keys: dict[str, str], images: Path, categories: Sequence[str]) -> None:
        self.files, self.keys, self.images, self.categories = files, keys, images, categories

    def name(self, split: str) -> str:
        return self.files[split].name

    def rows(self, split: str, report: Report) -> Iterator[Row]:
        file = self.files[split]
        needed = list(dict.fromkeys(self.keys.values()))
        for where, entry in (_read_csv if file.suffix == ".csv" else json_lines)(file, report):
            missing = [key for key in needed if key not in entry]
            if missing:
                report(f"{where}: {missing[0]!r} is missing; an object with {', '.join(needed)} is allowed.")
                continue
            values = {"category": split} | {column: entry[key] for column, key in self.keys.items()}
            yield from self.of_split(split, where, values, values.pop("image"), report)

    def picture(self, row: Row) -> Path:
        return file_inside(self.images, row.image)


class Tables(Source):
    """Tables on disk or in memory, with the pictures in them.

    Args:
        tables: each with its name for messages.
        categories: all splits that rows may be of.
    """

    def __init__(self, tables: Sequence[NamedTable], categories: Sequence[str]) -> None:
        self.categories = categories
        self._sizes = [(name, len(table)) for name, table in tables]
        self._table = datasets.concatenate_datasets([_in_schema(name, table) for name, table in tables])

    def name(self, split: str) -> str:
        return ", ".join(name for name, _ in self._sizes)

    def rows(self, split: str, report: Report) -> Iterator[Row]:
        wheres = (f"{name}, row {number}" for name, size in self._sizes for number in range(1, size + 1))
        texts = self._table.remove_columns("image")
        for index, (where, values) in enumerate(zip(wheres, texts, strict=True)):
            yield from self.of_split(split, where, values, index, report)

    def picture(self, row: Row) -> bytes:
        return _embedded(self._table[row.image]["image"])

    def collect(self, rows: Iterable[Row]) -> datasets.Dataset:
        return self._table.select([row.image for row in rows]).cast_column("image", FEATURES["image"])


class Streams(Source):
    """Tables that are read as they come, with the pictures in them: once for each split.

    Args:
        tables: each with its name for messages.
        categories: all splits that rows may be of.
    """

    def __init__(self, tables: Sequence[NamedTable], categories: Sequence[str]) -> None:
        self.categories = categories
        self._tables = [(name, _in_schema(name, table)) for name, table in tables]

    def name(self, split: str) -> str:
        return ", ".join(name for name, _ in self._tables)

    def rows(self, split: str, report: Report) -> Iterator[Row]:
        for name, table in self._tables:
            for number, values in enumerate(_readable(name, table), start=1):
                yield from self.of_split(split, f"{name}, row {number}", values, values.pop("image"), report)

    def picture(self, row: Row) -> bytes:
        return _embedded(row.image)


def from_path(path: Path, splits: Sequence[str], categories: Sequence[str], streaming: bool, allowed: str) -> Source:
    """The questions in a folder, or in a parquet file.

    Args:
        splits: to load, of all `categories`.
        allowed: words for what a path may be.

    Raises:
        ValueError: for invalid data.
        FileNotFoundError: if there is no such folder or file, or nothing in it that is known.
    """
    if path.is_file():
        return _from_parquet([path], path.parent, categories, streaming)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; {allowed}.")
    if any((path / name).is_file() for name in SAVED_FILES):
        return _from_disk(path, categories)
    metadata = [path / name for name in METADATA_FILES if (path / name).is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{path}: there are both {' and '.join(METADATA_FILES)}; one is allowed.")
    if metadata:
        return Files(dict.fromkeys(splits, metadata[0]), METADATA, path.resolve(), categories)
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{path}: there are no questions in this folder; {allowed}.")
    return _from_parquet(files, path, categories, streaming)


def _from_disk(folder: Path, categories: Sequence[str]) -> Source:
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # what a damaged folder leads the reader to
        raise ValueError(f"{folder}: nothing that save_to_disk has written ({reason(error)}).") from error
    parts = loaded.items() if isinstance(loaded, datasets.DatasetDict) else [("", loaded)]
    for _, part in parts:
        for file in part.cache_files:
            if not Path(file["filename"]).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{folder}: the table {show(file['filename'])} is outside of the folder.")
    return Tables([(f"{folder.name} {name}".strip(), part) for name, part in parts], categories)


def _from_parquet(files: Sequence[Path], folder: Path, categories: Sequence[str], streaming: bool) -> Source:
    tables = []
    for file in files:
        name = str(file.relative_to(folder))
        kind = datasets.IterableDataset if streaming else datasets.Dataset
        try:
            # `datasets` logs what it cannot read, and cannot read what is empty.
            if pyarrow.parquet.read_metadata(file).num_rows:
                tables.append((name, kind.from_parquet(glob.escape(str(file)))))
        except Exception as error:  # what a damaged file leads the reader to
            raise ValueError(f"{name}: no parquet file that can be read ({reason(error)}).") from error
    if not tables:
        raise ValueError(f"{folder}: there are no questions in {len(files)} parquet files.")
    return (Streams if streaming else Tables)(tables, categories)


def _in_schema(name: str, table: Any) -> Any:
    """A table with the columns of `FEATURES`, pictures undecoded."""
    found = table.features or {}
    for column in FEATURES:
        if column not in found:
            raise ValueError(f"{name}: the column {column!r} is missing; needed: {', '.join(FEATURES)}.")
        if not _fits(column, found[column]):
            allowed = "pictures with their bytes are" if column == "image" else "text is"
            raise ValueError(f"{name}: the column {column!r} holds {show(found[column])}; {allowed} allowed.")
    if isinstance(table, datasets.Dataset) and any(found[column] != FEATURES[column] for column in TEXTS):
        # Beside the pictures, which a cast of the whole table would copy.
        texts = table.select_columns(TEXTS).cast(datasets.Features({column: FEATURES[column] for column in TEXTS}))
        table = datasets.concatenate_datasets([texts, table.select_columns(["image"])], axis=1)
    return table.select_columns(list(FEATURES)).cast_column("image", datasets.Image(decode=False))


def _fits(column: str, feature: Any) -> bool:
    if column == "image" and isinstance(feature, (datasets.Image, dict)):
        return isinstance(feature, datasets.Image) or set(feature) == {"bytes", "path"}
    kind = feature.dtype if isinstance(feature, datasets.Value) else ""
    if column == "image":
        return kind in ("binary", "large_binary")
    return kind in ("string", "large_string") or (column == "question_id" and "int" in kind)


def _readable(name: str, table: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from table
    except Exception as error:  # what a damaged file leads the reader to
        raise ValueError(f"{name}: the table cannot be read ({reason(error)}).") from error


def _embedded(image: dict[str, Any] | None) -> bytes:
    content: bytes | None = image["bytes"] if image else None
    if not content:
        # A path could lead anywhere.
        what = f"is the path {show(image['path'])}" if image and image["path"] else "is missing"
        raise ValueError(f"the picture {what}; pictures whose bytes are in the table are allowed.")
    return content


def _read_csv(file: Path, report: Report) -> Iterator[Entry]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for entry in reader:
                where = f"{file.name}, row {reader.line_num}"
                if None in entry:
                    report(f"{where}: there are more cells than columns.")
                else:
                    yield where, entry
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name}: the file is not UTF-8 text ({error.reason}).") from error
        except csv.Error as error:
            raise ValueError(f"{file.name}, after row {reader.line_num}: invalid CSV ({error}).") from error
