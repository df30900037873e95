"""The comparison of docs/field.md, with few questions and runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import field  # noqa: E402


@pytest.mark.slow
def test_every_table_and_figure_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(field, "list_methods", lambda: ["delegate", "random", "visionzip"])
    monkeypatch.setattr(field, "ABLATIONS", field.ABLATIONS[:1])
    monkeypatch.setattr(field, "COMPOSED", [])
    monkeypatch.setattr(field, "PREFILL", {**field.PREFILL, "batch_sizes": (1,), "rounds": 1, "warm_up": 0})
    page = tmp_path / "field.md"
    page.write_text((ROOT / "docs" / "field.md").read_text(encoding="utf-8"), encoding="utf-8")
    command = ["field.py", "--results", str(tmp_path / "results"), "--page", str(page), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", command)
    field.main()
    tables = re.findall(r"<!-- table: ([\w ]+) -->\n(.*?)<!-- end -->", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(tables) == 4 + len(field.BUDGETS)
    for name, table in tables:
        rows = table.strip().splitlines()
        assert len(rows) > 2, name
        assert len({row.count("|") for row in rows}) == 1, name
    assert (tmp_path / "field" / "pareto.png").stat().st_size > 5000


def test_p_of_pictures():
    """Ten pictures that are all better are one of 2^10 patterns of signs, two-sided; equal runs differ in none."""

    def entry(right: str) -> dict:
        answers = [{"image": f"{i // 2}", "parsed": said, "label": "y"} for i, said in enumerate(right)]
        return {"answers": answers}

    better, worse = entry("yy" * 10), entry("yn" * 10)
    assert abs(field.paired_p(better, worse) - 2 / 2**10) < 1e-6
    assert field.paired_p(better, better) == 1
