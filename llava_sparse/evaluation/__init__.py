"""POPE: questions, answers, scores."""

from .answering import Answer, Asker
from .data import load_pope
from .models import LoadedModel, ask, load_model
from .report import comparison_table, score, table
from .runner import evaluate_pope
from .runs import Run, plan_runs, split_methods
from .statistics import compare, summarize

__all__ = [
    "Answer",
    "Asker",
    "LoadedModel",
    "Run",
    "ask",
    "compare",
    "comparison_table",
    "evaluate_pope",
    "load_model",
    "load_pope",
    "plan_runs",
    "score",
    "split_methods",
    "summarize",
    "table",
]
