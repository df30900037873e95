"""The checks of settings that all methods share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

POSITIONS = ("compact", "original")
# Words that options of these names may take, whatever the method.
CHOICES = {"positions": POSITIONS}


def nearest(name: object, allowed: Sequence[str]) -> str:
    """A hint that names the closest valid word, or an empty string: `(did you mean 'visionzip'?)`."""
    close = difflib.get_close_matches(str(name).lower(), list(allowed), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_count(value: object, low: int, high: int) -> bool:
    """Whether `value` is an integer (a bool is none) within `low..high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_counts(field: str, values: object, low: int, high: int, length: int | None = None) -> tuple[int, ...]:
    """Returns `values` as a tuple of integers in `low..high`.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    size = "a list of" if length is None else f"a list of {length}"
    entries = list(values) if isinstance(values, list | tuple) else None
    if (
        not entries
        or (length is not None and len(entries) != length)
        or not all(is_count(v, low, high) for v in entries)
    ):
        raise ValueError(f"{field}={values!r}: {size} integers from {low} to {high} is allowed.")
    return tuple(entries)


def check_choice(option: str, value: object, allowed: Sequence[str]) -> str:
    """Returns the `value` of an option if it is one of the `allowed` words; raises ValueError otherwise."""
    if value not in allowed:
        raise ValueError(f"sparse_options: {option}={value!r}{nearest(value, allowed)}; allowed: {', '.join(allowed)}.")
    return str(value)


def check_flag(option: str, value: object) -> bool:
    """Returns the `value` of an option if it is true or false; raises ValueError otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"sparse_options: {option}={value!r}: true or false is allowed.")
    return value
