"""The study of docs/study.md, with few questions and runs."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import study  # noqa: E402


@pytest.mark.slow
def test_every_table_and_figure_of_the_page(tmp_path, monkeypatch):
    few = {"budgets": ["dense", "visionzip", "random"], "depth": ["dense"]}
    parts = [replace(p, methods=few.get(p.name, p.methods), budgets=(64,), seeds=(0,)) for p in study.PARTS]
    monkeypatch.setattr(study, "PARTS", parts)
    page = tmp_path / "study.md"
    page.write_text((ROOT / "docs" / "study.md").read_text(encoding="utf-8"), encoding="utf-8")
    command = ["study.py", "--results", str(tmp_path / "results"), "--page", str(page), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    text = page.read_text(encoding="utf-8")
    tables = re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert {name for name, _ in tables} >= {part.name for part in study.PARTS}
    for name, table in tables:
        rows = table.strip().splitlines()
        assert len(rows) > 2, name
        assert len({row.count("|") for row in rows}) == 1, name
    for picture in re.findall(r"\]\((study/.*?)\)", text):
        assert (tmp_path / picture).stat().st_size > 5000
    study.main()
    assert page.read_text(encoding="utf-8") == text


def test_marks_that_are_missing_are_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: a -->\nold\n<!-- end -->\n")
    study.fill(page, {"a": "new"})
    assert page.read_text() == "<!-- table: a -->\nnew\n<!-- end -->\n"
    with pytest.raises(ValueError, match="table 'b' are there 0 times"):
        study.fill(page, {"b": "new"})
