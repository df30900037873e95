"""Failure modes, measured: which objects a pruned model misses. Functions on plain data.

docs/statistics.md says what each number means. A pair is (image, question); boxes are `[x0, y0, x1, y1]` in pixels of
the square picture that the model sees; patches are numbered row by row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from statsmodels.discrete.discrete_model import Logit

from llava_sparse.preprocessing import parts

from .files import Check, json_lines
from .statistics import clustered_mean, unique_answers, unpack_kept
from .tasks import Task, get_task

# Of pictures whose results do not say it: LLaVA-1.5's.
SIDE = 336
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


def load_objects(
    path: str | Path, side: int = SIDE, preprocessing: Mapping[str, Any] | None = None
) -> dict[str, list[Object]]:
    """The objects of each picture.

    Args:
        path: a file with one line a picture, `{"image": …, "objects": [{"name": …, "box": [x0, y0, x1, y1]}]}`, in
            pixels of the square that the model sees; or, beside `"size": [width, height]`, in pixels of the picture.
        side: of the square, in pixels.
        preprocessing: what the model sees of a picture with a size, as `preprocessing.recorded` gives it.

    Returns:
        for each image its objects, `name` and `box` in the square, None for what the model does not see.

    Raises:
        ValueError: for invalid data, naming file and line.
        OSError: if the file cannot be read.
    """
    found: dict[str, list[Object]] = {}
    for where, row in json_lines(Path(path), word="line"):
        image, objects = row.get("image"), row.get("objects")
        if not isinstance(image, str) or not isinstance(objects, list):
            raise ValueError(f"{where}: an object with the text 'image' and the list 'objects' is allowed.")
        if image in found:
            raise ValueError(f"{where}: image {image!r} has a line already; one is allowed.")
        size = row.get("size", [side, side])
        if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
            raise ValueError(f"{where}: size {size!r}: [width, height] in pixels is allowed.")
        width, height = size
        box = Check(
            f"[x0, y0, x1, y1] with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}", partial(_is_box, size=size)
        )
        if "size" in row and preprocessing is None:
            raise ValueError(f"{where}: boxes in pixels of pictures need results that say what the model sees of them.")
        seen = parts(preprocessing, (width, height))[0].place if preprocessing and "size" in row else list
        for thing in objects:
            if not isinstance(thing, dict) or not isinstance(thing.get("name"), str):
                raise ValueError(f"{where}: object {thing!r}: 'name' and 'box' are needed.")
            if not box.holds(thing.get("box")):
                raise ValueError(f"{where}: {thing['name']!r} has the box {thing.get('box')!r}; allowed: {box.words}.")
        found[image] = [{"name": thing["name"], "box": seen(thing["box"])} for thing in objects]
    return found


def question_features(
    image: str,
    question: str,
    label: str,
    objects: Objects,
    patches_side: int = 24,
    side: int = SIDE,
    task: str | Task = "pope",
) -> dict[str, Any]:
    """What a question asks for, and how it lies in the picture.

    Args:
        image, question: "Is there a dog in the image?".
        label: "yes" or "no".
        objects: as from `load_objects`.
        patches_side: patches along a side of the picture.
        side: of the picture, in pixels.
        task: whose question it is.

    Returns:
        `name`; `present`; `clutter`, the number of objects in the picture. Of the largest object of that name, None
        if it is absent, or nothing of it is seen: `size`, its longest side in pixels; `area`, its share of the picture;
        `distance` of its centre from the picture's, 1 in a corner; `patches`, those of which it covers a quarter, or
        the one that it covers most.

    Raises:
        ValueError: for another question, an image without objects line, a label that contradicts the objects.
    """
    asked = get_task(task).asked(question)
    if asked is None:
        raise ValueError(f"{image}, {question!r}: 'Is there a … in the image?' is allowed.")
    if image not in objects:
        raise ValueError(f"{image}: its objects are not listed; a line for every image is needed.")
    named = [thing["box"] for thing in objects[image] if thing["name"] == asked]
    if bool(named) != (label == "yes"):
        raise ValueError(f"{image}, {question!r}: the label {label!r} contradicts the {len(named)} boxes of that name.")
    features = {"name": asked, "present": bool(named), "clutter": len(objects[image])}
    boxes = [np.array(box, float) for box in named if box is not None]
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


@dataclass(frozen=True)
class _Rows:
    """Distinct answers about objects that are there, or are not, as columns `(n,)`, and how rates are measured."""

    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Array:
        return np.array([row[name] for row in self.rows])

    def rate(self, values: Array, chosen: Any = slice(None)) -> dict[str, Any]:
        rate, interval = clustered_mean(values[chosen], self["image"][chosen].tolist(), **self.settings)
        return {"count": len(values[chosen]), "rate": rate, "interval": interval}

    def curve(self, bins: Sequence[Bin]) -> list[dict[str, Any]]:
        said = self["said"]
        return [{"low": low, "high": high, **self.rate(said, chosen)} for low, high, chosen in bins]


def failure_curves(
    entry: Mapping[str, Any],
    kept_by_pair: Mapping[Pair, Sequence[str]] | None,
    objects: Objects,
    *,
    side: int | None = None,
    task: str | Task = "pope",
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
        side: of the pictures, in pixels; None for the entry's `image_size`, or 336.
        task: whose questions they are.
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
    found = _with_features(entry, objects, side or entry.get("image_size") or SIDE, task)
    positives, negatives = (_Rows(rows, settings) for rows in found)
    stages = _survivals(positives, kept_by_pair or {}, entry["patches"])
    values = {name: positives[name] for name in ("size", "distance", "clutter")}
    bins = {name: _binned(column) for name, column in values.items()} | {"size": _size_bins(values["size"])}
    if len(stages):
        values["survival"] = stages[-1]
        bins["survival"] = _binned(stages[-1], SHARES)
    terms = {"log2_size": np.log2(values.pop("size").astype(float)), **values}
    return {
        "run": entry["name"],
        "positives": len(positives.rows),
        "negatives": len(negatives.rows),
        "recall": {name: positives.curve(parts) for name, parts in bins.items()},
        "false_positive_rate": {"clutter": negatives.curve(_binned(negatives["clutter"]))},
        "survival": {
            "stages": [positives.rate(stage) for stage in stages],
            "by_size": [
                {"low": low, "high": high, "stages": [positives.rate(stage, chosen) for stage in stages]}
                for low, high, chosen in (bins["size"] if len(stages) else [])
            ],
        },
        "regression": logistic_regression(positives["said"], terms, positives["image"].tolist(), confidence),
    }


def _with_features(
    entry: Mapping[str, Any], objects: Objects, side: int, task: str | Task
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Distinct answers with the features of their questions: about objects that can be seen, and that are not there."""
    patches_side = math.isqrt(entry["patches"])
    if patches_side**2 != entry["patches"]:
        raise ValueError(f"{entry['name']}: {entry['patches']} patches; a square number is allowed.")
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for row in unique_answers(entry["answers"]):
        given = row["image"], row["question"], row["label"]
        features = question_features(*given, objects, patches_side, side, task)
        if features["present"] and features["size"] is None:
            continue
        found[not features["present"]].append({**row, **features, "said": row["parsed"] == "yes"})
    return found


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
            pair = {**{key: rows[0][key] for key in ("image", "question", "label")}, "answers": answers}
            wrong = [name for name, answer in answers.items() if answer != pair["label"]]
            found.append((reference in wrong, -len(wrong), pair["image"], pair["question"], pair))
    found.sort(key=lambda row: row[:4])
    seen: Counter[Any] = Counter()
    turned = []
    for *rank, image, _, pair in found:
        key = (*rank, image)
        seen[key] += 1
        turned.append(((*rank, seen[key]), pair))
    return [pair for _, pair in sorted(turned, key=lambda row: row[0])][:limit]


