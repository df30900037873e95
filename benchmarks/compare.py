"""Compares the speed-ups of two results of `llava-sparse bench`; `make bench` calls it.

    python benchmarks/compare.py new.json benchmarks/results/OLD.json

Ratios to the dense model are compared, never times: they hold on other machines of a kind, and on busy ones. A ratio
that is more than the tolerance below the old one is a failure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llava_sparse.benchmark import load_results

TOLERANCE = 0.25


def speedups(path: Path) -> dict[tuple[Any, ...], float]:
    """Medians by run, place and measure."""
    return {
        (entry["run"], *entry["place"].values(), measure): ratio["median"]
        for entry in load_results(path)["results"]
        for measure, ratio in entry.get("speedup", {}).items()
        if entry["run"] != "dense"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share of the old ratio that may be lost")
    given = parser.parse_args()
    new, old = speedups(given.new), speedups(given.old)
    if not new or new.keys() != old.keys():
        raise SystemExit(f"{given.new} and {given.old} do not hold the same runs and places: run the same benchmark.")
    table = Table("run", "batch", "words", "attention", "measure", "old", "new", "")
    lost = 0
    for key, ratio in new.items():
        failed = ratio < old[key] * (1 - given.tolerance)
        lost += failed
        table.add_row(*map(str, key), f"{old[key]:.2f}x", f"{ratio:.2f}x", "slower" if failed else "")
    Console(width=120).print(table)
    if lost:
        raise SystemExit(f"{lost} of {len(new)} speed-ups fell by more than {100 * given.tolerance:.0f} %.")


if __name__ == "__main__":
    main()
