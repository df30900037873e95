"""The sections of a report on a results file: tables, figures and examples, or the reason why they are left out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from . import figures
from .analysis import Pair, disagreements
from .curves import SCORE_METRICS
from .report_failures import failures
from .report_parts import (
    LONG,
    OLD_FILE,
    Article,
    Cell,
    Drawing,
    Entry,
    Example,
    Section,
    Shot,
    Source,
    Table,
    bounds,
    by_budget,
    number_cell,
    p_text,
    parts_of,
    percent,
    percent_cell,
    plain,
    thumbnail,
    title_of,
)
from .statistics import METRICS, kept_overlap, unpack_kept

EXAMPLES = 6
SIGNIFICANT = 0.05
AGGREGATIONS = {"average": "mean over splits", "pooled": "all rows", "unique": "distinct pairs"}


def article(source: Source) -> Article:
    """The report on one results file.

    Raises:
        ValueError: if objects, masks or pictures do not fit the answers.
    """
    settings, counts = source.results["settings"], source.results["questions"]
    summary = (
        f"Model {settings['model']}, questions {settings['dataset']}: {len(source.entries)} runs, "
        f"{counts['scored']:,} questions scored, {counts['asked']:,} distinct (image, question) pairs of "
        f"{counts['images']:,} images."
    )
    parts = (scores, aggregations, tests, agreement, thresholds, failures, examples, questions, how)
    return Article(source.name, summary, [part(source) for part in parts])


def scores(source: Source) -> Section:
    """The main table, and accuracy against tokens."""
    section = Section("Scores")
    averages = [parts_of(entry)["average"] for entry in source.entries]
    rows = [
        [entry["name"], _tokens(entry), *(percent_cell(average, name) for name in METRICS)]
        for entry, average in zip(source.entries, averages, strict=True)
    ]
    caption = f"Mean over the splits, as papers print it, in percent. {_interval_words(source)}"
    section.tables.append(Table(caption, ["run", "visual tokens", *map(title_of, METRICS)], rows))
    best = max(range(len(rows)), key=lambda number: averages[number]["accuracy"])
    alt = (
        f"Accuracy against visual tokens of {len(rows)} runs; the highest is {percent(averages[best]['accuracy'])} "
        f"percent, of {source.entries[best]['name']}. The table has the numbers."
    )
    words = "Accuracy against visual tokens. The band is the interval of the dense model."
    section.drawings.append([Drawing(partial(figures.accuracy_against_tokens, source.entries), alt, words)])
    if not all("intervals" in average for average in averages):
        section.left_out.append(f"Intervals: {OLD_FILE}, which computed none.")
    return section


def aggregations(source: Source) -> Section:
    """Accuracy and F1 of each split and of each way to put them together."""
    section = Section("Aggregations side by side")
    splits = list(parts_of(source.entries[0])["splits"])
    if not all("scores" in entry for entry in source.entries):
        section.left_out.append(f"All rows as one set, and distinct pairs: {OLD_FILE}.")
    for metric, title in (("accuracy", "Accuracy"), ("f1", "F1")):
        rows: list[list[str | Cell]] = []
        for entry in source.entries:
            parts = parts_of(entry)
            sets = [parts["splits"].get(split) for split in splits] + [parts.get(name) for name in AGGREGATIONS]
            rows.append([entry["name"], *("–" if part is None else percent_cell(part, metric) for part in sets)])
        caption = (
            f"{title} in percent. Papers print the mean over the splits. Positive questions repeat in the splits; "
            "as distinct pairs they count once."
        )
        section.tables.append(Table(caption, ["run", *splits, *AGGREGATIONS.values()], rows))
    return section


def tests(source: Source) -> Section:
    """McNemar's test of every two runs, with Holm's correction."""
    section = Section("Tests of every two runs")
    compared = source.results.get("comparisons") or []
    if not compared:
        section.left_out.append(_no_comparisons(source))
        return section
    rows: list[list[str | Cell]] = [
        [
            pair["a"],
            pair["b"],
            Cell(f"{100 * pair['difference']:+.1f}", bounds(pair["interval"], "+.1f")),
            str(pair["a_only_correct"]),
            str(pair["b_only_correct"]),
            p_text(pair["p"]),
            p_text(pair["p_holm"]),
            "yes" if pair["p_holm"] < SIGNIFICANT else "no",
        ]
        for pair in compared
    ]
    different = sum(row[-1] == "yes" for row in rows)
    section.text.append(f"{different} of {len(rows)} pairs of runs differ at the level {SIGNIFICANT}, corrected.")
    caption = (
        f"Accuracy of a minus that of b in points, over {compared[0]['pairs']:,} distinct pairs; what only a or only b "
        f"answers right; McNemar's exact test, with Holm's correction for {len(rows)} comparisons."
    )
    columns = ["a", "b", "a − b", "only a right", "only b right", "p", "p (Holm)", f"below {SIGNIFICANT}"]
    section.tables += _pairs_of_runs(caption, columns, rows)
    return section


def agreement(source: Source) -> Section:
    """How alike runs answer, and what they keep."""
    section = Section("Agreement")
    compared = source.results.get("comparisons") or []
    if not compared:
        section.left_out.append(_no_comparisons(source))
        return section
    if source.no_kept:
        section.left_out.append(f"Overlap of kept patches: {source.no_kept}")
    last = {entry["name"]: _last_masks(entry, source) for entry in source.entries}
    rows: list[list[str | Cell]] = []
    for pair in compared:
        a, b = (last.get(pair[side], {}) for side in ("a", "b"))
        shared = sorted(a.keys() & b.keys())
        overlap = f"{kept_overlap([a[key] for key in shared], [b[key] for key in shared]):.2f}" if shared else "–"
        rows.append([pair["a"], pair["b"], percent(pair["equal_answers"]), f"{pair['kappa']:.2f}", overlap])
    caption = (
        "Distinct pairs that two runs answer alike, in percent; Cohen's kappa; overlap (intersection over union) of "
        "the patches that are tokens of their own after the last stage."
    )
    columns = ["a", "b", "equal answers", "kappa", "overlap of patches"]
    section.tables += _pairs_of_runs(caption, columns, rows)
    return section


def thresholds(source: Source) -> Section:
    """Curves of answers with scores."""
    section = Section("Precision, recall and calibration")
    entries = [entry for entry in source.entries if "score" in entry["answers"][0]]
    if not entries:
        section.left_out.append("Curves: these answers have no scores; --answer-mode logits gives them.")
        return section
    unique = [parts_of(entry).get("unique", {}) for entry in entries]
    columns = [name for name in (*SCORE_METRICS, "ece") if all(name in part for part in unique)]
    rows = [
        [entry["name"], *(number_cell(part, name) for name in columns)]
        for entry, part in zip(entries, unique, strict=True)
    ]
    if columns:
        caption = "Over distinct pairs. Of Brier score and calibration error (ECE), lower is better."
        section.tables.append(Table(caption, ["run", *map(title_of, columns)], rows))
    for words, group in by_budget(entries):
        names = ", ".join(entry["name"] for entry in group)
        section.drawings.append(
            [
                Drawing(
                    partial(figures.precision_recall, group),
                    f"Precision-recall curves of {names}.",
                    f"Precision against recall{words}. The marker is where yes is as probable as no.",
                ),
                Drawing(
                    partial(figures.calibration_curve, group),
                    f"Calibration curves of {names}.",
                    f"Calibration{words}: probabilities on the diagonal are true. Markers grow with their questions.",
                ),
            ]
        )
    return section


def examples(source: Source) -> Section:
    """Pictures with a question that runs answer differently."""
    section = Section("Where runs disagree")
    found = disagreements(source.entries)
    if not found:
        section.left_out.append("All runs answer all questions alike.")
        return section
    section.text.append(
        f"Runs answer {len(found):,} of {source.results['questions']['asked']:,} distinct pairs differently. First "
        "come those that the dense model answers right and most others do not."
    )
    if source.images is None:
        section.left_out.append("Pictures: their folder is not known; --images names it.")
    elif source.no_kept:
        section.left_out.append(f"Kept patches: {source.no_kept}")
    section.examples += [_example(source, pair) for pair in found[:EXAMPLES]]
    return section


def _example(source: Source, pair: Mapping[str, Any]) -> Example:
    shots = []
    for entry in source.entries:
        name, answer = entry["name"], pair["answers"][entry["name"]]
        packed = source.kept.get(name, {}).get((pair["image"], pair["question"]), ())
        masks = [unpack_kept(mask, entry["patches"]) for mask in packed]
        seen = source.results["settings"].get("preprocessing")
        picture = "" if source.images is None else thumbnail(source.images, pair["image"], masks, seen)
        kept = f"; {name} keeps {masks[-1].sum()} of {len(masks[-1])} patches" if masks else ""
        shots.append(Shot(name, answer, answer == pair["label"], picture, f"{pair['image']}{kept}"))
    return Example(pair["image"], pair["question"], pair["label"], shots)


def questions(source: Source) -> Section:
    """What was asked, and what was skipped."""
    counts = source.results["questions"]
    section = Section("Questions")
    rows = [[split, f"{count:,}"] for split, count in counts["splits"].items()]
    section.tables.append(Table("Questions scored", ["split", "questions"], rows))
    if counts.get("note"):
        section.text.append(counts["note"])
    if "skipped" in counts:
        section.text.append(f"Rows that could not be used and were skipped: {len(counts['skipped']):,}.")
        section.listed += counts["skipped"]
    else:
        section.left_out.append(f"Skipped rows: {OLD_FILE}, which refused such rows.")
    return section


def how(source: Source) -> Section:
    """Settings and versions."""
    section = Section("Settings and versions")
    settings = ("kind", "budget", "seed", "layers", "budgets", "options")
    runs = [[entry["name"], *(plain(entry.get(name)) for name in settings)] for entry in source.entries]
    columns = ["run", "kind", "budget", "seed", "layers", "tokens per stage", "options"]
    section.tables.append(Table("Runs, as they were in force", columns, runs))
    for title in ("settings", "versions"):
        rows = [[name, plain(value)] for name, value in source.results[title].items()]
        section.tables.append(Table(title.capitalize(), ["name", "value"], rows, folded=True))
    return section


def _tokens(entry: Entry) -> str:
    return "–" if entry["visual_tokens"] is None else f"{entry['visual_tokens']:.0f}"


def _pairs_of_runs(caption: str, columns: list[str], rows: list[list[str | Cell]]) -> list[Table]:
    """A table whose rows are pairs; of a long one those of the first run, and all of it folded."""
    if len(rows) <= LONG:
        return [Table(caption, columns, rows, headers=2)]
    first = rows[0][0]
    short = Table(f"Against {first}. {caption}", columns, [row for row in rows if first in row[:2]], headers=2)
    return [short, Table("All pairs of runs", columns, rows, headers=2, folded=True)]


def _last_masks(entry: Entry, source: Source) -> dict[Pair, Any]:
    kept = source.kept.get(entry["name"], {})
    return {pair: unpack_kept(masks[-1], entry["patches"]) for pair, masks in kept.items() if masks}


def _no_comparisons(source: Source) -> str:
    if len(source.entries) < 2:
        return "There is a single run."
    return "The file has no comparisons: it is of an earlier version, or of an evaluation that has not ended."


def _interval_words(source: Source) -> str:
    bootstrap = source.entries[0].get("scores", {}).get("bootstrap")
    if bootstrap is None:
        return ""
    share = f"In brackets {100 * bootstrap['confidence']:.0f} % intervals"
    return f"{share}: bootstrap of whole images, {bootstrap['resamples']:,} resamples."
