"""What every stage of a model costs, dense and pruned."""

from __future__ import annotations

from .profile import profile, profile_runs
from .report import load_results, plot, stage_table, table, tables, write_results
from .run import Settings, bench, measure
from .shapes import SHAPES, build_model

__all__ = [
    "SHAPES",
    "Settings",
    "bench",
    "build_model",
    "load_results",
    "measure",
    "plot",
    "profile",
    "profile_runs",
    "stage_table",
    "table",
    "tables",
    "write_results",
]
