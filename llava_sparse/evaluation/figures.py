"""Figures of results: plain data in, matplotlib figures out. A method has one colour and marker in all of them.

An entry is a run of a results file; curves are what `failures.failure_curves` gives of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter
from scipy.special import expit

from llava_sparse.modeling.pruning_registry import METHODS

from .plan import BLIND, SMALL
from .statistics import calibration, precision_recall_curve, unique_answers

# Okabe and Ito's colours without yellow and black, then others that differ from them; lighter on a dark page.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B"),
    *("#B2182B", "#5A7D00", "#0F8B8D", "#7F7F7F", "#E377C2", "#1B3A5C", "#B8A100", "#2CA02C"),
    *("#D4A5FF", "#A05195"),
)
MARKERS, LINES = "osD^vPX<>phd8H*", ("-", "--", ":", "-.")
SIZE = (5.2, 3.4)
REFERENCE = "dense"
FEATURES = {
    "size": "longest side of the asked object, pixels",
    "distance": "distance of its centre from the picture's, 1 at a corner",
    "clutter": "objects in the picture",
    "survival": "share of its patches left at the last stage",
}

Entry = Mapping[str, Any]


@contextmanager
def theme(dark: bool = False) -> Iterator[None]:
    """Settings under which a figure is made and saved; names of runs are text, never formulas."""
    ink, faint = ("#E8E6E3", "#4A4E52") if dark else ("#1A1A1A", "#D5D5D5")
    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink
    )
    settings: Any = {
        **colours,
        "figure.facecolor": "#16181B" if dark else "white",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": faint,
        "grid.linewidth": 0.6,
        "font.size": 10,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "text.parse_math": False,
        "text.usetex": False,
        "svg.hashsalt": "llava-sparse",
    }
    with matplotlib.rc_context(settings):
        yield


def accuracy_against_tokens(entries: Sequence[Entry], *, dark: bool = False) -> Figure:
    """Accuracy, the mean over the splits, against visual tokens.

    Each method and seed is a line, the dense model a band. Methods are moved apart a little, so that those with the
    same number of tokens can be seen. Runs whose number of tokens was not recorded are left out.
    """
    entries = [entry for entry in entries if entry["visual_tokens"] is not None]
    with theme(dark):
        figure, (axes,) = new_figure(1)
        lines: dict[str, dict[Any, list[Entry]]] = {}
        for entry in entries:
            seeds = lines.setdefault(entry["name"].rpartition("@")[0] or entry["name"], {})
            seeds.setdefault(entry.get("seed"), []).append(entry)
        for number, (style, (method, seeds)) in enumerate(zip(styles(lines, dark), lines.items(), strict=True)):
            shift = 1.012 ** (number - len(lines) / 2) if method != REFERENCE else 1
            for nth, runs in enumerate(seeds.values()):
                _draw_line(axes, runs, style, shift, "_" if nth else method)
        shown = sorted({round(entry["visual_tokens"]) for entry in entries})
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_apart(shown), [str(n) for n in _apart(shown)])
        axes.set_xlabel("visual tokens, mean over the decoder's layers (logarithmic)")
        axes.set_ylabel("accuracy, mean over the splits")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        legend(figure)
    return figure


def _draw_line(axes: Axes, runs: list[Entry], style: dict[str, Any], shift: float, label: str) -> None:
    """Accuracy of one method's runs against tokens; of the dense model a band, too."""
    runs.sort(key=lambda entry: entry["visual_tokens"])
    accuracy, bounds = zip(*map(_accuracy, runs), strict=True)
    if runs[0]["name"] == REFERENCE:
        axes.axhline(accuracy[0], **{**style, "marker": ""}, linewidth=1.2)
        axes.axhspan(*bounds[0], color=style["color"], alpha=0.08, linewidth=0)
    x = [shift * entry["visual_tokens"] for entry in runs]
    axes.errorbar(x, accuracy, _whiskers(accuracy, bounds), label=label, **style, capsize=3)


