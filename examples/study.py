"""The whole study on the reference model: every run, table and figure of docs/study.md. `make study` calls it.

    python examples/study.py --results results/study --page docs/study.md

Answers are kept in the results folder, so that a run that was stopped goes on, and a finished one takes no time.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_sparse.evaluation import evaluate_pope, figures, load_model
from llava_sparse.evaluation.answer_log import read_log
from llava_sparse.evaluation.failures import failure_curves, load_objects
from llava_sparse.evaluation.statistics import kept_overlap, unpack_kept
from llava_sparse.reference import SCENES

log = Console(stderr=True)
BUDGETS = (192, 128, 96, 64)
SEEDS = (0, 1, 2)
LAYERS = "[1,3,5]"
# Kept tokens as published for 192, 128, 96, 64, and scales of the rank with about as many tokens in the mean.
FIXED = ("[300,200,110]", "[303,110,36]", "[238,48,26]", "[66,30,17]")
ADAPTIVE = (68, 48, 33, 12)


@dataclass(frozen=True)
class Part:
    """Runs that are compared with each other; arguments as of `evaluate_pope`."""

    name: str
    methods: Sequence[str]
    budgets: Sequence[int] = (64,)
    seeds: Sequence[int] = (0,)
    answer_mode: str = "logits"


PARTS = [
    Part("protocol", ["dense", "visionzip", "sparsevlm"], answer_mode="text"),
    Part("budgets", ["dense", "visionzip", "sparsevlm", "random"], (*BUDGETS, 32), SEEDS),
    Part("raters", [f"sparsevlm:raters={r}" for r in ("selected", "text", "all")], BUDGETS),
    Part("recycling", ["sparsevlm", "sparsevlm:recycle=false"], BUDGETS),
    Part(
        "adaptive",
        [
            *(f"sparsevlm:layers={LAYERS}:budgets={kept}" for kept in FIXED),
            *(f"sparsevlm:version=1.0:layers={LAYERS}:scale={scale}" for scale in ADAPTIVE),
        ],
    ),
    Part("split", [f"visionzip:budgets=[{64 - n},{n}]" for n in (0, 5, 10, 20, 32, 48, 63)]),
    Part("depth", ["dense", *(f"random_decoder:layers=[{n}]:budgets=[64]" for n in (1, 3, 5))], seeds=SEEDS),
]


def run(part: Part, folder: Path, limit: int | None, loaded: Any) -> dict[str, Any]:
    """Runs a part, or takes over what there is of it."""
    log.print(f"{part.name}: {', '.join(part.methods)} at {', '.join(map(str, part.budgets))}", highlight=False)
    results = evaluate_pope(
        loaded, methods=part.methods, budget=part.budgets, seeds=part.seeds, answer_mode=part.answer_mode,
        batch_size=24, limit=limit, output=folder / f"{part.name}.json",
        on_progress=lambda name, done, total: log.print(f"  {name}: {done}/{total}") if done in (0, total) else None,
    )  # fmt: skip
    kept: dict[str, dict[tuple[str, str], list[str]]] = {}
    for (name, *pair), line in read_log(folder / f"{part.name}.answers.jsonl")[1].items():
        kept.setdefault(name, {})[pair[0], pair[1]] = line["kept"]
    return {**results, "kept": kept}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bounded(part: dict[str, Any], metric: str) -> str:
    low, high = part["intervals"][metric]
    return f"{100 * part[metric]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def scores(results: dict[str, Any], metrics: Sequence[str] = ("accuracy", "precision", "recall", "f1")) -> str:
    """A row for every run: means over the splits, with intervals."""
    rows = [
        [e["name"], f"{e['visual_tokens']:.1f}", *(bounded(e["scores"]["average"], metric) for metric in metrics)]
        for e in results["methods"]
    ]
    return markdown(["run", "visual tokens", *metrics], rows)


def aggregations(results: dict[str, Any]) -> str:
    rows = []
    for entry in results["methods"]:
        found = entry["scores"]
        parts = [*found["splits"].values(), found["average"], found["pooled"], found["unique"]]
        rows.append([entry["name"], *(f"{100 * p['accuracy']:.1f} / {100 * p['f1']:.1f}" for p in parts)])
    return markdown(["run", *found["splits"], "mean of splits", "pooled", "distinct pairs"], rows)


def comparisons(results: dict[str, Any], pairs: Sequence[tuple[str, str]] | None = None) -> str:
    """A row for every two runs, or for some."""
    rows = []
    for pair in results["comparisons"]:
        if pairs is not None and (pair["a"], pair["b"]) not in pairs:
            continue
        rows.append(
            [
                f"{pair['a']} − {pair['b']}",
                *(difference(pair, prefix) for prefix in ("average_", "")),
                f"{pair['a_only_correct']} / {pair['b_only_correct']}",
                f"{pair['p']:.2g}",
                f"{pair['p_holm']:.2g}",
                f"{100 * pair['equal_answers']:.1f}",
                f"{pair['kappa']:.2f}",
            ]
        )
    columns = ["mean of splits", "distinct pairs", "only one right", "p", "p (Holm)", "equal answers", "kappa"]
    return markdown(["pair", *columns], rows)


def difference(pair: dict[str, Any], prefix: str) -> str:
    low, high = pair[f"{prefix}interval"]
    return f"{100 * pair[f'{prefix}difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def ablation_tests(found: dict[str, Any]) -> str:
    """Each ablation against the method as published, at the same budget."""
    tables = []
    for part in ("raters", "recycling", "adaptive", "split"):
        names = [entry["name"] for entry in found[part]["methods"]]
        if part == "adaptive":
            half = len(names) // 2
            pairs = list(zip(names[:half], names[half:], strict=True))
        elif part == "split":
            first = next(name for name in names if "[54,10]" in name)
            pairs = [tuple(sorted((first, name), key=names.index)) for name in names if name != first]
        else:
            pairs = [(a, b) for a in names for b in names if a.partition("@")[2] == b.partition("@")[2]]
            published = names[0].partition("@")[0]
            pairs = [(a, b) for a, b in pairs if a.partition("@")[0] == published]
        tables.append(comparisons(found[part], pairs))
    head, rule, *rows = tables[0].splitlines()
    return "\n".join([head, rule, *rows, *(row for table in tables[1:] for row in table.splitlines()[2:])])


def failures(results: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Recall by what the asked object is like, a column for every run."""
    objects = load_objects(SCENES / "objects.jsonl")
    curves = [failure_curves(entry, results["kept"][entry["name"]], objects) for entry in results["methods"]]
    rows = []
    for feature in figures.FEATURES:
        found = [{(b["low"], b["high"]): b for b in curve["recall"].get(feature, [])} for curve in curves]
        for place in sorted({place for bins in found for place in bins}):
            cells = [
                f"{100 * b['rate']:.0f} [{100 * b['interval'][0]:.0f}, {100 * b['interval'][1]:.0f}] (n {b['count']})"
                if (b := bins.get(place))
                else "–"
                for bins in found
            ]
            rows.append([f"{feature} {figures.bin_name(*place)}", *cells])
    return markdown(["recall by", *(curve["run"] for curve in curves)], rows), curves


