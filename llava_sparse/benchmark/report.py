"""Results of the benchmark: a JSON file, a table, a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from llava_sparse.evaluation.report import write_json
from llava_sparse.evaluation.runs import DENSE

STAGES = ("vision tower", "projector", "selection", "decoder")


def write_results(results: dict[str, Any], path: str | Path) -> None:
    """Writes results, replacing old ones in one step."""
    write_json(results, path)


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads what `write_results` wrote.

    Raises:
        ValueError: if the file holds something else.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all(isinstance(found[name], kind) for name, kind in _PARTS.items()):
            raise TypeError
        for entry in found["results"]:
            entry["run"], entry["place"]["batch_size"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: these are no results of llava-sparse bench.") from error
    return found


_PARTS = {"settings": dict, "environment": dict, "rates": dict, "results": list}


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


def table(results: dict[str, Any]) -> Table:
    """A row for every run at every place: milliseconds, how many times faster than dense, arithmetic, memory."""
    settings = results["settings"]
    tokens = settings["new_tokens"]
    columns = (
        "prefill",
        "decode, a token",
        f"generate {tokens}",
        "of floor",
        "selection",
        "GFLOP",
        "by formula",
        "cache",
        "peak",
    )
    found = Table("batch", "words", "attention", "run", *columns, title=_title(results))
    places = None
    for entry in results["results"]:
        if places not in (None, _place(entry)):
            found.add_section()
        places = _place(entry)
        head = [*(str(value) for value in places), entry["run"]]
        if "error" in entry:
            found.add_row(*head, entry["error"])
            continue
        formula = sum(entry["flops_by_formula"].values())
        peak = entry["peak_bytes"]
        found.add_row(
            *head,
            *(_times(entry, measure) for measure in ("prefill", "decode", "generate")),
            _times_of_floor(entry),
            f"{1000 * entry['stages']['selection']:.2f}" if entry["run"] != DENSE else "",
            f"{entry['flops'] / 1e9:.1f}",
            f"{100 * (formula / entry['flops'] - 1):+.1f} %",
            f"{entry['kv_bytes'] / 2**20:.1f} MiB{_share(entry)}",
            "" if peak is None else f"{peak / 2**20:.0f} MiB",
        )
    return found


def stage_table(results: dict[str, Any]) -> Table:
    """A row for every run at every place: milliseconds of the prefill's stages, and how many times their floors."""
    found = Table(
        "batch", "words", "attention", "run", *STAGES, "selection / dense prefill", title="Stages of a prefill"
    )
    dense: float | None = None
    for entry in results["results"]:
        if entry["run"] == DENSE:
            dense = None if "error" in entry else sum(entry["stages"].values())
        if "error" in entry:
            continue
        cells = [
            f"{1000 * entry['stages'][stage]:.2f}"
            + (f" ({entry['stages'][stage] / entry['floor'][stage]:.1f})" if stage != "selection" else "")
            for stage in STAGES
        ]
        share = "" if dense is None else f"{100 * entry['stages']['selection'] / dense:.1f} %"
        found.add_row(*(str(value) for value in _place(entry)), entry["run"], *cells, share)
    return found


def _share(entry: dict[str, Any]) -> str:
    return f" ({100 * entry['kv_visual_share']:.0f} %)" if "kv_visual_share" in entry else ""


def _title(results: dict[str, Any]) -> str:
    settings, place = results["settings"], results["environment"]
    machine = place.get("device_name") or f"{place['processor']} CPU, {place['threads']} threads"
    compiled = ", compiled" if settings["compiled"] else ""
    return (
        f"{settings['model']}, {settings['dtype']}{compiled}, {machine}: milliseconds, median of {settings['rounds']} "
        "(times faster than dense, quartiles); of floor: prefill and decoding; cache: visual tokens' share of dense"
    )


def plot(results: dict[str, Any]) -> Figure:
    """Two panels: the prefill's time and the cache against visual tokens, and speed-up against batch size.

    Where a speed-up line is below 1, pruning does not pay.
    """
    entries = [entry for entry in results["results"] if "error" not in entry]
    first = _place(entries[0])[1:]
    entries = [entry for entry in entries if _place(entry)[1:] == first]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    memory = left.twinx()
    largest = max(entry["place"]["batch_size"] for entry in entries)
    shown = [entry for entry in entries if entry["place"]["batch_size"] == largest]
    kinds = sorted({entry["run"].partition("@")[0] for entry in shown} - {DENSE})
    dense = [entry for entry in shown if entry["run"] == DENSE]
    for number, kind in enumerate(kinds):
        line = sorted([e for e in shown if e["run"].partition("@")[0] == kind] + dense, key=_visual_tokens)
        tokens = [_visual_tokens(entry) for entry in line]
        times = [1000 * entry["seconds"]["prefill"]["median"] for entry in line]
        left.plot(tokens, times, "o-", color=f"C{number}", label=kind)
        memory.plot(tokens, [entry["kv_bytes"] / 2**20 for entry in line], "x:", color=f"C{number}")
    left.set(xlabel="visual tokens in the cache, mean over layers", ylabel="prefill, ms (circles)", ylim=(0, None))
    memory.set(ylabel="cache, MiB (crosses)", ylim=(0, None))
    left.set_title(f"batch {largest}")
    if kinds:
        left.legend()
    compared = [entry for entry in entries if entry["run"] != DENSE and "speedup" in entry]
    for run in dict.fromkeys(entry["run"] for entry in compared):
        line = sorted((e for e in compared if e["run"] == run), key=lambda e: e["place"]["batch_size"])
        sizes = [entry["place"]["batch_size"] for entry in line]
        ratios = [entry["speedup"]["prefill"] for entry in line]
        error = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        right.errorbar(sizes, [r["median"] for r in ratios], yerr=error, marker="o", capsize=3, label=run)
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="batch size", ylabel="prefill: times faster than dense", xscale="log", ylim=(0, None))
    right.set_xticks(sorted({e["place"]["batch_size"] for e in entries}), minor=False)
    right.xaxis.set_major_formatter("{x:.0f}")
    if compared:
        right.legend()
    return figure


def _visual_tokens(entry: dict[str, Any]) -> float:
    words: int = entry["place"]["text_tokens"]
    return sum(length - words for length in entry["lengths"]) / len(entry["lengths"])
