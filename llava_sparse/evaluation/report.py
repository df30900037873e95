"""Results of an evaluation: scores, a JSON file, and a table as papers print it."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.table import Table

import llava_sparse
from llava_sparse.metrics.pope.pope import Pope, parse_answer
from llava_sparse.reference import CHECKPOINT

from .data import SPLITS
from .models import LoadedModel

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def score(dataset: datasets.Dataset, texts: list[str]) -> dict[str, Any]:
    """Scores answers by split.

    Args:
        dataset: questions, as from `load_pope`.
        texts: one answer for every row.

    Returns:
        `splits`, the metrics of each split and the number of questions they count; `average`, the mean of each metric
        over the splits; `answers`, one entry for every row.
    """
    questions = dataset.remove_columns("image").to_list()
    answers = [
        {
            "split": row["category"],
            "question_id": row["question_id"],
            "image": row["image_source"],
            "question": row["question"],
            "label": row["answer"],
            "answer": text,
            "parsed": parse_answer(text),
        }
        for row, text in zip(questions, texts, strict=True)
    ]
    metric = Pope(keep_in_memory=True)
    splits = {}
    for split in SPLITS:
        rows = [row for row in answers if row["split"] == split]
        scores = metric.compute(predictions=[r["answer"] for r in rows], references=[r["label"] for r in rows])
        splits[split] = {"questions": len(rows), **scores}
    average = {name: sum(splits[split][name] for split in SPLITS) / len(SPLITS) for name in METRICS}
    return {"splits": splits, "average": average, "answers": answers}


def count_questions(dataset: datasets.Dataset) -> dict[str, Any]:
    """Questions of each split, all of which are scored, and the distinct (image, question) pairs that are asked."""
    categories = list(dataset["category"])
    pairs = set(zip(dataset["image_source"], dataset["question"], strict=True))
    return {
        "splits": {split: categories.count(split) for split in SPLITS},
        "scored": len(categories),
        "asked": len(pairs),
        "images": len({image for image, _ in pairs}),
        "note": "Each distinct (image, question) pair is asked once; its answer is scored in every split that has it.",
    }


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """Name and settings of a model."""
    return {
        "model": "reference" if loaded.name == str(CHECKPOINT) else loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "threads": torch.get_num_threads(),
        "attn_implementation": loaded.model.config._attn_implementation,
    }


def describe_method(name: str, model: Any, budget: int | None) -> dict[str, Any]:
    """Name and settings of the method that a model runs, as they are in force."""
    method = getattr(model.model, "sparsifier", None)
    return {
        "method": name,
        "kind": None if method is None else method.kind,
        "budget": budget,
        "layers": None if method is None else list(method.layers),
        "budgets": None if method is None else list(method.budgets),
        "options": getattr(model.config, "sparse_options", None),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = {
        name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "datasets", "evaluate")
    }
    return {
        "llava_sparse": llava_sparse.__version__,
        "python": platform.python_version(),
        **packages,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
    }


def check_output(path: str | Path) -> None:
    """Checks, before anything is computed, that results can be written to a file.

    Raises:
        OSError: if the folder does not exist, or the path is a folder.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OSError(f"{path}: results cannot be written there; a file in a folder that exists is allowed.")


def write_results(results: dict[str, Any], path: str | Path) -> None:
    """Writes results as JSON, replacing the file in one step.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def table(results: dict[str, Any]) -> Table:
    """A row for each split and their average, for every method; scores in percent."""
    counts = results["questions"]
    sizes = ", ".join(f"{split} {size:,}" for split, size in counts["splits"].items())
    shown = Table(
        title=f"POPE, {results['settings']['dataset']}",
        caption=f"Questions scored: {sizes}. {counts['asked']:,} distinct (image, question) pairs of "
        f"{counts['images']:,} images were asked once each and reused across the splits.",
        caption_justify="left",
        pad_edge=False,
    )
    shown.add_column("method")
    for name in ("budget", "visual tokens"):
        shown.add_column(name, justify="right")
    shown.add_column("split")
    for name in (*METRICS, "questions/s"):
        shown.add_column(name.replace("f1", "F1").replace("_", " "), justify="right")
    for entry in results["methods"]:
        shown.add_section()
        head = [
            entry["method"],
            "–" if entry["budget"] is None else str(entry["budget"]),
            f"{entry['visual_tokens']:.1f}".removesuffix(".0"),
        ]
        for split, scores in entry["splits"].items():
            shown.add_row(*head, split, *_percent(scores), "")
            head = ["", "", ""]
        speed = f"{entry['questions_per_second']:.1f}"
        shown.add_row(*head, "average", *_percent(entry["average"]), speed, style="bold")
    return shown


def _percent(scores: dict[str, float]) -> list[str]:
    return [f"{100 * scores[name]:.1f}" for name in METRICS]
