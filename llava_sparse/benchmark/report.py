"""Results of the benchmark: a JSON file, tables, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich.table
from matplotlib.figure import Figure

from llava_sparse.evaluation.figures import legend, new_figure, styles, theme
from llava_sparse.evaluation.files import check_regular, parse_json, write_json
from llava_sparse.evaluation.plan import DENSE
from llava_sparse.evaluation.tables import Table

STAGES = ("vision tower", "projector", "selection", "decoder")
# Parts of a file.
KINDS = {"settings": dict, "environment": dict, "rates": dict, "results": list}
HEAD = ["batch", "words", "attention", "run"]


def write_results(results: dict[str, Any], path: str | Path) -> None:
    """Writes results, replacing old ones in one step."""
    write_json(results, path)


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads what `write_results` wrote.

    Raises:
        ValueError: if the file holds something else.
        OSError: if it is no regular file, or cannot be read.
    """
    check_regular(Path(path))
    try:
        found: dict[str, Any] = parse_json(Path(path).read_bytes())
        if not all(isinstance(found[name], kind) for name, kind in KINDS.items()):
            raise TypeError
        for entry in found["results"]:
            entry["run"], entry["place"]["batch_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: these are no results of llava-sparse bench.") from error
    return found


def _place(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry["place"].values())


def _times(entry: dict[str, Any], measure: str) -> str:
    seconds = entry["seconds"][measure]
    text = f"{1000 * seconds['median']:.2f}"
    ratio = entry.get("speedup", {}).get(measure)
    if entry["run"] == DENSE or ratio is None:
        return text
    return f"{text} ({ratio['median']:.2f}x, {ratio['low']:.2f}-{ratio['high']:.2f})"


def _times_of_floor(entry: dict[str, Any]) -> str:
    """How many times as long as their floors prefill and decoding take."""
    return " / ".join(
        f"{entry['seconds'][name]['median'] / entry['floor'][name]:.1f}" for name in ("prefill", "decode")
    )


def _share_of_limit(entry: dict[str, Any]) -> str:
    """How much of the prefill's speed-up that the arithmetic allows there is."""
    if entry["run"] == DENSE or "limit" not in entry or "speedup" not in entry:
        return ""
    return f"{100 * entry['speedup']['prefill']['median'] / entry['limit']:.0f} % of {entry['limit']:.2f}x"


def counts_text(entry: dict[str, Any]) -> str:
    """Visual tokens entering the decoder, mean over its layers, mean over the prompts; of older files what is known."""
    if "visual_tokens" not in entry:
        return f"{_visual_tokens(entry):.1f}"
    return " / ".join(f"{value:.1f}".removesuffix(".0") for value in entry["visual_tokens"].values())


def tables(results: dict[str, Any]) -> list[Table]:
    """Times, and the stages of a prefill."""
    return [_times_table(results), _stages_table(results)]


def table(results: dict[str, Any]) -> rich.table.Table:
    """A row for every run at every place: milliseconds, how many times faster than dense, arithmetic, memory."""
    return _times_table(results).rich()


def stage_table(results: dict[str, Any]) -> rich.table.Table:
    """A row for every run at every place: milliseconds of the prefill's stages, and how many times their floors."""
    return _stages_table(results).rich()


def _times_table(results: dict[str, Any]) -> Table:
    columns = ["prefill", "decode, a token", f"generate {results['settings']['new_tokens']}", "of limit", "of floor"]
    columns = [*HEAD, "visual tokens", *columns, "selection", "GFLOP", "by formula", "cache", "peak"]
    rows: list[list[str]] = []
    sections = []
    for number, entry in enumerate(results["results"]):
        if number and _place(entry) != _place(results["results"][number - 1]):
            sections.append(number)
        head = [*(str(value) for value in _place(entry)), entry["run"]]
        cells = [entry["error"]] if "error" in entry else _measured(entry)
        rows.append([*head, *cells, *[""] * (len(columns) - len(head) - len(cells))])
    return Table("", columns, rows, headers=len(HEAD), title=_title(results), sections=sections)


def _measured(entry: dict[str, Any]) -> list[str]:
    formula, peak = sum(entry["flops_by_formula"].values()), entry["peak_bytes"]
    return [
        counts_text(entry),
        *(_times(entry, measure) for measure in ("prefill", "decode", "generate")),
        _share_of_limit(entry),
        _times_of_floor(entry),
        f"{1000 * entry['stages']['selection']:.2f}" if entry["run"] != DENSE else "",
        f"{entry['flops'] / 1e9:.1f}",
        f"{100 * (formula / entry['flops'] - 1):+.1f} %",
        f"{entry['kv_bytes'] / 2**20:.1f} MiB{_share(entry)}",
        "" if peak is None else f"{peak / 2**20:.0f} MiB",
    ]