def overlaps(results: dict[str, Any]) -> str:
    """IoU of the patches that the runs keep at their last stage."""
    pruned = [entry for entry in results["methods"] if entry["kind"]]
    pairs = sorted(results["kept"][pruned[0]["name"]])
    masks = {
        entry["name"]: [unpack_kept(results["kept"][entry["name"]][pair][-1], entry["patches"]) for pair in pairs]
        for entry in pruned
    }
    names = list(masks)
    return markdown(["IoU", *names], [[a, *(f"{kept_overlap(masks[a], masks[b]):.2f}" for b in names)] for a in names])


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)


def fill(page: Path, tables: dict[str, str]) -> None:
    """Puts tables between the page's `<!-- table: name -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marked.subn(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"{page}: the marks of the table {name!r} are there {count} times; once is needed.")
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/study"), help="folder for answers and results")
    parser.add_argument("--page", type=Path, help="page whose tables are renewed, with figures in a folder beside it")
    parser.add_argument("--limit", type=int, help="questions per split")
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    loaded = load_model()
    found = {part.name: run(part, given.results, given.limit, loaded) for part in PARTS}
    table: Callable[..., str] = scores
    recall, curves = failures(found["protocol"])
    tables = {part.name: table(found[part.name]) for part in PARTS}
    tables |= {
        "aggregations": aggregations(found["protocol"]),
        "tests": comparisons(found["protocol"]),
        "failures": recall,
        "overlaps": overlaps(found["protocol"]),
        "ablations": ablation_tests(found),
        "scores": scores(found["budgets"], ("roc_auc", "average_precision", "brier")),
    }
    if given.page is None:
        for name, text in tables.items():
            print(f"{name}\n\n{text}\n")
        return
    fill(given.page, tables)
    pictures = given.page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    at_64 = [e for e in found["budgets"]["methods"] if e["budget"] in (None, 64) and e["seed"] in (None, 0)]
    save(figures.accuracy_against_tokens(found["budgets"]["methods"]), pictures / "accuracy.png")
    save(figures.precision_recall(at_64), pictures / "precision_recall.png")
    save(figures.failure(curves), pictures / "failure.png")
    save(figures.survival(curves), pictures / "survival.png")


if __name__ == "__main__":
    main()
