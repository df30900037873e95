"""Scores with their uncertainty, paired tests, agreement of methods, and curves: functions on plain data.

docs/statistics.md says what each number means. An answer is one of the `answers` of a results file: a mapping with
`split`, `question_id`, `image`, `question`, `label`, `parsed` and, where the model gave one, `score` (log-odds of yes).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import bootstrap, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from .curves import (
    SCORE_METRICS,
    average_precision,
    calibration,
    precision_recall_curve,
    ratio,
    risk_coverage,
    roc_auc,
    score_rates,
)
from .masks import kept_overlap, pack_kept, unpack_kept
from .measures import ACCURACY, METRICS, YES_NO, Measure

__all__ = [
    "ACCURACY",
    "METRICS",
    "YES_NO",
    "Measure",
    "average_precision",
    "calibration",
    "clustered_mean",
    "cohen_kappa",
    "compare",
    "kept_overlap",
    "pack_kept",
    "precision_recall_curve",
    "questions_needed",
    "risk_coverage",
    "roc_auc",
    "summarize",
    "unique_answers",
    "unpack_kept",
]

Answer = Mapping[str, Any]
Array = NDArray[Any]

ROW = ("split", "question_id", "image", "question", "label")
# Resamples at a time, which bounds the memory for weights (resamples, rows).
BATCH = 100
# With fewer images, intervals hold the truth less often than they say.
FEW_IMAGES = 50
# Chance of finding a difference that is there, for which `questions_needed` are.
POWER = 0.8


def summarize(
    answers: Sequence[Answer],
    measure: Measure = YES_NO,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The metrics of one run under each aggregation, with intervals.

    Papers on POPE print the mean over the three splits, of accuracy and of F1: `average`.

    Args:
        answers: of one run, all with a score or none.
        measure: what is counted.
        resamples, confidence, seed: of the bootstrap, which draws images, each with all its questions.

    Returns:
        `splits`, the metrics of each split; `average`, the mean of each metric over the splits that are there;
        `pooled`, those of all rows as one set; `unique`, those of `unique_answers`; `bootstrap`, its settings and the
        number of images. Each set holds its number of `questions` (the average does not), the metrics from 0 to 1,
        and `intervals`, `[low, high]` for each metric. With scores, roc_auc, average_precision, brier, ece and aurc
        join the metrics, for the probability sigmoid(score); the last two have no interval, because resampling biases
        them.

    Raises:
        ValueError: for no answers, scores in some rows only or not finite, a pair answered in two ways.
    """
    splits, sets = _sets(answers)
    images, clusters = _numbered(row["image"] for row in answers)
    labels = np.array([row["label"] for row in answers])
    positive, scores = labels == "yes", _scores(answers)
    cells = measure.cells(labels, np.array([row["parsed"] for row in answers]))
    counts = np.stack([_sums(cells[rows], images[rows], clusters) for rows in sets], axis=1)
    names = measure.metrics if scores is None else measure.metrics + SCORE_METRICS
    support = _support(measure, counts, None if scores is None else _sums_of_labels(positive, images, clusters, sets))
    support = np.concatenate([support, support[: len(splits)].min(axis=0, keepdims=True)])

    def statistic(weights: Array) -> Array:
        found = measure.rates(np.tensordot(weights, counts, 1))
        if scores is not None:
            by_set = [score_rates(positive[rows], scores[rows], weights[:, images[rows]]) for rows in sets]
            found = np.concatenate([found, np.stack(by_set, axis=1)], axis=-1)
        return np.concatenate([found, found[:, : len(splits)].mean(axis=1, keepdims=True)], axis=1)

    estimates = _intervals(statistic, support, resamples, confidence, seed, clusters)
    *parts, average = (_described(names, *values) for values in zip(*estimates, strict=True))
    *by_split, pooled, unique = parts
    for part, rows in zip(parts, sets, strict=True):
        part |= {"questions": len(rows), **({} if scores is None else _calibrated(positive[rows], scores[rows]))}
    for name in () if scores is None else ("ece", "aurc"):
        average[name] = float(np.mean([part[name] for part in by_split]))
    return {
        "splits": dict(zip(splits, by_split, strict=True)),
        "average": average,
        "pooled": pooled,
        "unique": unique,
        "bootstrap": {"resamples": resamples, "confidence": confidence, "seed": seed, "images": clusters},
    }


