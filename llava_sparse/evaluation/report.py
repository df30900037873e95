"""Results of an evaluation: scores, a JSON file, and a table as papers print it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import llava_sparse
from llava_sparse.metrics.pope.pope import parse_answer
from llava_sparse.modeling.pruning_settings import as_lists
from llava_sparse.preprocessing import recorded
from llava_sparse.reference import CHECKPOINT

from .models import LoadedModel
from .runs import Run
from .statistics import METRICS, summarize

# Entries of configurations that are recorded elsewhere, or change no answer.
_NO_SETTINGS = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype")


def score(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str], scores: Sequence[float] | None = None
) -> dict[str, Any]:
    """Scores answers.

    Args:
        rows: questions with the columns of `load_pope` but the image.
        texts: one answer for every row; scores: their log-odds of yes, if there are any.

    Returns:
        `scores`, all of `statistics.summarize`; `splits` and `average`, the bare numbers of its parts of that name;
        `answers`, one entry for every row.
    """
    answers: list[dict[str, Any]] = [
        {
            "split": row["category"],
            "question_id": row["question_id"],
            "image": row["image_source"],
            "question": row["question"],
            "label": row["answer"],
            "answer": text,
            "parsed": parse_answer(text),
        }
        for row, text in zip(rows, texts, strict=True)
    ]
    if scores is not None:
        answers = [{**answer, "score": value} for answer, value in zip(answers, scores, strict=True)]
    found = summarize(answers)
    return {
        "scores": found,
        "splits": {
            split: {name: part[name] for name in ("questions", *METRICS)} for split, part in found["splits"].items()
        },
        "average": {name: found["average"][name] for name in METRICS},
        "answers": answers,
    }


def count_questions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Questions of each split, all of which are scored, and the distinct (image, question) pairs that are asked."""
    pairs = {(row["image_source"], row["question"]) for row in rows}
    return {
        "splits": dict(Counter(row["category"] for row in rows)),
        "scored": len(rows),
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
        "attn_implementation": loaded.model.config._attn_implementation,
        "weights_sha256": _fingerprint(loaded.model),
        "configuration_sha256": _configuration(loaded),
        "preprocessing": recorded(loaded.processor),
    }


def _configuration(loaded: LoadedModel) -> str:
    """A digest of what, beside the weights, makes answers of pictures and questions; methods and versions apart."""
    processor, model = loaded.processor, loaded.model
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("sparse_")}
    parts = [
        {name: value for name, value in part.items() if name not in _NO_SETTINGS}
        for part in (config, model.generation_config.to_dict(), processor.image_processor.to_dict())
    ]
    text = json.dumps([*parts, processor.tokenizer.get_vocab()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(model: Any) -> str:
    """A digest of some numbers of every weight: answers of a retrained model are not those of the old one."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if weight.device.type == "meta":  # Offloaded.
            continue
        some = weight.flatten()[:: max(1, weight.numel() // 64)]
        digest.update(name.encode() + some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_run(run: Run, model: Any) -> dict[str, Any]:
    """Name and settings of a run, as they are in force."""
    method = getattr(model.model, "sparsifier", None)
    return {
        "name": run.name,
        "method": run.method,
        "kind": None if method is None else method.kind,
        "budget": run.budget,
        "seed": run.seed,
        "layers": None if method is None else as_lists(method.layers),
        "budgets": None if method is None else as_lists(method.budgets or ()),
        "options": getattr(model.config, "sparse_options", None),
        "patches": (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2,
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


def timing_path(output: str | Path) -> Path:
    """What a results file is accompanied by: `run.json`, `run.timing.json`."""
    path = Path(output)
    return path.with_name(path.name.removesuffix(".json") + ".timing.json")


def write_json(results: dict[str, Any], path: str | Path) -> None:
    """Writes a JSON file, replacing an old one in one step.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def table(results: dict[str, Any]) -> Table:
    """A row for each split and their average, for every run; scores in percent."""
    counts = results["questions"]
    sizes = ", ".join(f"{split} {size:,}" for split, size in counts["splits"].items())
    skipped = f" {len(counts['skipped']):,} rows were skipped." if counts["skipped"] else ""
    shown = Table(
        title=f"POPE, {results['settings']['dataset']}",
        caption=f"Questions scored: {sizes}. {counts['asked']:,} distinct (image, question) pairs of "
        f"{counts['images']:,} images were asked once each and reused across the splits.{skipped} In brackets: "
        "95 % interval, images resampled.",
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
            entry["name"].partition("@")[0],
            "–" if entry["budget"] is None else str(entry["budget"]),
            "–" if entry["visual_tokens"] is None else f"{entry['visual_tokens']:.1f}".removesuffix(".0"),
        ]
        for split, scores in entry["splits"].items():
            shown.add_row(*head, split, *_percent(scores), "")
            head = ["", "", ""]
        speed = results.get("timing", {}).get("runs", {}).get(entry["name"], {}).get("questions_per_second")
        average = _percent(entry["average"])
        low, high = entry["scores"]["average"]["intervals"]["accuracy"]
        average[0] += f" [{100 * low:.1f}, {100 * high:.1f}]"
        shown.add_row(*head, "average", *average, f"{speed:.1f}" if speed else "–", style="bold")
    return shown


def comparison_table(results: dict[str, Any]) -> Table:
    """A row for every two runs: who is right where the other is not, and how sure the difference is."""
    shown = Table(
        title="Pairs of runs",
        caption="Over distinct (image, question) pairs. p: McNemar's exact test, Holm's correction over the table. The "
        "difference of accuracies has its 95 % interval, images resampled.",
        caption_justify="left",
        pad_edge=False,
    )
    for name in ("a", "b"):
        shown.add_column(name)
    for name in ("a − b, points", "only a right", "only b right", "p", "p (Holm)", "equal answers", "kappa"):
        shown.add_column(name, justify="right")
    for pair in results["comparisons"]:
        low, high = pair["interval"]
        shown.add_row(
            pair["a"],
            pair["b"],
            f"{100 * pair['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
            str(pair["a_only_correct"]),
            str(pair["b_only_correct"]),
            f"{pair['p']:.2g}",
            f"{pair['p_holm']:.2g}",
            f"{100 * pair['equal_answers']:.1f}",
            f"{pair['kappa']:.2f}",
        )
    return shown


def _percent(scores: dict[str, float]) -> list[str]:
    return [f"{100 * scores[name]:.1f}" for name in METRICS]
