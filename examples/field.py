"""All methods at all budgets on the reference model: tables and figure of docs/field.md. `make field` calls it.

    python examples/field.py --results results/field --page docs/field.md

Answers are kept in the results folder: a run that was stopped goes on, and a finished one takes no time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from scipy.stats import permutation_test
from study import bounded, fill, markdown, save

from llava_sparse import list_methods
from llava_sparse.benchmark import bench
from llava_sparse.evaluation import evaluate_pope, figures, load_model

log = Console(stderr=True)
BUDGETS = (192, 128, 64, 32, 16)
# Five layers of the reference model's tower, each halving at most, leave 18 of 576 tokens.
IMPOSSIBLE = {("tome", 16)}
OURS = "delegate"
ABLATIONS = [f"{OURS}:{option}" for option in ("proportional=false", "beta=0", "beta=2", "beta=4")]
COMPOSED = ["divprune+sparsevlm", "divprune+fastv"]
PREFILL = {"batch_sizes": (8,), "new_tokens": 1, "rounds": 5, "warm_up": 1}


def run(budget: int, folder: Path, limit: int | None, loaded: Any) -> dict[str, Any]:
    """All methods at one budget, and at 64 and 32 the variants of ours."""
    methods = [name for name in list_methods() if (name, budget) not in IMPOSSIBLE]
    extra = [*ABLATIONS, *COMPOSED] if budget in (64, 32) else []
    log.print(f"{budget} tokens", highlight=False)
    return evaluate_pope(
        loaded, methods=["dense", *methods, *extra], budget=[budget], batch_size=24, limit=limit,
        output=folder / f"{budget}.json",
        on_progress=lambda name, done, total: log.print(f"  {name}: {done}/{total}") if done in (0, total) else None,
    )  # fmt: skip


def right_by_picture(entry: dict[str, Any]) -> np.ndarray:
    """Right answers about each picture over all splits, as shares of all questions."""
    answers = entry["answers"]
    names = sorted({answer["image"] for answer in answers})
    right = dict.fromkeys(names, 0)
    for answer in answers:
        right[answer["image"]] += answer["parsed"] == answer["label"]
    return np.array([right[name] for name in names]) / len(answers)


def paired_p(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Two-sided p of equal accuracy: signs of the pictures' differences are flipped at random, 99,999 times."""
    rights = right_by_picture(a), right_by_picture(b)
    if len(rights[0]) < 2:
        return 1.0
    found = permutation_test(
        rights, lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples", vectorized=True, n_resamples=99_999, rng=np.random.default_rng(0), batch=2_000,
    )  # fmt: skip
    return float(found.pvalue)


