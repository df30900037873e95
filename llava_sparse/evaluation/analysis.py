"""Failure modes, measured: which objects a pruned model misses. Functions on plain data.

docs/statistics.md says what each number means. A pair is (image, question); boxes are `[x0, y0, x1, y1]` in pixels of
the square picture that the model sees; patches are numbered row by row.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .answer_log import FORMAT
from .regression import logistic_regression
from .statistics import clustered_mean, unique_answers, unpack_kept

# Bounds of longest sides in pixels; the outer bins reach as far as the data.
SIZES = (28, 40, 56, 80, 120)
SHARES = (0, 0.25, 0.5, 0.75, 1)
# Up to so many different values have a bin each.
DISTINCT = 6

Array = NDArray[Any]
Pair = tuple[str, str]
Object = dict[str, Any]
Objects = Mapping[str, Sequence[Object]]
# Lower and upper bound, and which values lie between.
Bin = tuple[float, float, Array]


def load_objects(path: str | Path, side: int = 336) -> dict[str, list[Object]]:
    """The objects of each picture.

    Args:
        path: a file with one line a picture, `{"image": …, "objects": [{"name": …, "box": [x0, y0, x1, y1]}]}`.
        side: of the pictures, in pixels.

    Returns:
        for each image its objects, `name` and `box`.

    Raises:
        ValueError: for invalid data, naming file and line.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    found: dict[str, list[Object]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        row = _parsed(line, where)
        image, objects = row.get("image"), row.get("objects")
        if not isinstance(image, str) or not isinstance(objects, list):
            raise ValueError(f"{where}: an object with the text 'image' and the list 'objects' is allowed.")
        if image in found:
            raise ValueError(f"{where}: image {image!r} has a line already; one is allowed.")
        for thing in objects:
            if not isinstance(thing, dict) or not isinstance(thing.get("name"), str):
                raise ValueError(f"{where}: object {thing!r}: 'name' and 'box' are needed.")
            if not _is_box(thing.get("box"), side):
                raise ValueError(
                    f"{where}: {thing['name']!r} has the box {thing.get('box')!r}; allowed: [x0, y0, x1, y1] with "
                    f"0 <= x0 < x1 <= {side} and 0 <= y0 < y1 <= {side}."
                )
        found[image] = [{"name": thing["name"], "box": list(thing["box"])} for thing in objects]
    return found


def question_features(
    image: str, question: str, label: str, objects: Objects, patches_side: int = 24, side: int = 336
) -> dict[str, Any]:
    """What a question asks for, and how it lies in the picture.

    Args:
        image, question: "Is there a dog in the image?".
        label: "yes" or "no".
        objects: as from `load_objects`.
        patches_side: patches along a side of the picture.
        side: of the picture, in pixels.

    Returns:
        `name`; `present`; `clutter`, the number of objects in the picture. Of the largest object of that name, None
        if it is absent: `size`, its longest side in pixels; `area`, its share of the picture; `distance` of its centre
        from the picture's, 1 in a corner; `patches`, those of which it covers a quarter, or the one that it covers
        most.

    Raises:
        ValueError: for another question, an image without objects line, a label that contradicts the objects.
    """
    asked = re.fullmatch(r"Is there an? (.+) in the image\?", question)
    if asked is None:
        raise ValueError(f"{image}, {question!r}: 'Is there a … in the image?' is allowed.")
    if image not in objects:
        raise ValueError(f"{image}: its objects are not listed; a line for every image is needed.")
    boxes = [np.array(thing["box"], float) for thing in objects[image] if thing["name"] == asked[1]]
    if bool(boxes) != (label == "yes"):
        raise ValueError(f"{image}, {question!r}: the label {label!r} contradicts the {len(boxes)} boxes of that name.")
    features = {"name": asked[1], "present": bool(boxes), "clutter": len(objects[image])}
    if not boxes:
        return features | dict.fromkeys(("size", "area", "distance", "patches"))
    box = max(boxes, key=lambda b: float(np.prod(b[2:] - b[:2])))
    extent, centre = box[2:] - box[:2], (box[:2] + box[2:]) / 2
    return features | {
        "size": float(extent.max()),
        "area": float(extent.prod() / side**2),
        "distance": float(np.hypot(*(centre - side / 2)) / (side / math.sqrt(2))),
        "patches": _covered(box, patches_side, side),
    }


def survival(kept: Sequence[ArrayLike], patches: Sequence[int]) -> list[float]:
    """Share of an object's patches that are left as individual tokens after each stage.

    Args:
        kept: boolean masks `(stages, patches of the picture)`.
        patches: the object's, at least one.

    Raises:
        ValueError: if there is none.
    """
    if not len(patches):
        raise ValueError("The object has no patches; at least one is needed.")
    return [float(np.asarray(mask, bool)[list(patches)].mean()) for mask in kept]


def failure_curves(
    entry: Mapping[str, Any],
    kept_by_pair: Mapping[Pair, Sequence[str]] | None,
    objects: Objects,
    *,
    side: int = 336,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """How often a run misses objects and sees absent ones, by what they are like.

    Every distinct (image, question) pair counts once. A rate is `rate`, its `interval` and the `count` of questions.
    Bins (`low`, `high`) without questions are left out; one goes up to the next one's `low`, the last includes `high`.

    Args:
        entry: a run of a results file: `name`, `patches`, `answers`.
        kept_by_pair: for each pair the packed masks of the run's stages, as in the log of answers; None or no masks
            for the dense model.
        objects: as from `load_objects`.
        side: of the pictures, in pixels.
        resamples, confidence, seed: of the bootstrap, which draws images.

    Returns:
        `run`; `positives` and `negatives`, how many; `recall`, bins by `size`, `distance`, `clutter` and, of a pruned
        model, `survival` at the last stage; `false_positive_rate`, bins by `clutter`; `survival`, with `stages`, the
        mean survival at each stage, and `by_size`, bins with their own `stages`; `regression`, as from
        `logistic_regression`, of right answers to positives on log2_size, distance, clutter and survival.

    Raises:
        ValueError: as `question_features` does, and for a pair whose masks are missing or invalid.
    """
    settings = {"resamples": resamples, "confidence": confidence, "seed": seed}
    positives, negatives = _features(entry, objects, side)
    stages = _survivals(positives, kept_by_pair or {}, entry["patches"])
    values = {name: _column(positives, name) for name in ("size", "distance", "clutter")}
    bins = {name: _binned(column) for name, column in values.items()} | {"size": _size_bins(values["size"])}
    if len(stages):
        values["survival"] = stages[-1]
        bins["survival"] = _binned(stages[-1], SHARES)
    said, images = _column(positives, "said"), _column(positives, "image")
    terms = {"log2_size": np.log2(values.pop("size").astype(float)), **values}
    return {
        "run": entry["name"],
        "positives": len(positives),
        "negatives": len(negatives),
        "recall": {name: _curve(parts, said, images, settings) for name, parts in bins.items()},
        "false_positive_rate": {
            "clutter": _curve(
                _binned(_column(negatives, "clutter")),
                _column(negatives, "said"),
                _column(negatives, "image"),
                settings,
            ),
        },
        "survival": _survival_rates(stages, bins["size"] if len(stages) else [], images, settings),
        "regression": logistic_regression(said, terms, images.tolist(), confidence),
    }


def disagreements(entries: Sequence[Mapping[str, Any]], limit: int | None = None) -> list[dict[str, Any]]:
    """Distinct (image, question) pairs that runs answer differently, most telling first.

    First come those that the reference run (the first dense one, else the first) answers right, with most others
    wrong; among equals, each image once before any a second time, then by name.

    Args:
        entries: runs, `name`, `method` and `answers`, with the same rows in the same order.
        limit: how many at most; None for all.

    Returns:
        for each pair `image`, `question`, `label`, and `answers`, the label that each run's answer counts as.
    """
    reference = next((entry["name"] for entry in entries if entry["method"] == "dense"), entries[0]["name"])
    found = []
    for rows in zip(*(unique_answers(entry["answers"]) for entry in entries), strict=True):
        answers = {entry["name"]: row["parsed"] for entry, row in zip(entries, rows, strict=True)}
        if len(set(answers.values())) > 1:
            found.append({**{key: rows[0][key] for key in ("image", "question", "label")}, "answers": answers})

    def rank(pair: dict[str, Any]) -> tuple[bool, int]:
        wrong = [name for name, answer in pair["answers"].items() if answer != pair["label"]]
        return reference in wrong, -len(wrong)

    found.sort(key=lambda pair: (*rank(pair), pair["image"], pair["question"]))
    seen: Counter[Any] = Counter()

    def turn(pair: dict[str, Any]) -> tuple[bool, int, int]:
        key = *rank(pair), pair["image"]
        seen[key] += 1
        return *rank(pair), seen[key]

    return sorted(found, key=turn)[:limit]


def read_log(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[Pair, dict[str, Any]]]]:
    """The log of answers that a run writes.

    Args:
        path: the `.answers.jsonl` file. Its last line may be cut short: an answer that is not there.

    Returns:
        the header, and for each run the line of each pair.

    Raises:
        ValueError: for another file, invalid lines before the last, and a pair with two different answers.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_parsed(line, f"{path.name}, line {number}"))
        except ValueError:
            if number < len(lines):
                raise
    if not rows or rows[0].get("format") != FORMAT:
        raise ValueError(f"{path.name}: the first line has no format {FORMAT!r}; a log of answers is allowed.")
    runs: dict[str, dict[Pair, dict[str, Any]]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not all(isinstance(row.get(key), str) for key in ("run", "image", "question", "answer")):
            raise ValueError(f"{path.name}, line {number}: run, image, question and answer are needed.")
        pair = row["image"], row["question"]
        if runs.setdefault(row["run"], {}).setdefault(pair, row) != row:
            raise ValueError(f"{path.name}, line {number}: run {row['run']!r} has another answer to {pair} before.")
    return rows[0], runs


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: invalid JSON ({error}); one object a line is allowed.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__}; one object a line is allowed.")
    return row


def _is_box(box: Any, side: int) -> bool:
    """Whether corners are in order and inside the picture."""
    if not isinstance(box, list) or len(box) != 4 or any(type(x) not in (int, float) for x in box):
        return False
    return all(0 <= low < high <= side for low, high in zip(box[:2], box[2:], strict=True))


def _covered(box: Array, patches_side: int, side: int) -> list[int]:
    """Patches of which a box covers at least a quarter, or the one that it covers most."""
    edges = np.arange(patches_side + 1) * (side / patches_side)
    x, y = (
        np.clip(np.minimum(edges[1:], box[axis + 2]) - np.maximum(edges[:-1], box[axis]), 0, None) for axis in (0, 1)
    )
    shares = np.outer(y, x).ravel() / (side / patches_side) ** 2
    patches = np.flatnonzero(shares >= 0.25)
    return patches.tolist() or [int(shares.argmax())]


def _features(
    entry: Mapping[str, Any], objects: Objects, side: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Distinct answers with the features of their questions: positives and negatives."""
    patches_side = math.isqrt(entry["patches"])
    if patches_side**2 != entry["patches"]:
        raise ValueError(f"{entry['name']}: {entry['patches']} patches; a square number is allowed.")
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for row in unique_answers(entry["answers"]):
        given = row["image"], row["question"], row["label"]
        features = question_features(*given, objects, patches_side, side)
        found[not features["present"]].append({**row, **features, "said": row["parsed"] == "yes"})
    return found


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Array:
    return np.array([row[name] for row in rows])


def _survivals(
    positives: Sequence[Mapping[str, Any]], kept_by_pair: Mapping[Pair, Sequence[str]], patches: int
) -> Array:
    """Survival `(stages, positives)` of the asked objects."""
    if not positives or not any(kept_by_pair.values()):
        return np.zeros((0, len(positives)))
    shares = []
    for row in positives:
        pair = row["image"], row["question"]
        if len(kept_by_pair.get(pair, ())) != len(next(iter(kept_by_pair.values()))):
            raise ValueError(f"{pair[0]}, {pair[1]!r}: masks of the same stages are needed for every pair.")
        shares.append(survival([unpack_kept(packed, patches) for packed in kept_by_pair[pair]], row["patches"]))
    return np.array(shares).T


def _survival_rates(
    stages: Array, sizes: Sequence[Bin], images: Array, settings: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    by_size = [
        {"low": low, "high": high, "stages": [_rate(stage[chosen], images[chosen], settings) for stage in stages]}
        for low, high, chosen in sizes
    ]
    return {"stages": [_rate(stage, images, settings) for stage in stages], "by_size": by_size}


def _size_bins(sizes: Array) -> list[Bin]:
    """The usual bins where they fit: nine tenths of the objects lie within."""
    if not len(sizes) or ((sizes >= SIZES[0]) & (sizes <= SIZES[-1])).mean() < 0.9:
        return _binned(sizes)
    return _binned(sizes, (min(SIZES[0], sizes.min()), *SIZES[1:-1], max(SIZES[-1], sizes.max())))


def _binned(values: Array, edges: Sequence[float] | None = None) -> list[Bin]:
    """Bins that are not empty: between edges; without edges, of single values if they are few, else of quartiles."""
    distinct = np.unique(values)
    if edges is None and len(distinct) <= DISTINCT:
        return [(float(value), float(value), values == value) for value in distinct]
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 5))).tolist() if edges is None else edges
    bin_of = np.digitize(values, edges[1:-1])
    bounds = enumerate(pairwise(edges))
    return [(float(low), float(high), bin_of == k) for k, (low, high) in bounds if (bin_of == k).any()]


def _rate(values: Array, images: Array, settings: Mapping[str, Any]) -> dict[str, Any]:
    rate, interval = clustered_mean(values, images.tolist(), **settings)
    return {"count": len(values), "rate": rate, "interval": interval}


def _curve(bins: Sequence[Bin], outcome: Array, images: Array, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"low": low, "high": high, **_rate(outcome[chosen], images[chosen], settings)} for low, high, chosen in bins
    ]
