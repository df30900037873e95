"""Evaluation: tasks (POPE), questions, answers, scores, reports."""

from .answer import Answer, Asker
from .model import LoadedModel, ask, load_model
from .plan import Run, plan_runs, split_methods
from .results import Results, read_results, score
from .run import Settings, evaluate, evaluate_pope
from .statistics import compare, summarize
from .tables import comparison_table, table
from .tasks import Task, register_task
from .tasks.pope import load_pope

__all__ = [
    "Answer",
    "Asker",
    "LoadedModel",
    "Results",
    "Run",
    "Settings",
    "Task",
    "ask",
    "compare",
    "comparison_table",
    "evaluate",
    "evaluate_pope",
    "load_model",
    "load_pope",
    "plan_runs",
    "read_results",
    "register_task",
    "score",
    "split_methods",
    "summarize",
    "table",
]