def logistic_regression(
    right: ArrayLike, terms: Mapping[str, ArrayLike], images: Sequence[str], confidence: float = 0.95
) -> dict[str, Any]:
    """Log-odds of a right answer as a sum of terms, with covariance clustered by image.

    Terms enter in their order. One that is constant, follows from those before it, or with them separates right from
    wrong answers (its coefficient would be infinite) is left out.

    Args:
        right: `(n,)`, 1 for right and 0 for wrong answers.
        terms: names, and values `(n,)`.
        images: n names.

    Returns:
        `questions` and `images`, how many; `terms`, for each name `coefficient`, the change of log-odds as the term
        grows by 1, and its `interval`; `left_out`, for each other name the reason.
    """
    outcome = np.asarray(right, float)
    numbers = np.unique(np.asarray(images, str), return_inverse=True)[1]
    clusters = len(set(numbers.tolist()))
    result: dict[str, Any] = {"questions": len(outcome), "images": clusters, "terms": {}, "left_out": {}}
    design, spreads = np.ones((len(outcome), 1)), {}
    for name, column in terms.items():
        values = np.asarray(column, float)
        spread = float(values.std()) if len(values) else 0.0
        # Standardised columns: rank and separation do not depend on units.
        grown = np.column_stack([design, (values - values.mean()) / spread]) if spread > 1e-12 else design
        if len(set(outcome.tolist())) < 2:
            result["left_out"][name] = "all answers are right, or all are wrong"
        elif grown is design:
            result["left_out"][name] = "constant"
        elif clusters <= grown.shape[1]:
            result["left_out"][name] = f"too few images ({clusters})"
        elif np.linalg.matrix_rank(grown) < grown.shape[1]:
            result["left_out"][name] = "follows from the terms before it"
        elif _separates(grown, outcome):
            result["left_out"][name] = "separates right from wrong answers"
        else:
            design, spreads[name] = grown, spread
    if spreads:
        fit = Logit(outcome, design).fit(disp=0, maxiter=200, cov_type="cluster", cov_kwds={"groups": numbers})
        bounds = fit.conf_int(1 - confidence)
        for k, (name, spread) in enumerate(spreads.items(), start=1):
            interval = [float(bound / spread) for bound in bounds[k]]
            result["terms"][name] = {"coefficient": float(fit.params[k] / spread), "interval": interval}
    return result


