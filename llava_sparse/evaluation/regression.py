"""A logistic regression that says what it left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from statsmodels.discrete.discrete_model import Logit

Array = NDArray[Any]


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