def precision_recall(entries: Sequence[Entry], *, dark: bool = False) -> Figure:
    """Precision against recall over all thresholds of the score, distinct pairs; a marker where yes beats no."""
    with theme(dark):
        figure, (axes,) = new_figure(1)
        for style, entry in zip(styles([entry["name"] for entry in entries], dark), entries, strict=True):
            labels, scores = _scored(entry)
            precision, recall, thresholds = precision_recall_curve(labels, scores)
            said = int((thresholds > 0).sum())
            at = slice(max(0, said - 1), said)
            steps = [np.insert(recall, 0, 0), np.insert(precision, 0, precision[0])]
            axes.step(*steps, where="pre", **{**style, "marker": ""}, label="_")
            axes.plot(recall[at], precision[at], **style, label=entry["name"])
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        _percent(axes, "xy")
        legend(figure)
    return figure


def calibration_curve(entries: Sequence[Entry], *, dark: bool = False) -> Figure:
    """How often yes is right against how probable the model finds it: ten bins, markers as large as their share."""
    with theme(dark):
        figure, (axes,) = new_figure(1)
        axes.plot([0, 1], [0, 1], color=matplotlib.rcParams["grid.color"], linewidth=1.5)
        for style, entry in zip(styles([entry["name"] for entry in entries], dark), entries, strict=True):
            labels, scores = _scored(entry)
            bins = calibration(labels, expit(scores))["bins"]
            x, y = ([part[name] for part in bins] for name in ("probability", "frequency"))
            sizes = [6 + 90 * part["count"] / len(labels) for part in bins]
            axes.plot(x, y, **{**style, "marker": ""}, linewidth=0.8, label="_")
            axes.scatter(x, y, sizes, color=style["color"], marker=style["marker"], label=entry["name"])
        axes.set_xlabel("probability of yes that the model gives")
        axes.set_ylabel("share of yes among the labels")
        _percent(axes, "xy")
        legend(figure)
    return figure


def failure(
    curves: Sequence[Mapping[str, Any]],
    features: Sequence[str] = tuple(FEATURES),
    *,
    rate: str = "recall",
    dark: bool = False,
) -> Figure:
    """Recall of runs, or their false positives, by what the questions ask for: a panel for each feature.

    Args:
        curves: of some runs.
        features: of `FEATURES`.
        rate: `"recall"` or `"false_positive_rate"`.
    """
    with theme(dark):
        figure, panels = new_figure(len(features))
        drawn = styles([curve["run"] for curve in curves], dark)
        for axes, feature in zip(panels, features, strict=True):
            shown = [(s, c["run"], c[rate][feature]) for s, c in zip(drawn, curves, strict=True) if feature in c[rate]]
            _draw_bins(axes, shown)
            axes.set_xlabel(FEATURES[feature])
            axes.set_ylabel("recall" if rate == "recall" else "absent objects that are seen")
        legend(figure)
    return figure


def survival(curves: Sequence[Mapping[str, Any]], by: str = "stage", *, dark: bool = False) -> Figure:
    """Share of the asked object's patches that are left, after each stage or by its size at the last one.

    Args:
        curves: of some runs, those without stages are left out.
        by: `"stage"` or `"size"`.
    """
    with theme(dark):
        figure, (axes,) = new_figure(1)
        drawn = styles([curve["run"] for curve in curves], dark)
        shown = []
        for style, curve in zip(drawn, curves, strict=True):
            found = curve["survival"]
            if by == "stage":
                bins = [{"low": n, "high": n, **stage} for n, stage in enumerate(found["stages"], start=1)]
            else:
                bins = [{**part["stages"][-1], "low": part["low"], "high": part["high"]} for part in found["by_size"]]
            if bins:
                shown.append((style, curve["run"], bins))
        _draw_bins(axes, shown)
        axes.set_xlabel("stage" if by == "stage" else FEATURES["size"])
        axes.set_ylabel("patches of the asked object left")
        legend(figure)
    return figure