def _stages_table(results: dict[str, Any]) -> Table:
    rows: list[list[str]] = []
    dense: float | None = None
    for entry in results["results"]:
        if entry["run"] == DENSE:
            dense = None if "error" in entry else sum(entry["stages"].values())
        if "error" in entry:
            continue
        cells = [
            f"{1000 * entry['stages'][stage]:.2f}"
            + (f" ({entry['stages'][stage] / entry['floor'][stage]:.1f})" if _has_floor(entry, stage) else "")
            for stage in STAGES
        ]
        share = "" if dense is None else f"{100 * entry['stages']['selection'] / dense:.1f} %"
        rows.append([*(str(value) for value in _place(entry)), entry["run"], *cells, share])
    columns = [*HEAD, *STAGES, "selection / dense prefill"]
    return Table("", columns, rows, headers=len(HEAD), title="Stages of a prefill")


def _has_floor(entry: dict[str, Any], stage: str) -> bool:
    """Of a selection it says little; a tower may have its projector within it."""
    return stage != "selection" and entry["floor"][stage] > 0


def _share(entry: dict[str, Any]) -> str:
    return f" ({100 * entry['kv_visual_share']:.0f} %)" if "kv_visual_share" in entry else ""


def _title(results: dict[str, Any]) -> str:
    settings, place = results["settings"], results["environment"]
    machine = place.get("device_name") or f"{place['processor']} CPU, {place['threads']} threads"
    compiled = ", compiled" if settings["compiled"] else ""
    return (
        f"{settings['model']}, {settings['dtype']}{compiled}, {machine}: milliseconds, median of {settings['rounds']} "
        "(times faster than dense, quartiles); visual tokens: entering the decoder / mean over layers / mean over "
        "prompts; of limit: prefill, attention counted as causal; of floor: prefill and decoding; cache: visual share"
    )


def plot(results: dict[str, Any]) -> Figure:
    """Two panels: the prefill's time and the cache against visual tokens, and speed-up against batch size.

    Where a speed-up line is below 1, pruning does not pay. A method has one colour in both.
    """
    entries = [entry for entry in results["results"] if "error" not in entry]
    first = _place(entries[0])[1:]
    entries = [entry for entry in entries if _place(entry)[1:] == first]
    with theme():
        figure, (left, right) = new_figure(2)
        _plot_times(left, entries)
        _plot_speed_up(right, entries)
        legend(figure)
    return figure


def _plot_times(axes: Any, entries: list[dict[str, Any]]) -> None:
    memory = axes.twinx()
    memory.grid(visible=False)
    largest = max(entry["place"]["batch_size"] for entry in entries)
    shown = [entry for entry in entries if entry["place"]["batch_size"] == largest]
    kinds = sorted({entry["run"].partition("@")[0] for entry in shown} - {DENSE})
    dense = [entry for entry in shown if entry["run"] == DENSE]
    for kind, style in zip(kinds, styles(kinds), strict=True):
        line = sorted([e for e in shown if e["run"].partition("@")[0] == kind] + dense, key=_visual_tokens)
        tokens = [_visual_tokens(entry) for entry in line]
        axes.plot(tokens, [1000 * entry["seconds"]["prefill"]["median"] for entry in line], label=kind, **style)
        cache = [entry["kv_bytes"] / 2**20 for entry in line]
        memory.plot(tokens, cache, **{**style, "marker": "x", "linestyle": ":"})
    axes.set(xlabel="visual tokens in the cache, mean over layers", ylabel="prefill, ms", ylim=(0, None))
    axes.set_title(f"batch {largest}")
    memory.set(ylabel="cache, MiB (crosses)", ylim=(0, None))


def _plot_speed_up(axes: Any, entries: list[dict[str, Any]]) -> None:
    compared = [entry for entry in entries if entry["run"] != DENSE and "speedup" in entry]
    runs = list(dict.fromkeys(entry["run"] for entry in compared))
    for run, style in zip(runs, styles(runs), strict=True):
        line = sorted((e for e in compared if e["run"] == run), key=lambda e: e["place"]["batch_size"])
        sizes = [entry["place"]["batch_size"] for entry in line]
        ratios = [entry["speedup"]["prefill"] for entry in line]
        error = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        axes.errorbar(sizes, [r["median"] for r in ratios], yerr=error, capsize=3, **style)
        axes.annotate(f" {run.partition('@')[2]}", (sizes[-1], ratios[-1]["median"]), fontsize=8, color=style["color"])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="batch size", ylabel="prefill: times faster than dense", xscale="log", ylim=(0, None))
    axes.set_xticks(sorted({e["place"]["batch_size"] for e in entries}), minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")


def _visual_tokens(entry: dict[str, Any]) -> float:
    words: int = entry["place"]["text_tokens"]
    return sum(length - words for length in entry["lengths"]) / len(entry["lengths"])
