"""Answers on disk as they come: JSON lines with keys, from which an evaluation that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import Flag, Masks, Number, Text, Tokens, check_regular, parse_json, read_as, same_settings

FORMAT = "llava-sparse answers 2"
# The first version did not say whether answers were cut.
FORMATS = ("llava-sparse answers 1", FORMAT)
# What every log begins with.
_START = b'{"format": "llava-sparse answers '
# What a line answers: the run's name, the image and the question.
Key = tuple[str, str, str]
Line = dict[str, Any]


@dataclass
class _Line:
    """The types of a line."""

    run: Text
    image: Text
    question: Text
    answer: Text
    score: Number = 0.0
    visual_tokens: Tokens = None
    kept: Masks = ()  # type: ignore[assignment]
    cut: Flag = False


def key_of(run: str, pair: tuple[str, str]) -> Key:
    """The key of a run's answer to a pair."""
    return run, *pair


def log_path(output: Path) -> Path:
    """The log beside a results file: `run.json`, `run.answers.jsonl`."""
    return output.with_name(output.name.removesuffix(".json") + ".answers.jsonl")


def read_log(path: str | Path, torn: bool = True) -> tuple[dict[str, Any], dict[Key, Line], int]:
    """A log of answers.

    Args:
        torn: whether a last line counts of which only the end of line is missing.

    Returns:
        the header, the line of each key, and how many bytes whole lines take. The last line may be cut short: an
        answer that is not there.

    Raises:
        ValueError: for another file, invalid lines before the last, and a key with two lines, naming file and line.
        OSError: if it is no regular file, or cannot be read.
    """
    path = Path(path)
    check_regular(path)
    *whole, tail = path.read_bytes().split(b"\n")
    size = sum(map(len, whole)) + len(whole)
    header: dict[str, Any] = {}
    lines: dict[Key, Line] = {}
    for n, raw in enumerate([*whole, tail] if torn else whole, start=1):
        where = f"{path.name}, line {n}"
        try:
            line = parse_json(raw)
        except ValueError as error:
            if n > len(whole):
                break
            raise ValueError(f"{where}: invalid JSON ({error}): not a log of answers.") from error
        if n == 1:
            header = line if isinstance(line, dict) else {}
            if header.get("format") not in FORMATS:
                raise ValueError(f"{where}: no format {FORMAT!r}: not a log of answers of this version.")
            continue
        if not isinstance(line, dict):
            raise ValueError(f"{where}: {type(line).__name__}: not a log of answers; one object a line is allowed.")
        read_as(_Line, line, f"{where}, answer")
        key = line["run"], line["image"], line["question"]
        if key in lines:
            raise ValueError(f"{where}: run {key[0]!r} has another answer to {key[1:]} before.")
        lines[key] = line
    if not header:
        raise ValueError(f"{path.name}: the first line has no format {FORMAT!r}; a log of answers is allowed.")
    return header, lines, size


class AnswerLog:
    """The answers of an evaluation, each written as soon as it is known.

    Attributes:
        lines: those of all keys so far.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], versions: dict[str, str]) -> None:
        """Opens a log, or starts it; without a path, answers are kept in memory alone.

        Raises:
            ValueError: if the file is of other settings or versions, naming them, or no log.
            OSError: if it cannot be written, or another process is writing it.
        """
        self.path = path
        self.lines: dict[Key, Line] = {}
        self._file: Any = None
        if path is None:
            return
        # Not beside the results, where it would have to stay: a lock file that is removed locks nothing.
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        self._lock = FileLock(Path(tempfile.gettempdir()) / f"llava-sparse-{name}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OSError(
                f"{path}: another evaluation is writing it; wait for it, or choose another --output."
            ) from None
        try:
            self._open(path, {"format": FORMAT, "settings": settings, "versions": versions})
        except BaseException:
            self._lock.release()
            raise

    def _open(self, path: Path, header: dict[str, Any]) -> None:
        """Reads what is there, and cuts off the line that was being written when a process was killed."""
        content = path.read_bytes() if path.is_file() else b""
        size = 0
        if b"\n" in content or (content and not content.startswith(_START[: len(content)])):
            try:
                old, self.lines, size = read_log(path, torn=False)
            except ValueError as error:
                raise ValueError(f"{path}: not a log of answers; choose another --output ({error}).") from error
            if old["format"] != FORMAT:
                raise ValueError(f"{path}: not a log of answers of this version; choose another --output.")
            advice = "answers would be mixed. Choose another --output, go on with the old settings, or delete the file."
            same_settings(path, old, {part: header[part] for part in ("settings", "versions")}, advice)
        elif path.exists():
            check_regular(path)
        self._file = open(path, "r+b" if path.exists() else "xb")  # noqa: SIM115 (open as long as the log)
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._append(json.dumps(header, ensure_ascii=False) + "\n")

    def add(self, lines: Sequence[Line]) -> None:
        """Appends answers; they survive the process from then on."""
        new = {(line["run"], line["image"], line["question"]): line for line in lines}
        new = {key: line for key, line in new.items() if key not in self.lines}
        self.lines |= new
        self._append("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new.values()))

    def _append(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text.encode())
            self._file.flush()

    def close(self) -> None:
        """Lets others write."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()  # May have to write, and fail at it.
            finally:
                self._lock.release()