def by_method(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"].partition("@")[0]: entry for entry in results["methods"]}


def difference(results: dict[str, Any], a: str, b: str) -> str:
    """Points by which run `a` is better than `b`, in the mean of the splits, with interval and p."""
    found = by_method(results)
    if a not in found or b not in found or a == b:
        return ""
    names = {found[a]["name"], found[b]["name"]}
    pair = next(pair for pair in results["comparisons"] if {pair["a"], pair["b"]} == names)
    sign = 1 if pair["a"] == found[a]["name"] else -1
    low, high = sorted(100 * sign * bound for bound in pair["average_interval"])
    p = paired_p(found[a], found[b])
    level = f"{p:.0e}" if p < 0.001 else f"{p:.3f}"
    return f"{100 * sign * pair['average_difference']:+.1f} [{low:+.1f}, {high:+.1f}], p {level}"


def accuracies(found: dict[int, dict[str, Any]]) -> str:
    """A row for every method: accuracy at every budget, best first at 64 tokens."""
    by_budget = {budget: by_method(results) for budget, results in found.items()}
    at = by_budget[64]
    names = sorted(
        (name for name in at if ":" not in name), key=lambda name: -at[name]["scores"]["average"]["accuracy"]
    )
    rows = [
        [name, *(bounded(part[name]["scores"]["average"], "accuracy") if name in part else "–"
                 for part in by_budget.values())]
        for name in names
    ]  # fmt: skip
    return markdown(["accuracy", *(f"{budget} tokens" for budget in by_budget)], rows)


def tests(results: dict[str, Any]) -> str:
    """Every method against random, VisionZip and ours."""
    rows = [
        [name, f"{entry['visual_tokens']:.0f}", difference(results, name, "random"),
         difference(results, name, "visionzip"), difference(results, OURS, name)]
        for name, entry in by_method(results).items()
        if name != OURS
    ]  # fmt: skip
    columns = ["run", "visual tokens in the mean", "less random", "less VisionZip", f"{OURS} less the run"]
    return markdown(columns, rows)


def ablations(results: dict[str, Any]) -> str:
    found = by_method(results)
    rows = [
        [name, *(bounded(found[name]["scores"]["average"], metric) for metric in ("accuracy", "precision", "recall")),
         difference(results, OURS, name)]
        for name in (OURS, *ABLATIONS)
    ]  # fmt: skip
    return markdown(["run", "accuracy", "precision", "recall", f"{OURS} less the run"], rows)


def pareto(found: dict[int, dict[str, Any]], times: dict[str, Any]) -> tuple[Any, str]:
    """Accuracy against the time of a prefill as a share of the dense one's, and who is beaten by none."""
    shares = {
        e["run"].partition("#")[0]: 1 / e["speedup"]["prefill"]["median"] for e in times["results"] if "speedup" in e
    }
    shares["dense"] = 1.0
    points: dict[str, tuple[float, float]] = {}
    for results in found.values():
        for entry in results["methods"]:
            if ":" not in entry["name"] and (name := entry["name"].partition("#")[0]) in shares:
                points[name] = (100 * shares[name], 100 * entry["scores"]["average"]["accuracy"])
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    names = list(dict.fromkeys(name.partition("@")[0] for name in points))
    for method, style in zip(names, figures.styles(names), strict=True):
        line = sorted(place for name, place in points.items() if name.partition("@")[0] == method)
        axes.plot(*zip(*line, strict=True), label=method, **style)
    axes.plot(
        *zip(*(points[name] for name in front), strict=True), color="black", lw=5, alpha=0.15, label="Pareto front"
    )
    axes.set(xlabel="time of a prefill, % of the dense one's (batch 8)", ylabel="accuracy, %, mean of the splits")
    axes.legend(ncols=2, fontsize="small")
    return figure, markdown(
        ["run", "prefill, % of dense", "accuracy"], [[n, *(f"{x:.1f}" for x in points[n])] for n in front]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/field"), help="folder for answers and results")
    parser.add_argument(
        "--page", type=Path, help="page whose tables are renewed, with the figure in a folder beside it"
    )
    parser.add_argument("--limit", type=int, help="questions per split")
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    loaded = load_model()
    found = {budget: run(budget, given.results, given.limit, loaded) for budget in BUDGETS}
    times: dict[str, Any] = {"results": []}
    for budget in BUDGETS:
        names = [name for name in list_methods() if (name, budget) not in IMPOSSIBLE]
        output = given.results / f"prefill_{budget}.json"
        times["results"] += bench(None, None, names, [budget], output=output, **PREFILL)["results"]  # type: ignore[arg-type]
    figure, front = pareto(found, times)
    tables = {"accuracy": accuracies(found), "front": front}
    tables |= {f"tests {budget}": tests(found[budget]) for budget in BUDGETS}
    tables |= {f"ablations {budget}": ablations(found[budget]) for budget in (64, 32)}
    if given.page is None:
        for name, text in tables.items():
            print(f"{name}\n\n{text}\n")
        return
    fill(given.page, tables)
    pictures = given.page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    save(figure, pictures / "pareto.png")


if __name__ == "__main__":
    main()