def _separates(design: Array, outcome: Array) -> bool:
    """Whether some weights put all right answers on one side and all wrong ones on the other, both sides closed.

    Then, and only then, the likelihood has no maximum (Albert and Anderson 1984; as a linear program, Konis 2007).
    """
    signed = design * np.where(outcome > 0, 1, -1)[:, None]
    found = linprog(-signed.mean(axis=0), A_ub=-signed, b_ub=np.zeros(len(signed)), bounds=(-1, 1))
    return bool(-found.fun > 1e-6)


def _is_box(box: Any, size: Sequence[float]) -> bool:
    """Whether corners are in order and inside a picture."""
    if not isinstance(box, list) or len(box) != 4 or any(type(x) not in (int, float) for x in box):
        return False
    return all(0 <= low < high <= far for low, high, far in zip(box[:2], box[2:], size, strict=True))


def _covered(box: Array, patches_side: int, side: int) -> list[int]:
    """Patches of which a box covers at least a quarter, or the one that it covers most."""
    edges = np.arange(patches_side + 1) * (side / patches_side)
    x, y = (
        np.clip(np.minimum(edges[1:], box[axis + 2]) - np.maximum(edges[:-1], box[axis]), 0, None) for axis in (0, 1)
    )
    shares = np.outer(y, x).ravel() / (side / patches_side) ** 2
    patches = np.flatnonzero(shares >= 0.25)
    return patches.tolist() or [int(shares.argmax())]


def _survivals(positives: _Rows, kept_by_pair: Mapping[Pair, Sequence[str]], patches: int) -> Array:
    """Survival `(stages, positives)` of the asked objects."""
    if not positives.rows or not any(kept_by_pair.values()):
        return np.zeros((0, len(positives.rows)))
    shares = []
    for row in positives.rows:
        pair = row["image"], row["question"]
        if len(kept_by_pair.get(pair, ())) != len(next(iter(kept_by_pair.values()))):
            raise ValueError(f"{pair[0]}, {pair[1]!r}: masks of the same stages are needed for every pair.")
        shares.append(survival([unpack_kept(packed, patches) for packed in kept_by_pair[pair]], row["patches"]))
    return np.array(shares).T


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
