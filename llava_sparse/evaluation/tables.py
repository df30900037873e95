"""Tables of results: defined once, for the terminal, for Markdown and for HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import mean, stdev
from typing import Any

import rich.table
from markupsafe import Markup
from rich.text import Text

from .plan import SMALL
from .results import Entry, Results, as_results
from .statistics import FEW_IMAGES, SCORE_METRICS, unique_answers

# Longer tables are folded.
LONG = 12
OLD_FILE = "the file was written by an earlier version"
TITLES = {
    "f1": "F1",
    "yes_ratio": "yes ratio",
    "roc_auc": "ROC-AUC",
    "average_precision": "average precision",
    "brier": "Brier score",
    "ece": "ECE",
    "aurc": "AURC",
}
AGGREGATIONS = {"average": "mean over splits", "pooled": "all rows", "unique": "distinct pairs"}
# What Markdown, GitHub's too, reads as more than the character itself: anywhere, and where a line begins.
_MARKDOWN = re.compile(r"([\\`*|~$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=\bwww)\.)")


@dataclass(frozen=True)
class Cell:
    """A value with its interval; `best` of its column, or not surely worse than that."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table; everything in it is text, never markup.

    Attributes:
        caption: what it shows, below a `title` on a terminal.
        headers: so many first cells of each row name the row.
        words: further columns of words, which are not numbers.
        sections: numbers of rows before which a line is drawn; strong: of rows that sum others up.
        folded: readers open it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    headers: int = 1
    words: Sequence[str] = ()
    title: str = ""
    sections: Sequence[int] = ()
    strong: Sequence[int] = ()
    folded: bool = False

    def rich(self) -> rich.table.Table:
        """For a terminal, which has room for the first interval of a row alone."""
        shown = rich.table.Table(
            title=Text(self.title), caption=Text(self.caption), caption_justify="left", pad_edge=False
        )
        for number, column in enumerate(self.columns):
            named = number < self.headers or column in self.words
            shown.add_column(Text(column), justify="left" if named else "right")
        for number, row in enumerate(self.rows):
            if number in self.sections:
                shown.add_section()
            first = next((cell for cell in row if isinstance(cell, Cell) and cell.interval), None)
            cells = [
                cell if isinstance(cell, str) else f"{cell.text} {cell.interval}" if cell is first else cell.text
                for cell in row
            ]
            shown.add_row(*map(Text, cells), style="bold" if number in self.strong else None)
        return shown

    def plain(self) -> str:
        """In columns of plain text, for files and pipes."""
        texts = [[c if isinstance(c, str) else f"{c.text} {c.interval}".strip() for c in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *texts, strict=True)]
        named = [number < self.headers or column in self.words for number, column in enumerate(self.columns)]
        lines = [
            "  ".join(f"{t:<{w}}" if n else f"{t:>{w}}" for t, w, n in zip(row, widths, named, strict=True)).rstrip()
            for row in ([*self.columns], *texts)
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def markdown(self) -> str:
        """A GitHub table, without its caption."""
        rule = [":--" if n < self.headers or c in self.words else "--:" for n, c in enumerate(self.columns)]
        lines: list[list[str]] = [[escape_markdown(column) for column in self.columns], rule]
        for row in self.rows:
            lines.append([_markdown_cell(cell) for cell in row])
        return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _markdown_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return escape_markdown(cell)
    text = escape_markdown(f"{cell.text} {cell.interval}".strip())
    return f"**{text}**" if cell.best else text


def escape_markdown(text: Any) -> Markup:
    """Text on one line that Markdown shows as it is, in tables too, but not where a line begins."""
    return Markup(_MARKDOWN.sub(r"\\\1", escape(" ".join(str(text).split()), quote=False)))


def table(results: Mapping[str, Any]) -> rich.table.Table:
    """A row for each split and their average, for every run; scores in percent."""
    return scores_table(as_results(results), splits=True).rich()


def comparison_table(results: Mapping[str, Any]) -> rich.table.Table:
    """A row for every two runs: who is right where the other is not, and how sure the difference is."""
    return comparisons(as_results(results)).rich()


def scores_table(results: Results, splits: bool = False) -> Table:
    """A row for every run: the mean over the splits, with intervals; or rows for the splits, too, as papers print them.

    Without the splits, the best values and those whose intervals reach them are marked, and the table says what a run
    costs and how it fares on questions that the downsampled picture does not answer.
    """
    metrics = results.task.measure.metrics
    failed = any(entry.empty or entry.cut for entry in results.methods) or not splits
    hard = None if splits else hard_subset(results)
    rows: list[list[str | Cell]] = []
    strong, sections = [], []
    for entry in results.methods:
        sections.append(len(rows))
        names = [entry.name.partition("@")[0], dash(entry.budget), _tokens(entry)]
        for split, scores in entry.splits.items() if splits else ():
            rows.append([*names, split, *(percent(scores[name]) for name in metrics), *([""] if failed else []), ""])
            names = ["", "", ""]
        means = [percent_cell(entry.parts["average"], name) for name in metrics]
        counts = [f"{dash(entry.empty)} / {dash(entry.cut)}"] if failed else []
        timed = (results.timing.get("runs") or {}).get(entry.name, {})
        speed = f"{timed['questions_per_second']:.1f}" if timed.get("questions_per_second") else "–"
        strong.append(len(rows))
        if splits:
            rows.append([*names, "average", *means, *counts, speed])
        else:
            tokens = f"{dash(entry.budget)} / {dash(entry.entering)} / {_tokens(entry)}"
            times = " / ".join(f"{1000 * seconds:.0f}" for seconds in timed.get("percentiles") or ()) or "–"
            on_hard = [] if hard is None else [hard[entry.name]]
            rows.append([entry.name, tokens, *means, *on_hard, *counts, speed, times])
    limit = results.settings.get("max_new_tokens")
    caption = f"{_asked_words(results, splits)}{interval_words(results)}{_cut_words(results, limit)}"
    columns = [*map(title_of, metrics), *(["empty / cut"] if failed else []), "questions/s"]
    if splits:
        columns = ["method", "budget", "visual tokens", "split", *columns]
        title = f"{results.task.title}, {results.settings['dataset']}"
        return Table(caption, columns, rows, words=["split"], title=title, sections=sections, strong=strong)
    costs = " Tokens: budget / entering the decoder / in the mean over its layers. Time: of a question, p50 / p99."
    if hard is not None:
        columns.insert(len(metrics), "hard")
        costs += " Hard: accuracy on distinct pairs that the picture downsampled to as many tokens gets wrong."
    columns = ["run", "tokens", *columns, "time, ms"]
    return Table(f"{caption}{costs}", columns, mark_best(results, rows))


def mark_best(results: Results, rows: Sequence[Sequence[str | Cell]]) -> list[list[str | Cell]]:
    """Rows of every run's metrics, in order behind two cells, with the best values marked, and all that reach them."""
    found = [list(row) for row in rows]
    for column, name in enumerate(results.task.measure.metrics, start=2):
        averages = [entry.parts["average"] for entry in results.methods]
        best = max(average[name] for average in averages)
        for row, average in zip(found, averages, strict=True):
            high = average.get("intervals", {}).get(name, (0, average[name]))[1]
            if isinstance(cell := row[column], Cell) and name != "yes_ratio" and len(found) > 1:
                row[column] = replace(cell, best=high >= best)
    return found


def hard_subset(results: Results) -> dict[str, str] | None:
    """Accuracy of each run on the distinct pairs that the downsampled picture gets wrong; None without that control.

    At the run's own budget, where that was asked; else at the largest.
    """
    small = {entry.budget: entry for entry in results.methods if entry.method == SMALL}
    if not small:
        return None
    found = {}
    for entry in results.methods:
        control = small.get(entry.budget) or small[max(small)]  # type: ignore[type-var]
        pairs = zip(unique_answers(control.answers), unique_answers(entry.answers), strict=True)
        right = [b["parsed"] == b["label"] for a, b in pairs if a["parsed"] != a["label"]]
        found[entry.name] = f"{percent(sum(right) / len(right))} of {len(right):,}" if right else "–"
    return found


def spread_table(results: Results) -> Table | None:
    """Accuracy over the seeds of methods that draw at random; None if there are no several seeds."""
    seeds: dict[str, list[float]] = {}
    for entry in results.methods:
        if entry.seed is not None:
            seeds.setdefault(entry.name.rpartition("#")[0], []).append(entry.average["accuracy"])
    rows: list[list[str | Cell]] = [
        [
            name,
            str(len(found)),
            *map(percent, (mean(found), min(found), max(found), stdev(found))),
        ]
        for name, found in seeds.items()
        if len(found) > 1
    ]
    columns = ["run", "seeds", "mean", "lowest", "highest", "standard deviation"]
    return (
        Table("Accuracy over seeds, mean over the splits, in percent.", columns, rows, title="Seeds") if rows else None
    )


def _asked_words(results: Results, splits: bool) -> str:
    if not splits:
        return (
            "Mean over the splits, as papers print it, in percent; bold: the best, and what reaches it. In brackets: "
        )
    asked = results.questions
    sizes = ", ".join(f"{split} {size:,}" for split, size in asked.splits.items())
    skipped = f" {len(asked.skipped):,} rows were skipped." if asked.skipped else ""
    return (
        f"Questions scored: {sizes}. {asked.asked:,} distinct (image, question) pairs of {asked.images:,} images "
        f"were asked once each and reused across the splits.{skipped} In brackets: "
    )


def _cut_words(results: Results, limit: Any) -> str:
    if any(entry.empty or entry.cut for entry in results.methods):
        return f" Empty / cut: distinct answers without text, and ended by the limit of {limit} tokens."
    unknown = any(entry.empty is None for entry in results.methods)
    return "" if unknown else f" No answer is empty or was cut at {limit} tokens."


def interval_words(results: Results) -> str:
    """What the intervals are, and whether there are images enough for them."""
    settings = (results.methods[0].scores or {}).get("bootstrap")
    if settings is None:
        return f"nothing, for {OLD_FILE}."
    found = f"{100 * settings['confidence']:.0f} % interval, images resampled."
    if (images := settings.get("images", FEW_IMAGES)) >= FEW_IMAGES:
        return found
    return f"{found} {images} images are too few for them: the truth lies outside more often than they say."


def aggregations(results: Results, metric: str) -> Table:
    """A metric of each split and of each way to put them together."""
    splits = list(results.methods[0].parts["splits"])
    rows: list[list[str | Cell]] = []
    for entry in results.methods:
        sets = [entry.parts["splits"].get(split) for split in splits]
        sets += [entry.parts.get(name) for name in AGGREGATIONS]
        rows.append([entry.name, *("–" if part is None else percent_cell(part, metric) for part in sets)])
    title = title_of(metric)
    caption = f"{title[0].upper()}{title[1:]} in percent. Papers print the mean over the splits."
    return Table(caption, ["run", *splits, *AGGREGATIONS.values()], rows)


def comparisons(results: Results, overlaps: Mapping[tuple[str, str], float] | None = None) -> Table:
    """Every two runs: who is right where the other is not, how sure that is, and how alike they answer.

    Args:
        overlaps: of the patches that two runs keep, by their names.
    """
    found = results.comparisons
    rows: list[list[str | Cell]] = [
        [
            pair.a,
            pair.b,
            Cell(f"{100 * pair.difference:+.1f}", bounds(pair.interval, "+.1f")),
            str(pair.a_only_correct),
            str(pair.b_only_correct),
            f"{pair.p:.2g}",
            f"{pair.p_holm:.2g}",
            percent(pair.equal_answers),
            f"{pair.kappa:.2f}",
            *([] if overlaps is None else [dash(overlaps.get((pair.a, pair.b)), ".2f")]),
            dash(pair.questions_needed, ","),
        ]
        for pair in found
    ]
    caption = (
        f"Over {found[0].pairs if found else 0:,} distinct (image, question) pairs: accuracy of a less that of b, with "
        f"its {interval_words(results)} p: McNemar's exact test, with Holm's correction for all {len(rows)} rows. "
        f"Needed: questions with which the test would find such a difference four times out of five."
        f"{'' if overlaps is None else ' Overlap (IoU) of the patches that are tokens after the last stage.'}"
    )
    columns = ["a − b, points", "only a right", "only b right", "p", "p (Holm)", "equal answers", "kappa"]
    columns = ["a", "b", *columns, *([] if overlaps is None else ["overlap"]), "needed"]
    return Table(caption, columns, rows, headers=2, title="Pairs of runs")


def pairs_of_runs(whole: Table) -> list[Table]:
    """A table whose rows are pairs; of a long one those of the first run, and all of it folded."""
    if len(whole.rows) <= LONG:
        return [whole]
    first = whole.rows[0][0]
    rows = [row for row in whole.rows if first in row[:2]]
    short = replace(whole, caption=f"Against {first}. {whole.caption}", rows=rows)
    return [short, replace(whole, caption="All pairs of runs", folded=True)]


def score_metrics(results: Results, entries: Sequence[Entry]) -> Table | None:
    """What scores tell beside the answers, over distinct pairs; None if the file does not say."""
    parts = [entry.parts.get("unique", {}) for entry in entries]
    columns = [name for name in (*SCORE_METRICS, "ece", "aurc") if all(name in part for part in parts)]
    hard = results.task.hard_split if results.task.hard_split in entries[0].splits else None
    rows: list[list[str | Cell]] = []
    for entry, part in zip(entries, parts, strict=True):
        alarms = [row["parsed"] == "yes" for row in entry.answers if (row["split"], row["label"]) == (hard, "no")]
        rate = percent(sum(alarms) / len(alarms)) if alarms else "–"
        rows.append([entry.name, *(number_cell(part, name) for name in columns), *([] if hard is None else [rate])])
    caption = (
        "Over distinct pairs. Of Brier score, calibration error (ECE) and the area under the risk-coverage curve "
        f"(AURC) lower is better. {'' if hard is None else f'False positives: percent of the negatives of {hard}.'}"
    )
    shown = [*map(title_of, columns), *([] if hard is None else ["false positives"])]
    return Table(caption, ["run", *shown], rows) if columns else None


def questions(results: Results) -> Table:
    """Questions of each split."""
    rows = [[split, f"{count:,}"] for split, count in results.questions.splits.items()]
    return Table("Questions scored", ["split", "questions"], rows)


def settings_tables(results: Results) -> list[Table]:
    """Runs as they were in force, settings and versions."""
    names = ("kind", "budget", "seed", "layers", "budgets", "options")
    runs = [[entry.name, *(plain(entry[name]) for name in names)] for entry in results.methods]
    columns = ["run", "kind", "budget", "seed", "layers", "tokens per stage", "options"]
    return [
        Table("Runs, as they were in force", columns, runs),
        *(
            Table(
                title.capitalize(), ["name", "value"], [[n, plain(v)] for n, v in results[title].items()], folded=True
            )
            for title in ("settings", "versions")
        ),
    ]


def title_of(metric: str) -> str:
    """A metric as papers write it."""
    return TITLES.get(metric, metric.replace("_", " "))


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def bounds(interval: Sequence[float], form: str = ".1f") -> str:
    """An interval in percent."""
    return f"[{', '.join(format(100 * bound, form) for bound in interval)}]"


def percent_cell(part: Mapping[str, Any], metric: str) -> Cell:
    """A metric of a set in percent, with its interval if there is one."""
    found = part.get("intervals", {}).get(metric)
    return Cell(percent(part[metric]), bounds(found) if found else "")


def number_cell(part: Mapping[str, Any], metric: str) -> Cell:
    """A metric of a set, with its interval if there is one."""
    interval = part.get("intervals", {}).get(metric)
    return Cell(f"{part[metric]:.3f}", "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]")


def rate_cell(part: Mapping[str, Any] | None) -> str | Cell:
    """A rate of `failures.failure_curves` with its interval and count."""
    found = part and Cell(percent(part["rate"]), f"{bounds(part['interval'], '.0f')} of {part['count']:,}")
    return found or "–"


def dash(value: Any, form: str = "") -> str:
    """A value, or a dash where it is unknown."""
    return "–" if value is None else format(value, form)


def plain(value: Any) -> str:
    """A setting as text."""
    if value is None or value in ({}, []):
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tokens(entry: Entry) -> str:
    return "–" if entry.visual_tokens is None else f"{entry.visual_tokens:.1f}".removesuffix(".0")
