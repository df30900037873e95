"""Answers on disk as they come: an append-only file of JSON lines, from which a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

FORMAT = "llava-sparse answers 1"
# What every log begins with.
_START = b'{"format": "llava-sparse answers '
# What a line answers: the run's name, the image and the question.
Key = tuple[str, str, str]


def log_path(output: Path) -> Path:
    """The log beside a results file: `run.json`, `run.answers.jsonl`."""
    return output.with_name(output.name.removesuffix(".json") + ".answers.jsonl")


class AnswerLog:
    """The answers of an evaluation.

    The lines have one order that the settings determine, and whole units (batches that are answered together) alone
    count: what a run that was killed left of an unfinished one is cut off and answered again, so that a file that was
    continued has the same bytes as one written at a stretch.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], versions: dict[str, str]) -> None:
        """Opens a log, or starts it; without a path, answers are kept in memory alone.

        Raises:
            ValueError: if the file is of other settings or versions, naming them, or no log.
            OSError: if it cannot be written, or another process is writing it.
        """
        self.path = path
        self.lines: dict[Key, dict[str, Any]] = {}
        self._header = {"format": FORMAT, "settings": settings, "versions": versions}
        self._file: Any = None
        self._found: list[tuple[dict[str, Any], int]] = []
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
        self._file = open(path, "a+b")  # noqa: SIM115 (open as long as the log)
        try:
            self._read()
        except ValueError:
            self.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        start = 0
        for number, raw in enumerate(self._file):
            if not raw.endswith(b"\n"):
                # A line that was being written when the process was killed.
                if number == 0 and not raw.startswith(_START[: len(raw)]):
                    raise ValueError(f"{self.path}: not a log of answers; choose another --output.")
                break
            start += len(raw)
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number + 1}: not a log of answers; choose another file."
                ) from error
            if number == 0:
                self._compare(line)
            self._found.append((line, start))
        if not self._found:
            self._file.truncate(0)
            self._append(json.dumps(self._header, ensure_ascii=False) + "\n")

    def _compare(self, header: Any) -> None:
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"{self.path}: not a log of answers of this version; choose another --output.")
        wanted = json.loads(json.dumps(self._header))
        for part in ("settings", "versions"):
            old, new = header[part], wanted[part]
            for name in [*new, *(name for name in old if name not in new)]:
                if old.get(name) != new.get(name):
                    raise ValueError(
                        f"{self.path} was begun with {name}={old.get(name)!r}, now it is {new.get(name)!r}: answers "
                        "would be mixed. Choose another --output, go on with the old settings, or delete the file."
                    )

    def resume(self, units: Iterable[Sequence[Key]]) -> int:
        """Takes over the answers of whole units that the file has; call once, with all units in order.

        Returns:
            how many units are answered already.

        Raises:
            ValueError: if a line is not the one that its place is for.
        """
        if self._file is None:
            return 0
        lines = self._found[1:]
        end = self._found[0][1] if self._found else self._file.seek(0, os.SEEK_END)
        done = taken = 0
        for unit in units:
            part = lines[taken : taken + len(unit)]
            for key, (line, _) in zip(unit, part, strict=False):
                if not isinstance(line, dict) or tuple(map(line.get, ("run", "image", "question"))) != key:
                    raise ValueError(
                        f"{self.path}: an answer to {key} is expected where {line} stands; delete the file."
                    )
            if len(part) < len(unit):
                break
            self.lines.update(zip(unit, (line for line, _ in part), strict=True))
            taken, done, end = taken + len(unit), done + 1, part[-1][1] if part else end
        self._file.truncate(end)
        self._found = []
        return done

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        """Appends the answers of a unit; they survive the process from then on."""
        for line in answers:
            self.lines[line["run"], line["image"], line["question"]] = line
        self._append("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answers))

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
