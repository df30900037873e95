"""Curves of answers with scores, and the numbers that sum them up: functions on plain data.

`labels` `(n,)` are 1 for yes and 0 for no. `scores` `(n,)` are finite, higher for yes; equal ones share a threshold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

Array = NDArray[Any]

# Those that `score_rates` gives.
SCORE_METRICS = ("roc_auc", "average_precision", "brier")


def ratio(dividend: Array, divisor: Array) -> Array:
    """The quotient, 0 where the divisor is."""
    return np.divide(dividend, divisor, out=np.zeros(np.shape(dividend)), where=divisor != 0)


def precision_recall_curve(labels: ArrayLike, scores: ArrayLike) -> tuple[Array, Array, Array]:
    """Precision and recall `(thresholds,)` of "yes from this score on", and the distinct scores, descending.

    Recall is 0 without a yes among the labels.

    Raises:
        ValueError: for labels or scores that are not allowed, not equally many, or none.
    """
    positive, values = _checked(labels, scores)
    thresholds, hits, alarms = _at_thresholds(positive, values, np.ones(len(values)))
    return ratio(hits, hits + alarms), ratio(hits, hits[-1:]), thresholds


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a yes scores above a no, ties counting half; 0.5 where one of the labels is missing.

    Errors as for `precision_recall_curve`.
    """
    positive, values = _checked(labels, scores)
    return float(score_rates(positive, values, np.ones((1, len(values))))[0, 0])


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Precision at each threshold, weighted by the recall it adds; 0 without a yes.

    Errors as for `precision_recall_curve`.
    """
    positive, values = _checked(labels, scores)
    return float(score_rates(positive, values, np.ones((1, len(values))))[0, 1])


def calibration(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> dict[str, Any]:
    """How far probabilities of yes are true.

    Args:
        labels: `(n,)`.
        probabilities: `(n,)`, from 0 to 1.
        bins: how many of equal width; a bound belongs to the bin above it.

    Returns:
        `bins`, of those that are not empty: low, high, count, mean probability and frequency of yes; `ece`, the mean
        distance of the two over all rows; `brier`, the mean squared error.

    Raises:
        ValueError: as for `precision_recall_curve`, and for probabilities outside [0, 1].
    """
    positive, values = _checked(labels, probabilities)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"probabilities from {values.min()} to {values.max()}: from 0 to 1 is allowed.")
    bin_of = np.digitize(values, np.arange(1, bins) / bins)
    shown = [
        {
            "low": k / bins,
            "high": (k + 1) / bins,
            "count": int((bin_of == k).sum()),
            "probability": float(values[bin_of == k].mean()),
            "frequency": float(positive[bin_of == k].mean()),
        }
        for k in np.unique(bin_of).tolist()
    ]
    ece = sum(bin["count"] * abs(bin["probability"] - bin["frequency"]) for bin in shown) / len(values)
    return {"bins": shown, "ece": ece, "brier": float(((values - positive) ** 2).mean())}


def risk_coverage(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the risk-coverage curve (AURC): the share of wrong answers among the surest k, in the mean over k.

    An answer is as sure as its score is far from 0; equally sure ones are wrong as often as all of them are.
    Errors as for `precision_recall_curve`.
    """
    positive, values = _checked(labels, scores)
    wrong = ((values > 0) != positive).astype(float)
    _, group = np.unique(-np.abs(values), return_inverse=True)
    wrong = (np.bincount(group, wrong) / np.bincount(group))[np.sort(group)]
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def score_rates(positive: Array, scores: Array, weights: Array) -> Array:
    """`SCORE_METRICS` `(resamples, 3)` of rows with weights `(resamples, rows)`, for the probability sigmoid(score)."""
    _, hits, alarms = _at_thresholds(positive, scores, weights)
    added = np.diff(hits, prepend=0)
    area = (np.diff(alarms, prepend=0) * (hits - added / 2)).sum(axis=-1)
    whole = hits[..., -1] * alarms[..., -1]
    area = np.where(whole > 0, ratio(area, whole), 0.5)
    precision = ratio((added * ratio(hits, hits + alarms)).sum(axis=-1), hits[..., -1])
    brier = ratio(weights @ (expit(scores) - positive) ** 2, weights.sum(axis=-1))
    return np.stack([area, precision, brier], axis=-1)


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[Array, Array]:
    given, values = np.asarray(labels), np.asarray(scores, float)
    if given.ndim != 1 or given.shape != values.shape or not len(given):
        raise ValueError(f"labels {given.shape}, scores {values.shape}: two lists of the same length are allowed.")
    if not np.isin(given, (0, 1)).all() or not np.isfinite(values).all():
        raise ValueError("labels 1 and 0 and finite scores are allowed.")
    return given.astype(bool), values


def _at_thresholds(positive: Array, scores: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Distinct scores, descending, and the weight `(..., thresholds)` of yes and of no from each score on."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    weights = weights[..., order]
    hits = np.cumsum(weights * positive[order], axis=-1)[..., last]
    return scores[order][last], hits, np.cumsum(weights, axis=-1)[..., last] - hits
