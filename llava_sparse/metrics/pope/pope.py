"""POPE's scores: yes/no answers about objects in pictures, parsed and counted as the official script does."""

from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
POPE (Polling-based Object Probing Evaluation) asks a model "Is there a ... in the image?". An answer counts as "no" if
the first sentence (the text before the first '.'), with commas removed and split at spaces, has the word "No", "not" or
"no", and as "yes" otherwise. "yes" is the positive class.
"""

_CITATION = """
@inproceedings{li2023pope,
  title = {Evaluating Object Hallucination in Large Vision-Language Models},
  author = {Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle = {EMNLP},
  year = {2023}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: the model's answers as text, or labels: 1 or True (yes) and 0 or False (no).
    references: "yes" and "no", or such labels; as many as predictions.

Returns:
    accuracy, precision, recall, f1 and yes_ratio (share of "yes" among the answers), each from 0 to 1; a quotient
    whose divisor is 0 counts as 0.

Raises:
    ValueError: for a reference or a prediction that is neither text nor label, naming its row (from 0 in the batch);
        for empty lists.

Examples:
    >>> pope = evaluate.load("path/to/metrics/pope")
    >>> pope.compute(predictions=["Yes, there is a dog.", "No"], references=["yes", "yes"])
    {'accuracy': 0.5, 'precision': 1.0, 'recall': 0.5, 'f1': 0.6666666666666666, 'yes_ratio': 0.5}
"""


def parse_answer(text: str) -> str:
    """The label, "yes" or "no", that an answer counts as by the official rule."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _text(value: Any, what: str, row: int) -> str:
    """A prediction or reference as text; of NumPy and PyTorch scalars too."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int) and value in (0, 1):
        return "yes" if value else "no"
    if not isinstance(value, str) or (what == "references" and value not in ("yes", "no")):
        kinds = "'yes', 'no', 1, 0" if what == "references" else "text, 1, 0"
        raise ValueError(f"{what}[{row}] is {value!r}; allowed: {kinds}.")
    return value


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class Pope(evaluate.Metric):
    """The metric module; see `_INPUTS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = ("string", "int64")  # Booleans count as integers.
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.Value(p), "references": datasets.Value(r)})
                for p in kinds
                for r in kinds
            ],
            homepage="https://github.com/RUCAIBox/POPE",
            license="Apache-2.0",
            reference_urls=["https://github.com/RUCAIBox/POPE", "https://arxiv.org/abs/2305.10355"],
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds a row, as `evaluate.Metric` does."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds rows, as `evaluate.Metric` does; refuses empty lists."""
        # `evaluate` takes the type of a column from its first row and casts the others: 0 would become the answer "0",
        # a yes. Text is what all of them are cast to without loss.
        if predictions is not None and references is not None:
            predictions = [_text(value, "predictions", row) for row, value in enumerate(predictions)]
            references = [_text(value, "references", row) for row, value in enumerate(references)]
            if not predictions or not references:
                raise ValueError("There is nothing to score: predictions or references are empty.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        said = [parse_answer(text) == "yes" for text in predictions]
        true = [label == "yes" for label in references]
        hits = sum(s and t for s, t in zip(said, true, strict=True))
        correct = sum(s == t for s, t in zip(said, true, strict=True))
        precision = hits / sum(said) if any(said) else 0.0
        recall = hits / sum(true) if any(true) else 0.0
        return {
            "accuracy": correct / len(true),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
            "yes_ratio": sum(said) / len(said),
        }
