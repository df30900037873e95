"""What tuning the projector gives back of what few tokens cost, and what a step takes: the tables of a page."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import paired_p, right_by_picture
from scipy.stats import bootstrap
from study import bounded, difference, fill, markdown

import llava_sparse
from llava_sparse.benchmark import build_model, make_inputs
from llava_sparse.benchmark.timing import Clock, interleaved, spread
from llava_sparse.evaluation import compare, evaluate_pope, load_model

from .training import PROJECTOR, Tuning, tune

METHODS = ("visionzip", "divprune", "sparsevlm")
# Of each run the method and what the rate is multiplied by.
RUNS = {name: (name, 1.0) for name in METHODS} | {"sparsevlm-0.1": ("sparsevlm", 0.1)}
BUDGET = 16
# Shape, prompts of a step, rounds; None is the model that is tuned.
TIMED: tuple[tuple[str | None, int, int], ...] = ((None, 4, 5), ("small", 1, 3))


def measure(tuning: Tuning, page: Path | None, limit: int | None) -> None:
    """Tunes for `BUDGET` tokens of each method, asks the held-out questions before and after, and writes tables.

    Args:
        tuning: as for one method, whose folder each method's results get a folder in.
        page: whose tables are renewed; printed by default. limit: questions per split.
    """
    tuned = {
        name: tune(
            replace(tuning, method=method, budget=BUDGET, rate=factor * tuning.rate, output=tuning.output / name)
        )
        for name, (method, factor) in RUNS.items()
    }
    ask = partial(evaluate_pope, budget=BUDGET, batch_size=24, limit=limit, answer_mode="logits", on_progress=_tell)
    before = ask(load_model(tuning.model), methods=["dense", *METHODS], output=tuning.output / "before.json")
    runs = {_name(entry): entry for entry in before["methods"]}
    for name, folder in tuned.items():
        methods = ["dense", RUNS[name][0]]
        after = ask(load_model(folder), methods=methods, output=tuning.output / f"after_{name}.json")
        runs |= dict(zip((f"dense, tuned for {name}", f"{name}, tuned"), after["methods"], strict=True))
    pairs = {(pair["a"], pair["b"]): pair for pair in compare([{**run, "name": n} for n, run in runs.items()])}
    tables = {"accuracy": accuracies(runs, pairs), "answers": answers(runs), "steps": steps(tuning)}
    if page is not None:
        fill(page, tables)
        return
    for name, text in tables.items():
        print(f"{name}\n\n{text}\n")


def _tell(name: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"  {name}: {done}/{total}", flush=True)


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).partition("@")[0]


def accuracies(runs: dict[str, Any], pairs: dict[tuple[str, str], Any]) -> str:
    """A row for each method: before, after, their difference, and the share of the loss against dense that is back."""
    rows = []
    for run, (method, _) in RUNS.items():
        names = (method, f"{run}, tuned", f"dense, tuned for {run}")
        old, new, dense = (runs[name] for name in names)
        pair = pairs[names[0], names[1]]
        flipped = {**pair, "average_difference": -pair["average_difference"],
                   "average_interval": sorted(-bound for bound in pair["average_interval"])}  # fmt: skip
        rows.append(
            [
                run,
                *(bounded(entry["scores"]["average"], "accuracy") for entry in (old, new)),
                difference(flipped, "average_"),
                f"{pair['b_only_correct']} / {pair['a_only_correct']}",
                f"{pair['p']:.2g}",
                f"{paired_p(new, old):.2g}",
                share_back(runs["dense"], old, new),
                bounded(dense["scores"]["average"], "accuracy"),
            ]
        )
    columns = [f"{BUDGET} tokens", "before", "after", "after − before", "only after / only before right",
               "p (McNemar)", "p (pictures)", "of the loss against dense, back", "tuned weights, dense"]  # fmt: skip
    head = f"Dense, before: {bounded(runs['dense']['scores']['average'], 'accuracy')}.\n\n"
    return head + markdown(columns, rows)


def answers(runs: dict[str, Any]) -> str:
    """A row for each run: what kind of mistakes it makes, and how well its scores part yes from no at any threshold."""
    metrics = ("yes_ratio", "precision", "recall", "roc_auc")
    rows = [
        [
            name,
            *(bounded(run["scores"]["average"], metric) for metric in metrics),
            f"{100 * at_best(run['answers']):.1f}",
        ]
        for name, run in runs.items()
    ]
    return markdown(["run", "says yes", "precision", "recall", "ROC-AUC", "accuracy at the best threshold"], rows)


def at_best(answers: list[dict[str, Any]]) -> float:
    """Mean of the splits' accuracies with the threshold of the score that is best for these very answers."""
    splits = [row["split"] for row in answers]
    weights = np.array([1 / (len(set(splits)) * splits.count(split)) for split in splits])
    scores, yes = np.array([row["score"] for row in answers]), np.array([row["label"] == "yes" for row in answers])
    order = np.argsort(-scores, kind="stable")
    # Of the answers down to each one taken as yes: what is right more than if none were.
    gained = np.cumsum(np.where(yes, weights, -weights)[order])
    last = np.append(np.diff(scores[order]) != 0, True)
    return float(weights[~yes].sum() + max(0.0, gained[last].max()))


def share_back(dense: Any, before: Any, after: Any) -> str:
    """(after − before) / (dense − before) in percent, with its interval by bootstrap over pictures."""
    right = [right_by_picture(entry) for entry in (dense, before, after)]

    def share(d: np.ndarray, b: np.ndarray, a: np.ndarray, axis: int = -1) -> np.ndarray:
        lost, back = (d - b).sum(axis), (a - b).sum(axis)
        return 100 * back / np.where(lost == 0, np.nan, lost)

    value = float(share(*right))
    if len(right[0]) < 2 or not np.isfinite(value):
        return "–"
    found = bootstrap(
        right, share, paired=True, vectorized=True, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return f"{value:.0f} % [{found.low:.0f}, {found.high:.0f}]"


def steps(tuning: Tuning) -> str:
    """Time of a training step of the projector, dense and pruned taking turns, of each of `TIMED`."""
    rows = []
    for shape, prompts, rounds in TIMED:
        dense = load_model(tuning.model, "float32").model if shape is None else build_model(shape, torch.float32, "cpu")
        model = llava_sparse.sparsify(dense, None)
        inputs = make_inputs(model, prompts, 40)
        calls = {name: partial(_step_seconds, model, name, inputs) for name in ("dense", *METHODS)}
        found = {name: spread(values) for name, values in interleaved(calls, rounds, 1).items()}
        base = found["dense"]["values"]
        for name, times in found.items():
            faster = spread([a / b for a, b in zip(base, times["values"], strict=True)])
            rows.append(
                [f"{shape or 'reference'}, {prompts} prompts", name, f"{times['median']:.2f}",
                 f"{faster['median']:.2f} [{faster['low']:.2f}, {faster['high']:.2f}]"]
            )  # fmt: skip
    return markdown(["model", f"run, {BUDGET} tokens", "seconds a step", "times faster than dense"], rows)


def _step_seconds(model: Any, method: str, inputs: dict[str, Any]) -> float:
    """Forward, backward and update of the projector, the last ten tokens being the answer."""
    model.set_sparsity(*(() if method == "dense" else (method, BUDGET)))
    model.train().requires_grad_(False)
    projector = model.get_submodule(PROJECTOR).requires_grad_(True)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=1e-6)
    labels = inputs["input_ids"].clone()
    labels[:, :-10] = -100

    def step() -> None:
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return Clock(model.device).time(step)
