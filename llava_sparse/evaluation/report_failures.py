"""The report's section on failure modes: which objects are missed, and how much of them is left to be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from . import figures
from .analysis import failure_curves
from .report_parts import OLD_FILE, Cell, Drawing, Section, Source, Table, by_budget, rate_cell

Curves = Sequence[Mapping[str, Any]]


def failures(source: Source) -> Section:
    """Recall by what the asked object is like, false positives, and survival of its patches.

    Raises:
        ValueError: if objects or masks do not fit the answers.
    """
    section = Section("Failure modes")
    if source.objects is None:
        section.left_out.append("The objects in these pictures are not known; --objects names a file of their boxes.")
        return section
    if not all("patches" in entry for entry in source.entries):
        section.left_out.append(f"{OLD_FILE}, which did not note the number of patches.")
        return section
    if source.no_kept:
        section.left_out.append(f"Survival of the asked objects: {source.no_kept}")
    curves = {e["name"]: failure_curves(e, source.kept.get(e["name"]), source.objects) for e in source.entries}
    first = next(iter(curves.values()))
    section.text.append(
        f"{first['positives']:,} distinct questions ask for an object that is there, {first['negatives']:,} for one "
        "that is not. Intervals resample images; bins with few questions have wide ones."
    )
    for words, group in by_budget(source.entries):
        shown = [curves[entry["name"]] for entry in group]
        section.drawings.append(_drawings(words, shown))
        section.tables += [_rates(words, shown), _regressions(words, shown)]
    return section


def _drawings(words: str, curves: Curves) -> list[Drawing]:
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
    if any(curve["survival"]["stages"] for curve in curves):
        for by in ("stage", "size"):
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
