"""What makes a question and its picture valid. Whatever is not is reported with file and row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from llava_sparse.evaluation.files import Report, is_text, show
from llava_sparse.pictures import read_picture

# Stands for the image in a prompt, whatever a tokenizer calls it.
IMAGE_TOKEN = "<image>"
# The columns that every source of questions is brought to.
FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "image_source": datasets.Value("string"),
        "image": datasets.Image(),
        "category": datasets.Value("string"),
    }
)
TEXTS = [column for column in FEATURES if column != "image"]


class Row(NamedTuple):
    """A question as a source holds it.

    Attributes:
        where: `file, row 3`.
        values: the columns `TEXTS`, unchecked.
        image: what leads the source to the picture.
    """

    where: str
    values: dict[str, Any]
    image: Any


def checked(rows: Iterable[Row], labels: Sequence[str], report: Report) -> Iterator[Row]:
    """Passes the valid questions of one split on, and reports the others, ids that repeat included.

    Args:
        labels: that are allowed.
    """
    first: dict[str, str] = {}
    for row in rows:
        problem = _problem(row.values, labels)
        key = row.values["question_id"]
        if not problem and key in first:
            problem = f"question_id {key:.120} is already that of {first[key]}; each id is allowed once in a split"
        if problem:
            report(f"{row.where}: {problem}.")
            continue
        first[key] = row.where
        yield row


def _problem(values: dict[str, Any], labels: Sequence[str]) -> str | None:
    for column in ("question_id", "question", "image_source"):
        if not is_text(values[column]):
            return f"{column} {show(values[column])}: text that is not empty is allowed"
    if IMAGE_TOKEN in values["question"]:
        return f"question {show(values['question'])}: text without {IMAGE_TOKEN}, which stands for pictures, is allowed"
    if values["answer"] not in labels:
        return f"label {show(values['answer'])} is neither of the allowed {' and '.join(map(repr, labels))}"
    return None


def file_inside(folder: Path, name: Any) -> Path:
    """The file of a picture, which lies inside a folder, links followed.

    Args:
        folder: without links.
        name: relative to it.

    Raises:
        ValueError: if it is no name, leaves the folder, or does not exist.
    """
    if not is_text(name):
        raise ValueError(f"image {show(name)}: text that is not empty is allowed.")
    try:
        file = (folder / name).resolve()
        inside = file.is_relative_to(folder)
        exists = inside and file.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"image {show(name)} is no file name that is allowed ({reason}).") from error
    if not inside:
        raise ValueError(f"image {show(name)} leaves {folder}; only files inside it are allowed.")
    if not exists:
        raise ValueError(f"image {show(name)} does not exist in {folder}.")
    return file


class PictureChecks:
    """Checks pictures, decoding each distinct one once."""

    def __init__(self) -> None:
        self._verdicts: dict[Path | bytes, bytes | str] = {}
        self._sources: dict[str, bytes] = {}

    def check(self, source: str, picture: Path | bytes) -> None:
        """Checks that a picture can be decoded and is the only one of its name.

        Args:
            source: the name under which questions about it are grouped.
            picture: its file, or the content of it.

        Raises:
            ValueError: if `read_picture` refuses it, or it is another picture than an earlier one of that name.
        """
        key = hashlib.sha256(picture).digest() if isinstance(picture, bytes) else picture
        if key not in self._verdicts:
            try:
                shown = read_picture(picture, "")
                self._verdicts[key] = hashlib.sha256(repr(shown.size).encode() + shown.tobytes()).digest()
            except ValueError as error:
                self._verdicts[key] = str(error)
        verdict = self._verdicts[key]
        if isinstance(verdict, str):
            raise ValueError(f"image {show(source)}{verdict}")
        if self._sources.setdefault(source, verdict) != verdict:
            raise ValueError(f"image_source {show(source)} is another picture in an earlier row; one is allowed.")


def stored(picture: Path | bytes) -> dict[str, Any]:
    """A picture as the columns of `datasets` hold it, undecoded."""
    embedded = isinstance(picture, bytes)
    return {"bytes": picture if embedded else None, "path": None if embedded else str(picture)}
