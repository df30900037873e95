"""The tables of docs/memory.md, from the sizes of published models: no weights are made, nothing is measured.

python benchmarks/memory.py
"""

from __future__ import annotations

from pathlib import Path

from llava_sparse.benchmark import MEMORY_COLUMNS, analytic, memory_rows
from llava_sparse.benchmark.report import counts_text
from llava_sparse.published import MODELS
from llava_sparse.recipes import BUDGETS

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- python benchmarks/memory.py -->\n", "<!-- end -->"


def rows_of(shape: str) -> list[list[str]]:
    """Dense, and two of the model's recipes at their smallest budget: one before the decoder, one in it."""
    before = "visionzip" if "visionzip" in BUDGETS[shape] else "divprune"
    budget = min(BUDGETS[shape][before])
    entries = analytic(shape, [before, "sparsevlm"], [max(budget, min(BUDGETS[shape]["sparsevlm"]))])
    rows = memory_rows(shape, entries)
    return [[*row[:5], counts_text(entry), *row[5:]] for row, entry in zip(rows, entries, strict=True)]


def table(rows: list[list[str]]) -> str:
    """As Markdown."""
    columns = [*MEMORY_COLUMNS[:5], "visual tokens", *MEMORY_COLUMNS[5:]]
    head = [columns, ["---"] + ["--:"] * 3 + ["---"] + ["--:"] * 4]
    return "".join(f"| {' | '.join(row)} |\n" for row in [*head, *rows])


if __name__ == "__main__":
    before, _, behind = PAGE.read_text().partition(BEGIN)
    rows = [row for shape in MODELS for row in rows_of(shape)]
    PAGE.write_text(before + BEGIN + "\n" + table(rows) + "\n" + END + behind.partition(END)[2])