def _draw_bins(axes: Axes, shown: Sequence[tuple[dict[str, Any], str, Sequence[Mapping[str, Any]]]]) -> None:
    """Lines over bins that stand side by side as categories, moved apart so that error bars can be read."""
    places = sorted({(part["low"], part["high"]) for _, _, bins in shown for part in bins})
    for number, (style, name, bins) in enumerate(shown):
        shift = 0.5 * ((number + 0.5) / len(shown) - 0.5)
        x = [places.index((part["low"], part["high"])) + shift for part in bins]
        y = [part["rate"] for part in bins]
        whiskers = _whiskers(y, [part["interval"] for part in bins])
        axes.errorbar(x, y, whiskers, label=name, **style, capsize=2, elinewidth=1)
    axes.set_xticks(range(len(places)), [bin_name(*place) for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.grid(visible=False, axis="x")
    _percent(axes, "y")


def bin_name(low: float, high: float) -> str:
    """The bounds of a bin, as short as they can be told."""
    return f"{low:.3g}" if low == high else f"{low:.2g}–{high:.2g}" if high <= 1 else f"{low:.0f}–{high:.0f}"


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, two in a row."""
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for empty in axes[panels:]:
        empty.remove()
    return figure, axes[:panels]


def styles(names: Iterable[str], dark: bool = False) -> list[dict[str, Any]]:
    """Colour, marker and line of each run: of a method always the same colour, whatever stands beside it.

    Variants of a method in one figure differ by marker and line; the dense model has the ink's colour.
    """
    known = [*sorted(METHODS), SMALL, BLIND]
    found, variants = [], dict[str, int]()
    for name in names:
        method = name.partition("@")[0].partition(":")[0]
        if method == REFERENCE:
            ink = matplotlib.rcParams["text.color"]
            found.append({"color": ink, "marker": "*", "linestyle": "--", "markersize": 8})
            continue
        if method not in known:
            known.append(method)
        number, variant = known.index(method), variants.setdefault(method, 0)
        variants[method] += 1
        colour = to_rgb(COLOURS[number % len(COLOURS)])
        found.append(
            {
                "color": tuple(0.55 * part + 0.45 for part in colour) if dark else colour,
                "marker": MARKERS[(number + 5 * variant) % len(MARKERS)],
                "linestyle": LINES[variant % len(LINES)],
                "markersize": 5,
            }
        )
    return found


def _accuracy(entry: Entry) -> tuple[float, tuple[float, float]]:
    """Mean over the splits and its interval, which is empty in a file of an earlier version."""
    average = (entry.get("scores") or entry)["average"]
    value = average["accuracy"]
    return value, tuple(average.get("intervals", {}).get("accuracy", (value, value)))


def _whiskers(values: Sequence[float], bounds: Sequence[Sequence[float]]) -> list[list[float]]:
    """Lengths below and above, as `errorbar` takes them."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
    return [below, [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]]


def _scored(entry: Entry) -> tuple[list[int], list[float]]:
    rows = unique_answers(entry["answers"])
    return [int(row["label"] == "yes") for row in rows], [row["score"] for row in rows]


def _apart(tokens: Sequence[int]) -> list[int]:
    """Of ascending numbers, those whose labels have room beside each other on a logarithmic axis."""
    shown: list[int] = []
    for n in reversed(tokens):
        if not shown or np.log(shown[0] / max(n, 1)) > 0.09 * np.log(max(tokens) / max(min(tokens), 1)):
            shown.insert(0, n)
    return shown


def _percent(axes: Axes, which: str) -> None:
    for letter in which:
        getattr(axes, f"set_{letter}lim")(-0.03, 1.03)
        getattr(axes, f"{letter}axis").set_major_formatter(PercentFormatter(1))


def legend(figure: Figure) -> None:
    """Names the runs of the first panel below all panels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        columns = max(1, min(4, int(figure.get_figwidth() * 14) // (max(map(len, labels)) + 8)))
        figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
