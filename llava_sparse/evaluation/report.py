"""Results files as a page that needs nothing else, and as Markdown. Everything from a file is text, never markup."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llava_sparse.reference import SCENES

from . import figures, tables
from .answer_log import key_of, log_path, read_log
from .failures import SIDE, Pair, disagreements, failure_curves, load_objects
from .files import check_output, read_json, write_file
from .report_parts import Article, Drawing, Example, Section, Shot, Source, by_budget, thumbnail
from .results import Entry, Results, read_results, repeat_line, results_files, timing_path
from .statistics import kept_overlap, unpack_kept
from .tables import Cell, Table, escape_markdown, percent, rate_cell

REFERENCE = "reference"
EXAMPLES = 6
SIGNIFICANT = 0.05
_LINE_START = re.compile(r"^(\d*)(?=[#+=.):-])")
_HTML_NAMES, _MARKDOWN_NAMES = (".html", ".htm"), (".md", ".markdown")

Curves = Sequence[Mapping[str, Any]]


def report(
    paths: Sequence[str | Path],
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    *,
    objects: str | Path | None = None,
    images: str | Path | None = None,
) -> None:
    """Writes a report on results files.

    Args:
        paths: results files, or folders of them.
        html, markdown: the files to write; at least one.
        objects: boxes of the objects in the pictures, as `load_objects` reads them. Those of the reference set are
            known.
        images: folder of the pictures. That of the reference set is known, and that of `--images`.

    Raises:
        ValueError: for files that are no results or are damaged; for objects or pictures that do not fit them.
        OSError: for files that cannot be read or written.
    """
    for path, endings in ((html, _HTML_NAMES), (markdown, _MARKDOWN_NAMES)):
        if path is not None:
            if Path(path).suffix.lower() not in endings:
                raise ValueError(f"{path}: a name that ends in {' or '.join(endings)} is allowed.")
            check_output(path)
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of pictures.")
    articles = [article(_source(path, objects, images)) for path in results_files(paths)]
    for path, name in ((html, "report.html"), (markdown, "report.md")):
        if path is not None:
            write_file(_render(name, articles), path)


def _render(template: str, articles: Sequence[Article]) -> str:
    """A page without scripts and remote resources; or its tables and texts as Markdown."""
    environment = Environment(
        loader=PackageLoader("llava_sparse.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = escape_markdown
    environment.filters["line"] = lambda text: Markup(_LINE_START.sub(r"\1\\", escape_markdown(text)))
    text = environment.get_template(template).render(articles=articles)
    return text if template.endswith("html") else re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _source(path: Path, objects: str | Path | None, images: str | Path | None) -> Source:
    results = read_results(path)
    if timing_path(path).is_file():
        results.timing = read_json(timing_path(path), "times of `llava-sparse pope`")
    kept, no_kept = _kept(path, results)
    settings = results.settings
    # Earlier versions called questions of one's own "reference", too.
    if settings["dataset"] == REFERENCE and "annotations" not in settings:
        objects = SCENES / "objects.jsonl" if objects is None else objects
        images = SCENES / "images" if images is None else images
    elif images is None and Path(str(settings.get("images", ""))).is_dir() and "images" in settings:
        images = settings["images"]
    side = results.methods[0].image_size or SIDE
    return Source(
        path.name,
        results,
        kept,
        no_kept,
        None if objects is None else load_objects(objects, side, settings.get("preprocessing")),
        None if images is None else Path(images),
    )


def _kept(path: Path, results: Results) -> tuple[dict[str, dict[Pair, list[str]]], str]:
    """Masks of the runs that the log beside the results has in full, and why others are missing."""
    log = log_path(path)
    if not log.is_file():
        return {}, f"there is no log of answers, {log.name}, beside the results."
    header, lines, _ = read_log(log)
    if header.get("settings") != results.settings:
        return {}, f"{log.name} is of other settings than the results."
    kept: dict[str, dict[Pair, list[str]]] = {}
    for entry in results.methods:
        pairs = {(answer["image"], answer["question"]) for answer in entry.answers}
        if entry.patches is not None and all(key_of(entry.name, pair) in lines for pair in pairs):
            kept[entry.name] = {pair: _masks(lines[key_of(entry.name, pair)], entry.patches, log) for pair in pairs}
    missing = [entry.name for entry in results.methods if entry.name not in kept]
    return kept, f"{log.name} does not have all answers of {', '.join(missing)}." if missing else ""


def _masks(line: dict[str, Any], patches: int, log: Path) -> list[str]:
    masks: list[str] = line.get("kept", [])
    for mask in masks:
        try:
            unpack_kept(mask, patches)
        except ValueError as error:
            raise ValueError(f"{log}, run {line['run']!r}: {error}") from error
    return masks


def article(source: Source) -> Article:
    """The report on one results file.

    Raises:
        ValueError: if objects, masks or pictures do not fit the answers.
    """
    settings, counts = source.results.settings, source.results.questions
    summary = (
        f"Model {settings['model']}, questions {settings['dataset']}: {len(source.entries)} runs, "
        f"{counts.scored:,} questions scored, {counts.asked:,} distinct (image, question) pairs of "
        f"{counts.images:,} images."
    )
    parts = (scores, aggregations, tests, thresholds, failures, examples, questions, how)
    return Article(source.name, summary, [part(source) for part in parts])


def scores(source: Source) -> Section:
    """The main table, and accuracy against tokens."""
    shown = (tables.scores_table(source.results), tables.spread_table(source.results))
    section = Section("Scores", tables=[table for table in shown if table is not None])
    accuracy = {entry.name: entry.parts["average"]["accuracy"] for entry in source.entries}
    best = max(accuracy, key=lambda name: accuracy[name])
    alt = (
        f"Accuracy against visual tokens of {len(accuracy)} runs; the highest is {percent(accuracy[best])} "
        f"percent, of {best}. The table has the numbers."
    )
    words = "Accuracy against visual tokens. The band is the interval of the dense model."
    section.drawings.append([Drawing(partial(figures.accuracy_against_tokens, source.entries), alt, words)])
    if not all("intervals" in entry.parts["average"] for entry in source.entries):
        section.left_out.append(f"Intervals: {tables.OLD_FILE}, which computed none.")
    return section


def aggregations(source: Source) -> Section:
    """The first metrics of each split and of each way to put them together."""
    section = Section("Aggregations side by side")
    if not all(entry.scores for entry in source.entries):
        section.left_out.append(f"All rows as one set, and distinct pairs: {tables.OLD_FILE}.")
    metrics = source.results.task.measure.metrics
    section.tables += [tables.aggregations(source.results, name) for name in ("accuracy", "f1") if name in metrics]
    return section


def tests(source: Source) -> Section:
    """Tests of every two runs, how alike they answer, and what they keep."""
    section, compared = Section("Tests of every two runs"), source.results.comparisons
    if not compared:
        section.left_out.append(
            "There is a single run."
            if len(source.entries) < 2
            else "The file has no comparisons: it is of an earlier version, or of an evaluation that has not ended."
        )
        return section
    if source.no_kept:
        section.left_out.append(f"Overlap of kept patches: {source.no_kept}")
    last = {entry.name: _last_masks(entry, source) for entry in source.entries}
    overlaps = {}
    for pair in compared:
        a, b = last[pair.a], last[pair.b]
        shared = sorted(a.keys() & b.keys())
        if shared:
            overlaps[pair.a, pair.b] = kept_overlap([a[key] for key in shared], [b[key] for key in shared])
    different = sum(pair.p_holm < SIGNIFICANT for pair in compared)
    section.text.append(f"{different} of {len(compared)} pairs of runs differ at the level {SIGNIFICANT}, corrected.")
    section.tables += tables.pairs_of_runs(tables.comparisons(source.results, overlaps))
    return section


def _last_masks(entry: Entry, source: Source) -> dict[Pair, Any]:
    kept = source.kept.get(entry.name, {})
    return {pair: unpack_kept(masks[-1], entry.patches or 0) for pair, masks in kept.items() if masks}


def thresholds(source: Source) -> Section:
    """Curves of answers with scores."""
    section = Section("Precision, recall and calibration")
    entries = [entry for entry in source.entries if "score" in entry.answers[0]]
    if not entries:
        section.left_out.append("Curves: these answers have no scores; --answer-mode logits gives them.")
        return section
    found = tables.score_metrics(source.results, entries)
    section.tables += [] if found is None else [found]
    for words, group in by_budget(entries):
        names = ", ".join(entry.name for entry in group)
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


def failures(source: Source) -> Section:
    """Recall by what the asked object is like, false positives, and survival of its patches.

    Raises:
        ValueError: if objects or masks do not fit the answers.
    """
    section = Section("Failure modes")
    if source.objects is None:
        section.left_out.append("The objects in these pictures are not known; --objects names a file of their boxes.")
        return section
    if any(entry.patches is None for entry in source.entries):
        section.left_out.append(f"{tables.OLD_FILE.capitalize()}, which did not note the number of patches.")
        return section
    if source.no_kept:
        section.left_out.append(f"Survival of the asked objects: {source.no_kept}")
    task = source.results.task
    curves = {e.name: failure_curves(e, source.kept.get(e.name), source.objects, task=task) for e in source.entries}
    first = next(iter(curves.values()))
    section.text.append(
        f"{first['positives']:,} distinct questions ask for an object that is there, {first['negatives']:,} for one "
        "that is not. Intervals resample images; bins with few questions have wide ones."
    )
    for words, group in by_budget(source.entries):
        shown = [curves[entry.name] for entry in group]
        section.drawings.append(_failure_drawings(words, shown))
        section.tables += [_rates(words, shown), _regressions(words, shown)]
    return section


def _failure_drawings(words: str, curves: Curves) -> list[Drawing]:
    names = ", ".join(curve["run"] for curve in curves)
    made = []
    for feature, meaning in figures.FEATURES.items():
        if any(curve["recall"].get(feature) for curve in curves):
            alt = f"Recall of {names} by {feature}: {meaning}. The table has the numbers."
            draw = partial(figures.failure, curves, [feature])
            made.append(Drawing(draw, alt, f"Recall by {feature}{words}"))
    if any(curve["false_positive_rate"]["clutter"] for curve in curves):
        alt = f"Share of absent objects that {names} claim to see, by clutter. The table has the numbers."
        draw = partial(figures.failure, curves, ["clutter"], rate="false_positive_rate")
        made.append(Drawing(draw, alt, f"False positives by clutter{words}"))
    for by in ("stage", "size") if any(curve["survival"]["stages"] for curve in curves) else ():
        alt = f"Share of the asked object's patches that {names} keep, by {by}."
        draw = partial(figures.survival, curves, by)
        made.append(Drawing(draw, alt, f"Patches of the asked object that are left, by {by}{words}"))
    return made


def _rates(words: str, curves: Curves) -> Table:
    rows: list[list[str | Cell]] = []
    for rate, title in (("recall", "recall"), ("false_positive_rate", "false positives")):
        for feature in figures.FEATURES:
            found = [{(part["low"], part["high"]): part for part in curve[rate].get(feature, [])} for curve in curves]
            for place in sorted({place for bins in found for place in bins}):
                cells = [rate_cell(bins.get(place)) for bins in found]
                rows.append([f"{title} by {feature}", figures.bin_name(*place), *cells])
    stages = [curve["survival"]["stages"] for curve in curves]
    for n in range(max(map(len, stages))):
        rows.append(["patches left", f"stage {n + 1}", *(rate_cell(s[n] if n < len(s) else None) for s in stages)])
    caption = f"Rates in percent, intervals, and numbers of questions{words}"
    return Table(caption, ["rate", "bin", *(curve["run"] for curve in curves)], rows, headers=2, folded=True)


def _regressions(words: str, curves: Curves) -> Table:
    rows: list[list[str | Cell]] = []
    for curve in curves:
        fit = curve["regression"]
        for name, term in fit["terms"].items():
            low, high = term["interval"]
            rows.append([curve["run"], name, Cell(f"{term['coefficient']:+.2f}", f"[{low:+.2f}, {high:+.2f}]")])
        rows += [[curve["run"], name, f"left out: {reason}"] for name, reason in fit["left_out"].items()]
    caption = (
        f"Logistic regression of finding an object that is there{words}: change of the log-odds as a term grows by 1"
    )
    return Table(caption, ["run", "term", "coefficient"], rows, headers=2, folded=True)


def examples(source: Source) -> Section:
    """Pictures with a question that runs answer differently."""
    section = Section("Where runs disagree")
    found = disagreements(source.entries)
    if not found:
        section.left_out.append("All runs answer all questions alike.")
        return section
    section.text.append(
        f"Runs answer {len(found):,} of {source.results.questions.asked:,} distinct pairs differently. First "
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
        answer = pair["answers"][entry.name]
        packed = source.kept.get(entry.name, {}).get((pair["image"], pair["question"]), ())
        masks = [unpack_kept(mask, entry.patches or 0) for mask in packed]
        seen = source.results.settings.get("preprocessing")
        folder = source.images
        picture = "" if folder is None else thumbnail(folder, _file_name(folder, pair), masks, seen)
        kept = f"; {entry.name} keeps {masks[-1].sum()} of {len(masks[-1])} patches" if masks else ""
        shots.append(Shot(entry.name, answer, answer == pair["label"], picture, f"{pair['image']}{kept}"))
    return Example(pair["image"], pair["question"], pair["label"], shots)


def _file_name(images: Path, pair: Mapping[str, Any]) -> str:
    """The picture's file; tables, like the one on the Hub, name pictures without a suffix."""
    name: str = pair["image"]
    if "/" in name or Path(name).suffix or (images / name).exists():
        return name
    found = sorted(file.name for file in images.glob(f"{escape(name)}.*"))
    return found[0] if found else name


def questions(source: Source) -> Section:
    """What was asked, and what was skipped."""
    counts = source.results.questions
    section = Section("Questions", tables=[tables.questions(source.results)])
    section.text += [counts.note] if counts.note else []
    if counts.skipped is None:
        section.left_out.append(f"Skipped rows: {tables.OLD_FILE}, which refused such rows.")
    else:
        section.text.append(f"Rows that could not be used and were skipped: {len(counts.skipped):,}.")
        section.listed += counts.skipped
    return section


def how(source: Source) -> Section:
    """Settings and versions."""
    section = Section("Settings and versions", tables=tables.settings_tables(source.results))
    if "methods" in source.results.settings and source.results.task.name == "pope":
        section.text.append(f"Again: {repeat_line(source.results.settings)}")
    return section
