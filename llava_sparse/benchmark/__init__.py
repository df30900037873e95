"""What every stage of a model costs, dense and pruned."""

from __future__ import annotations

from .profile import profile
from .report import load_results, plot, stage_table, table, write_results
from .run import bench
from .shapes import SHAPES, build_model

__all__ = ["SHAPES", "bench", "build_model", "load_results", "plot", "profile", "stage_table", "table", "write_results"]
