"""Files: JSON is read in one way, checked against types, and written in one step, never over what is not ours."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
# Gets the message of every row that is left out; raises it if none may be.
Report = Callable[[str], object]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def refuse(message: str) -> None:
    """Raises ValueError."""
    raise ValueError(message)


def show(value: object) -> str:
    """What a message quotes: the value as Python writes it, shortened."""
    return _short.repr(value)


def is_text(value: object) -> bool:
    """Whether `value` is a string that is not blank and that UTF-8 can express (JSON allows others)."""
    try:
        return isinstance(value, str) and bool(value.strip().encode())
    except UnicodeEncodeError:
        return False


class Check(NamedTuple):
    """What is allowed as a value, in words, and whether a value is that."""

    words: str
    holds: Callable[[Any], bool]


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number within bounds."""
    bounds = "" if low == -math.inf else f" from {low:g}" + ("" if high == math.inf else f" to {high:g}")
    return Check(f"a number{bounds}", lambda x: type(x) in (int, float) and math.isfinite(x) and low <= x <= high)


@dataclass(frozen=True, eq=False)
class Keys:
    """An object: types of its entries by name, none of them needed; "*" stands for all others."""

    types: Mapping[str, Any]


# Types of a file's values; JSON can hold lone surrogates, which UTF-8 cannot.
Text = Annotated[str, Check("text", lambda x: isinstance(x, str) and not re.search("[\ud800-\udfff]", x))]
Count = Annotated[int, Check("a whole number from 0", lambda x: type(x) is int and x >= 0)]
Number = Annotated[float, number()]
Rate = Annotated[float, number(0, 1)]
Signed = Annotated[float, number(-1, 1)]
Tokens = Annotated[float | None, Check("a number from 0 or null", lambda x: x is None or number(0).holds(x))]
Interval = Annotated[
    list[float],
    Check("a list of two numbers", lambda x: isinstance(x, list) and len(x) == 2 and all(map(number().holds, x))),
]
Flag = Annotated[bool, Check("true or false", lambda x: isinstance(x, bool))]
Masks = Annotated[
    list[str],
    Check("a list of masks in hexadecimal", lambda x: isinstance(x, list) and all(map(_is_mask, x))),
]


def _is_mask(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("([0-9a-f]{2})*", value) is not None


class Record(Mapping[str, Any]):
    """Base of dataclasses that are read from files: their fields are items too, as of the JSON object."""

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)  # type: ignore[attr-defined]


def read_as(kind: Any, value: Any, where: str = "") -> Any:
    """A value of a file as a type: `list`, `dict`, a dataclass, an `Annotated` with `Check` or `Keys`, or `Any`.

    Of a dataclass, fields without a default are needed; what it does not know is left out.

    Raises:
        ValueError: for anything else, with the place and what is allowed there.
    """
    if is_dataclass(kind):
        known, needed = _types(kind)  # type: ignore[arg-type]
        entry = _expected(dict, "an object", value, where)
        for name in needed - entry.keys():
            raise ValueError(f"{where or 'the file'} has no {name!r}.")
        found = {
            name: read_as(known[name], part, _inside(where, name)) for name, part in entry.items() if name in known
        }
        return kind(**found)  # type: ignore[operator]
    if get_origin(kind) is Annotated:
        rule = get_args(kind)[1]
        if isinstance(rule, Check):
            if not rule.holds(value):
                raise ValueError(f"{where} is {show(value)}; {rule.words} is allowed.")
        else:
            for name, part in _expected(dict, "an object", value, where).items():
                read_as(rule.types.get(name, rule.types.get("*", Any)), part, _inside(where, name))
    elif get_origin(kind) is list:
        items = _expected(list, "a list", value, where)
        return [read_as(get_args(kind)[0], part, f"{where}[{n}]") for n, part in enumerate(items)]
    elif get_origin(kind) is dict:
        return {
            name: read_as(get_args(kind)[1], part, _inside(where, name))
            for name, part in _expected(dict, "an object", value, where).items()
        }
    return value


@lru_cache
def _types(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types of a dataclass's fields, and the names of those that are needed."""
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    return get_type_hints(kind, include_extras=True), frozenset(needed)


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}".lstrip(".")


def _expected(kind: type, words: str, value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where or 'the file'} is {show(value)}; {words} is allowed.")
    return value