def _calibrated(positive: Array, scores: Array) -> dict[str, float]:
    return {"ece": calibration(positive, expit(scores))["ece"], "aurc": risk_coverage(positive, scores)}


def unique_answers(answers: Sequence[Answer]) -> list[Answer]:
    """The answers to distinct (image, question) pairs, in the order of their first rows.

    POPE's positive questions repeat in its splits: 5,127 of the official 9,000 rows are distinct. A pair that two rows
    label differently stays twice.

    Raises:
        ValueError: if a pair was answered in two ways.
    """
    return [answers[row] for row in _unique_rows(answers)]


def compare(
    entries: Sequence[Mapping[str, Any]], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> list[dict[str, Any]]:
    """Compares every two runs on the same questions.

    McNemar's exact test counts distinct (image, question) pairs, because a positive that stands in three splits is one
    observation and not three. It takes the pairs as independent, so it ignores that the questions of an image hang
    together; the interval of the difference respects it.

    Args:
        entries: runs, `name` and `answers`, all with the same rows in the same order.
        resamples, confidence, seed: of the bootstrap, as in `summarize`; both runs are measured on the same resamples.

    Returns:
        for every two runs: `a` and `b`, their names; `pairs`, the number of distinct pairs; `a_only_correct` and
        `b_only_correct`, the discordant ones; `equal_answers`, the share of pairs answered alike; `kappa`, Cohen's;
        `difference`, accuracy of a minus that of b over distinct pairs, and its `interval`; `average_difference` and
        `average_interval`, the same for the mean of the splits' accuracies; `p`, two-sided, and `p_holm`, adjusted
        for all comparisons of this call; `questions_needed`, as from that function.

    Raises:
        ValueError: if two runs have different rows, and as `summarize` does.
    """
    _check_rows(entries)
    if len(entries) < 2:
        return []
    runs = list(combinations(range(len(entries)), 2))
    rows, *_ = (_unique_rows(entry["answers"]) for entry in entries)
    said = np.array([[row["parsed"] for row in entry["answers"]] for entry in entries])
    right = said == np.array([row["label"] for row in entries[0]["answers"]])
    compared = [
        {"a": entries[a]["name"], "b": entries[b]["name"], **_agreement(said[[a, b]][:, rows], right[[a, b]][:, rows])}
        for a, b in runs
    ]
    adjusted = multipletests([comparison["p"] for comparison in compared], method="holm")[1]
    point, low, high = _differences(entries[0]["answers"], right, runs, (resamples, confidence, seed))
    for k, (comparison, p) in enumerate(zip(compared, adjusted, strict=True)):
        comparison["p_holm"] = float(p)
        for row, prefix in enumerate(("", "average_")):
            comparison[f"{prefix}difference"] = float(point[row, k])
            comparison[f"{prefix}interval"] = [float(low[row, k]), float(high[row, k])]
    return compared


def questions_needed(pairs: int, only_a: int, only_b: int, level: float = 0.05) -> int | None:
    """Questions that McNemar's test needs to find a difference as large as was seen, four times out of five.

    Args:
        pairs: questions that were asked; only_a, only_b: those that one run alone answers right.
        level: of the test, two-sided.

    Returns:
        how many, by Connor's formula (Biometrics 43, 1987); None where no difference was seen.
    """
    discordant, difference = (only_a + only_b) / pairs, abs(only_a - only_b) / pairs
    if difference == 0:
        return None
    root = norm.ppf(1 - level / 2) * discordant**0.5 + norm.ppf(POWER) * (discordant - difference**2) ** 0.5
    return int(np.ceil((root / difference) ** 2))


def cohen_kappa(a: ArrayLike, b: ArrayLike) -> float:
    """Cohen's kappa of two raters `(n,)`: agreement beyond chance; 1 where both always say the same thing."""
    first, second = np.asarray(a), np.asarray(b)
    chance = sum((first == kind).mean() * (second == kind).mean() for kind in np.unique(first))
    return 1.0 if chance == 1 else float(((first == second).mean() - chance) / (1 - chance))


def clustered_mean(
    values: ArrayLike,
    clusters: Iterable[Hashable],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, list[float]]:
    """The mean of values `(n,)` from 0 to 1, and its interval `[low, high]`, clusters (n names) drawn as wholes.

    Raises:
        ValueError: if there are no values, or not as many as cluster names.
    """
    values = np.asarray(values, float)
    numbers, count = _numbered(clusters)
    if not len(values) or values.shape != numbers.shape:
        raise ValueError(f"values {values.shape}, clusters {numbers.shape}: a cluster for every value is allowed.")
    sums = _sums(np.stack([values, np.ones_like(values)], axis=-1), numbers, count)

    def mean(weights: Array) -> Array:
        total = weights @ sums
        return total[:, :1] / total[:, 1:]

    point, low, high = _intervals(mean, np.array([count]), resamples, confidence, seed, count)
    return float(point[0]), [float(low[0]), float(high[0])]


def _sets(answers: Sequence[Answer]) -> tuple[list[str], list[Array]]:
    """The splits, and row numbers: of each split, of all rows, of distinct pairs."""
    if not answers:
        raise ValueError("There are no answers to score; at least one is needed.")
    of_row = np.array([row["split"] for row in answers])
    splits = list(dict.fromkeys(of_row.tolist()))
    by_split = [np.flatnonzero(of_row == split) for split in splits]
    return splits, [*by_split, np.arange(len(answers)), np.array(_unique_rows(answers))]


def _unique_rows(answers: Sequence[Answer]) -> list[int]:
    first: dict[tuple[str, str, str], int] = {}
    for number, row in enumerate(answers):
        earlier = answers[first.setdefault((row["image"], row["question"], row["label"]), number)]
        if row["parsed"] != earlier["parsed"]:
            ways = " and ".join(sorted((earlier["parsed"], row["parsed"]), reverse=True))
            raise ValueError(f"{row['image']}, {row['question']!r}: answered {ways}; one answer a pair is allowed.")
    return list(first.values())


def _numbered(names: Iterable[Hashable]) -> tuple[Array, int]:
    """The number of each name, and how many there are."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], int), len(numbers)


def _scores(answers: Sequence[Answer]) -> Array | None:
    """Scores `(rows,)`, None if no row has one."""
    found = [row.get("score") for row in answers]
    if all(score is None for score in found):
        return None
    for row, score in zip(answers, found, strict=True):
        if score is None or not np.isfinite(score):
            raise ValueError(f"{row['image']}, {row['question']!r}: score {score}; a number in all rows is allowed.")
    return np.array(found, float)


def _check_rows(entries: Sequence[Mapping[str, Any]]) -> None:
    for entry in entries[1:]:
        first, other = ([tuple(row[key] for key in ROW) for row in e["answers"]] for e in (entries[0], entry))
        if first != other:
            names = f"{entries[0]['name']} and {entry['name']}"
            different = (i for i, (x, y) in enumerate(zip(first, other, strict=False)) if x != y)
            row = next(different, min(len(first), len(other)))
            raise ValueError(f"{names} differ in row {row} of their answers; runs on the same questions are allowed.")


def _agreement(said: Array, right: Array) -> dict[str, Any]:
    """Counts, McNemar's test and agreement of two runs `(2, pairs)`."""
    only_a, only_b = (int(n) for n in ((right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()))
    return {
        "pairs": said.shape[1],
        "a_only_correct": only_a,
        "b_only_correct": only_b,
        "equal_answers": float((said[0] == said[1]).mean()),
        "kappa": cohen_kappa(*said),
        "p": float(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue),
        "questions_needed": questions_needed(said.shape[1], only_a, only_b),
    }


def _differences(
    answers: Sequence[Answer], right: Array, runs: list[tuple[int, int]], settings: tuple[int, float, int]
) -> tuple[Array, Array, Array]:
    """Differences of accuracy with their bounds, each `(2, runs)`: over distinct pairs, and mean over splits."""
    splits, (*by_split, _, unique) = _sets(answers)
    images, clusters = _numbered(row["image"] for row in answers)
    counts = np.concatenate([right, np.ones_like(right[:1])]).T
    sums = np.stack([_sums(counts[rows], images[rows], clusters) for rows in [*by_split, unique]], axis=1)
    a, b = np.array(runs).T

    def statistic(weights: Array) -> Array:
        total = np.tensordot(weights, sums, 1)
        accuracy = ratio(total[..., :-1], total[..., -1:])
        difference = accuracy[..., a] - accuracy[..., b]
        return np.stack([difference[:, -1], difference[:, : len(splits)].mean(axis=1)], axis=1)

    having = (sums[..., -1] > 0).sum(axis=0)
    support = np.array([[having[-1]], [having[:-1].min()]])
    return _intervals(statistic, support, *settings, clusters, lowest=-1)


def _sums(values: Array, clusters: Array, count: int) -> Array:
    """Sums `(count, k)` of the rows of `values` `(rows, k)` in each cluster."""
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, clusters, values)
    return sums


def _sums_of_labels(positive: Array, images: Array, clusters: int, sets: Sequence[Array]) -> Array:
    """Questions `(images, sets, 2)` whose answer is yes, and is no."""
    labels = np.stack([positive, ~positive], axis=-1)
    return np.stack([_sums(labels[rows], images[rows], clusters) for rows in sets], axis=1)


def _support(measure: Measure, counts: Array, labels: Array | None) -> Array:
    """Images `(sets, metrics)` on which each metric rests, from counts `(images, sets, cells)` and of labels."""
    images = [(column > 0).sum(axis=0) for column in measure.support(counts)]
    if labels is not None:
        yes, no = (labels > 0).sum(axis=0).T
        images += [np.minimum(yes, no), yes, images[0]]
    return np.stack(images, axis=-1)


def _described(names: Sequence[str], point: Array, low: Array, high: Array) -> dict[str, Any]:
    bounds = np.stack([low, high], axis=-1).tolist()
    return {**dict(zip(names, point.tolist(), strict=True)), "intervals": dict(zip(names, bounds, strict=True))}


def _intervals(
    measured: Callable[[Array], Array],
    support: Array,
    resamples: int,
    confidence: float,
    seed: int,
    clusters: int,
    lowest: int = 0,
) -> tuple[Array, Array, Array]:
    """Statistics and their lower and upper bounds, percentiles of a bootstrap that draws whole clusters.

    Percentiles stay in the range of the statistic and are finite; BCa is undefined where resamples agree.
    Where they all agree, or there is a single cluster, the bounds would coincide. There they are moved apart by the
    exact binomial bound on the share of clusters that are unlike the `support` ones seen.

    Args:
        measured: statistics (resamples, ...) of weights (resamples, clusters).
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence={confidence}, resamples={resamples}: between 0 and 1, and 1 or more are allowed.")

    def statistic(index: Array, axis: int) -> Array:
        drawn = index + clusters * np.arange(len(index))[:, None]
        weights = np.bincount(drawn.ravel(), minlength=index.size).reshape(index.shape)
        return np.moveaxis(measured(weights.astype(float)), 0, -1)

    point = measured(np.ones((1, clusters)))[0]
    low = high = point
    if clusters > 1:
        low, high = bootstrap(
            (np.arange(clusters),),
            statistic,
            vectorized=True,
            n_resamples=resamples,
            batch=BATCH,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    unseen = np.where(support > 0, 1 - ((1 - confidence) / 2) ** (1 / np.maximum(support, 1)), 1)
    margin = np.where(low == high, unseen, 0)
    return point, np.maximum(low - margin, lowest), np.minimum(high + margin, 1)
