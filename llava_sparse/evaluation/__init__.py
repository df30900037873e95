"""POPE: questions, answers, scores."""

from .data import load_pope
from .models import LoadedModel, ask, load_model
from .report import score, table, write_results
from .runner import answer_questions, evaluate_pope, mean_visual_tokens

__all__ = [
    "LoadedModel",
    "answer_questions",
    "ask",
    "evaluate_pope",
    "load_model",
    "load_pope",
    "mean_visual_tokens",
    "score",
    "table",
    "write_results",
]