def reason(error: BaseException) -> str:
    """What went wrong at first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def check_regular(path: Path) -> None:
    """Checks that a path is a file that can be read and read again: no folder, device or pipe.

    Raises:
        OSError: if it is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if not path.is_file():
        raise OSError(f"{path}: this is no regular file; a file is allowed.")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is there twice")
        found[name] = value
    return found


def parse_json(text: str | bytes) -> Any:
    """JSON in which no object has a key twice.

    Raises:
        ValueError: for anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: str | Path, what: str) -> Any:
    """The JSON value in a file.

    Args:
        what: words for what is allowed.

    Raises:
        ValueError: if it is no JSON.
        OSError: if it is no regular file, or cannot be read.
    """
    check_regular(Path(path))
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON file ({reason(error)}); {what} are allowed.") from error


def json_lines(path: Path, report: Report = refuse, word: str = "row") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, one a line, each with `file, row 3`; an array of objects over all of the file is as good.

    A value of another type counts as an empty object.

    Args:
        report: called for lines that are no JSON.
        word: for a line.

    Raises:
        ValueError: if the file is not UTF-8.
        OSError: if it is no regular file, or cannot be read.
    """
    check_regular(path)
    with path.open("rb") as lines:
        for n, line in enumerate(lines, start=1):
            where = f"{path.name}, {word} {n}"
            try:
                text = line.removeprefix(codecs.BOM_UTF8 if n == 1 else b"").decode()
            except UnicodeDecodeError as error:
                what = f"({word} {n}: {error.reason} at byte {error.start})"
                raise ValueError(f"{path.name}: the file is not UTF-8 text {what}.") from error
            if n == 1 and text.lstrip().startswith("["):
                rows = _array(path)
                if rows is not None:
                    yield from ((f"{path.name}, {word} {n}", row) for n, row in enumerate(rows, start=1))
                    return
            if not text.strip():
                continue
            try:
                entry = parse_json(text)
            except ValueError as error:
                report(f"{where}: invalid JSON ({reason(error)}); one object a line is allowed.")
                continue
            yield where, entry if isinstance(entry, dict) else {}


def _array(path: Path) -> list[dict[str, Any]] | None:
    """The objects of a file that is one array of them; None if it is not."""
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None
    return rows if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) else None


def write_json(results: Any, path: str | Path) -> None:
    """Writes a JSON file, replacing an old one in one step.

    Raises:
        OSError: if it cannot be written.
    """
    write_file(json.dumps(results, indent=1, ensure_ascii=False, default=dict) + "\n", path)


def write_file(text: str, path: str | Path) -> None:
    """Writes a file, replacing an old one in one step; lone surrogates, which UTF-8 cannot express, as escapes."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))
    os.replace(partial, path)


def check_output(path: str | Path, keys: Iterable[str] = ()) -> None:
    """Checks, before anything is computed, that a file can be written, and that nothing foreign is lost by it.

    Args:
        keys: what a JSON file that is there already must hold, to be replaced by its like.

    Raises:
        OSError: if the folder does not exist, the path is a folder, a device or a pipe, or holds something else.
    """
    path, keys = Path(path), list(keys)
    if path.is_dir() or not path.parent.is_dir():
        raise OSError(f"{path}: results cannot be written there; a file in a folder that exists is allowed.")
    if path.exists():
        check_regular(path)
        if keys and path.stat().st_size:
            try:
                old = parse_json(path.read_bytes())
            except ValueError:
                old = None
            if not isinstance(old, dict) or not old.keys() >= set(keys):
                raise OSError(f"{path}: another file is there, which is not replaced; choose another --output.")


def same_settings(path: Path, old: Any, new: Mapping[str, Any], advice: str) -> None:
    """Checks that what is in a file was begun with the same settings.

    Args:
        old, new: objects of objects; only what `new` has is compared.

    Raises:
        ValueError: naming the first difference.
    """
    wanted = json.loads(json.dumps(new, default=dict))
    for part in wanted:
        then, now = old.get(part) if isinstance(old, dict) else None, wanted[part]
        then = then if isinstance(then, dict) else {}
        for name in [*now, *(name for name in then if name not in now)]:
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"{path} was begun with {name}={then.get(name)!r}, now it is {now.get(name)!r}: {advice}"
                )
