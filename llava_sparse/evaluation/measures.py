"""What is counted of answers, and the metrics of the counts: of one run, or of all resamples of a bootstrap at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .curves import ratio

Array = NDArray[Any]


@dataclass(frozen=True)
class Measure:
    """What is counted of answers, and the metrics of the counts.

    Attributes:
        metrics: their names, accuracy first.
        cells: of labels and parsed answers `(n,)` the bool counts `(n, cells)`.
        rates: of counts `(..., cells)` the metrics `(..., metrics)`, from 0 to 1.
        support: of counts `(..., cells)`, for each metric how many questions `(...,)` it rests on.
    """

    metrics: tuple[str, ...]
    cells: Callable[[Array, Array], Array]
    rates: Callable[[Array], Array]
    support: Callable[[Array], list[Array]]


def _yes_no_cells(labels: Array, parsed: Array) -> Array:
    positive, said = labels == "yes", parsed == "yes"
    return np.stack([positive & said, ~positive & said, positive & ~said, ~positive & ~said], axis=-1)


def _yes_no_rates(cells: Array) -> Array:
    hits, alarms, misses, _ = np.moveaxis(cells, -1, 0)
    total = cells.sum(axis=-1)
    precision, recall = ratio(hits, hits + alarms), ratio(hits, hits + misses)
    f1 = ratio(2 * precision * recall, precision + recall)
    return np.stack(
        [ratio(total - alarms - misses, total), precision, recall, f1, ratio(hits + alarms, total)], axis=-1
    )


def _yes_no_support(cells: Array) -> list[Array]:
    hits, alarms, misses, rest = np.moveaxis(cells, -1, 0)
    total = hits + alarms + misses + rest
    return [total, hits + alarms, hits + misses, hits + alarms + misses, total]


def _right(labels: Array, parsed: Array) -> Array:
    return np.stack([labels == parsed, labels != parsed], axis=-1)


# Of questions whose answer is yes or no; "yes" is the positive class.
YES_NO = Measure(("accuracy", "precision", "recall", "f1", "yes_ratio"), _yes_no_cells, _yes_no_rates, _yes_no_support)
# Of questions with any answer.
ACCURACY = Measure(
    ("accuracy",),
    _right,
    lambda cells: ratio(cells[..., :1], cells.sum(axis=-1, keepdims=True)),
    lambda cells: [cells.sum(axis=-1)],
)
METRICS = YES_NO.metrics
