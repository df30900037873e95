"""What every stage of a model costs, dense and pruned."""

from __future__ import annotations

from .analytic import MEMORY_COLUMNS, analytic, analytic_table, memory, memory_rows, memory_table
from .inputs import make_inputs
from .profile import profile, profile_runs
from .report import load_results, plot, stage_table, table, tables, write_results
from .run import Settings, bench, measure
from .shapes import SHAPES, build_model, shape_config

__all__ = [
    "MEMORY_COLUMNS",
    "SHAPES",
    "Settings",
    "analytic",
    "analytic_table",
    "bench",
    "build_model",
    "load_results",
    "make_inputs",
    "measure",
    "memory",
    "memory_rows",
    "memory_table",
    "plot",
    "profile",
    "profile_runs",
    "shape_config",
    "stage_table",
    "table",
    "tables",
    "write_results",
]
