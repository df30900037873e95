"""Reading results files, ours or not: everything that a report relies on is checked here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .curves import SCORE_METRICS
from .report import timing_path
from .statistics import METRICS, ROW

# A check of one value: what is allowed, in words, and whether a value is that.
Check = tuple[str, Callable[[Any], bool]]


def _number(low: float = -math.inf, high: float = math.inf) -> Check:
    text = "a number" if low == -math.inf else f"a number from {low:g}" + ("" if high == math.inf else f" to {high:g}")
    return text, lambda x: type(x) in (int, float) and math.isfinite(x) and low <= x <= high


# JSON can hold lone surrogates, which UTF-8 cannot.
TEXT: Check = ("text", lambda x: isinstance(x, str) and not re.search("[\ud800-\udfff]", x))
ANSWER: Check = ("'yes' or 'no'", lambda x: x in ("yes", "no"))
COUNT: Check = ("a whole number from 0", lambda x: type(x) is int and x >= 0)
BUDGET: Check = (
    "a whole number, a ratio or null",
    lambda x: x is None or type(x) is int or (type(x) is float and 0 < x <= 1),
)
RATE, NUMBER = _number(0, 1), _number()
# Decoder methods without grouping do not say.
TOKENS: Check = ("a number from 0 or null", lambda x: x is None or _number(0)[1](x))
INTERVAL: Check = (
    "a list of two numbers",
    lambda x: isinstance(x, list) and len(x) == 2 and all(map(NUMBER[1], x)),
)
ANYTHING: Check = ("anything", lambda x: True)

# Shapes of values: a check; [shape] is a list of them; {name: shape} an object, where a name that ends in "?" may be
# missing and "*" stands for every other name.
SCORES = {
    **dict.fromkeys(METRICS, RATE),
    **dict.fromkeys((f"{name}?" for name in (*SCORE_METRICS, "ece")), RATE),
    "questions?": COUNT,
    "intervals?": {"*": INTERVAL},
}
ENTRY = {
    "method": TEXT,
    "name?": TEXT,
    "budget": BUDGET,
    "patches?": COUNT,
    "visual_tokens": TOKENS,
    "splits": {"*": SCORES},
    "average": SCORES,
    "scores?": {
        "splits": {"*": SCORES},
        "average": SCORES,
        "pooled": SCORES,
        "unique": SCORES,
        "bootstrap": {"confidence": RATE, "resamples": COUNT, "*": ANYTHING},
    },
    "answers": [{**dict.fromkeys(ROW, TEXT), "label": ANSWER, "parsed": ANSWER, "answer": TEXT, "score?": NUMBER}],
    "*": ANYTHING,
}
COMPARISON = {
    **dict.fromkeys(("a", "b"), TEXT),
    **dict.fromkeys(("pairs", "a_only_correct", "b_only_correct"), COUNT),
    **dict.fromkeys(("p", "p_holm", "equal_answers"), RATE),
    **dict.fromkeys(("difference", "average_difference", "kappa"), _number(-1, 1)),
    **dict.fromkeys(("interval", "average_interval"), INTERVAL),
}
RESULTS = {
    "settings": {"model": TEXT, "dataset": TEXT, "*": ANYTHING},
    "versions": {"*": ANYTHING},
    "questions": {
        "splits": {"*": COUNT},
        "scored": COUNT,
        "asked": COUNT,
        "images": COUNT,
        "skipped?": [TEXT],
        "note?": TEXT,
    },
    "methods": [ENTRY],
    "comparisons?": [COMPARISON],
    "*": ANYTHING,
}


def results_files(paths: Sequence[str | Path]) -> list[Path]:
    """Results files, in the order given; of a folder all that are in it, by name.

    Raises:
        OSError: if there is no such file or folder.
        ValueError: for a folder without results, and for a file given twice.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder.")
        if path.is_dir():
            timings = {timing_path(file).name for file in path.glob("*.json")}
            found = sorted(file for file in path.glob("*.json") if file.name not in timings)
            if not found:
                raise ValueError(f"{path}: there are no results (*.json) in this folder.")
            files += found
        else:
            files.append(path)
    for file in files:
        if files.count(file) > 1:
            raise ValueError(f"{file}: given more than once; each results file is allowed once.")
    return files


def read_results(path: str | Path) -> dict[str, Any]:
    """The results in a file that `llava-sparse pope --output` has written, also by an earlier version.

    Every run has a `name`, and all have the same rows in the same order.

    Raises:
        ValueError: for anything else, with the place and what is allowed there.
        OSError: if it cannot be read.
    """
    path = Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON file ({error}); results of `llava-sparse pope` are allowed.") from error
    if not isinstance(results, dict) or not {"settings", "methods"} <= results.keys():
        raise ValueError(f"{path}: no results of `llava-sparse pope`: it has no 'settings' and 'methods'.")
    try:
        _check(results, RESULTS, "")
        for entry in results["methods"]:
            entry.setdefault("name", entry["method"] + ("" if entry["budget"] is None else f"@{entry['budget']}"))
        _check_runs(results["methods"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return results


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, tuple):
        allowed, holds = shape
        if not holds(value):
            raise ValueError(f"{where} is {_short(value)}; {allowed} is allowed.")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {_short(value)}; a list is allowed.")
        for number, part in enumerate(value):
            _check(part, shape[0], f"{where}[{number}]")
    else:
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the file'} is {_short(value)}; an object is allowed.")
        for name, part in shape.items():
            if name != "*" and name.rstrip("?") in value:
                _check(value[name.rstrip("?")], part, f"{where}.{name.rstrip('?')}".lstrip("."))
            elif name != "*" and not name.endswith("?"):
                raise ValueError(f"{where or 'the file'} has no {name!r}.")
        for name in value.keys() - {known.rstrip("?") for known in shape} if "*" in shape else ():
            _check(value[name], shape["*"], f"{where}.{name}".lstrip("."))


def _check_runs(entries: Sequence[dict[str, Any]]) -> None:
    if not entries or not entries[0]["answers"]:
        raise ValueError("methods: one run with one answer at least is needed.")
    rows = [[answer[key] for key in ROW] for answer in entries[0]["answers"]]
    for number, entry in enumerate(entries):
        if [[answer[key] for key in ROW] for answer in entry["answers"]] != rows:
            raise ValueError(f"methods[{number}].answers are not to the questions of methods[0].")
        scored = ["score" in answer for answer in entry["answers"]]
        if any(scored) != all(scored):
            raise ValueError(f"methods[{number}].answers: some have a score, some do not.")
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError("methods: two runs have the same name.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
