"""Results of an evaluation, as they are written to a file and read from it, also from files of earlier versions."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch

import llava_sparse
from llava_sparse.modeling.pruning_settings import as_lists
from llava_sparse.preprocessing import recorded
from llava_sparse.reference import CHECKPOINT

from .files import Check, Count, Interval, Keys, Number, Rate, Record, Signed, Text, Tokens, read_as, read_json
from .model import LoadedModel, view_size
from .plan import UNPRUNED, Run
from .statistics import ROW, summarize
from .tasks import Task, get_task

FORMAT = "llava-sparse results 2"
KEYS = ("settings", "methods")  # Without them a file holds no results.
# Entries of configurations that are recorded elsewhere, or change no answer.
_NO_SETTINGS = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype")

Budget = Annotated[
    float | None,
    Check(
        "a whole number, a ratio or null",
        lambda x: x is None or type(x) is int or (type(x) is float and 0 < x <= 1),
    ),
]
# The metrics of a set of questions: rates, with their intervals.
Part = Annotated[dict[str, Any], Keys({"questions": Count, "intervals": dict[str, Interval], "*": Rate})]
Bootstrap = Annotated[dict[str, Any], Keys({"confidence": Rate, "resamples": Count, "images": Count})]
Scores = Annotated[
    dict[str, Any],
    Keys({"average": Part, "pooled": Part, "unique": Part, "splits": dict[str, Part], "bootstrap": Bootstrap}),
]
# Of one row; `score` where the model gave one.
Answer = Annotated[dict[str, Any], Keys({**dict.fromkeys((*ROW, "answer", "parsed"), Text), "score": Number})]


@dataclass(eq=False)
class Entry(Record):
    """A run.

    Attributes:
        name: `visionzip@64`; method, kind, budget, seed, layers, budgets, options: as they were in force.
        visual_tokens: behind the decoder's layers, in the mean over layers and questions; None if unknown.
        patches: of a picture; entering: visual tokens that enter the decoder; image_size: pixels of a side of the
            square that the model sees; None in old files.
        empty, cut: distinct answers without text, and that the limit of tokens cut; None in old files.
        scores: all of `statistics.summarize`; None in old files. splits, average: the bare numbers of these parts.
        answers: one for every row.
    """

    method: Text
    budget: Budget
    splits: dict[str, Part]
    average: Part
    answers: list[Answer]
    visual_tokens: Tokens = None
    name: Text = ""
    kind: Any = None
    seed: Any = None
    layers: Any = None
    budgets: Any = None
    options: Any = None
    patches: Annotated[int | None, Check("a whole number", lambda x: x is None or type(x) is int)] = None
    entering: Any = None
    image_size: Any = None
    empty: Any = None
    cut: Any = None
    scores: Scores = None  # type: ignore[assignment]

    @property
    def parts(self) -> Mapping[str, Any]:
        """Scores of each set; a file of an earlier version has those of the splits and their mean alone."""
        return self.scores or {"splits": self.splits, "average": self.average}


@dataclass(eq=False)
class Comparison(Record):
    """Two runs, as `statistics.compare` describes them."""

    a: Text
    b: Text
    pairs: Count
    a_only_correct: Count
    b_only_correct: Count
    p: Rate
    p_holm: Rate
    equal_answers: Rate
    difference: Signed
    average_difference: Signed
    kappa: Signed
    interval: Interval
    average_interval: Interval
    questions_needed: Any = None


@dataclass(eq=False)
class Questions(Record):
    """How many questions there are of each split, in all, and distinct ones; of how many images; what was skipped."""

    splits: dict[str, Count]
    scored: Count
    asked: Count
    images: Count
    skipped: list[Text] = None  # type: ignore[assignment]
    note: Text = ""


@dataclass(eq=False)
class Results(Record):
    """What an evaluation found; `timing`, of one call alone, has a file of its own."""

    settings: dict[str, Any]
    versions: dict[str, Any]
    questions: Questions
    methods: list[Entry]
    comparisons: list[Comparison] = field(default_factory=list)
    format: Text = "llava-sparse results 1"
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The task whose questions were asked."""
        return get_task(self.settings.get("task", "pope"))

    @property
    def written(self) -> dict[str, Any]:
        """What stands in the file."""
        return {name: value for name, value in self.items() if name != "timing"}


def read_results(path: str | Path) -> Results:
    """The results in a file that `llava-sparse pope --output` has written, also by an earlier version.

    Every run has a `name`, and all have the same rows in the same order.

    Raises:
        ValueError: for anything else, with the place and what is allowed there.
        OSError: if it is no regular file, or cannot be read.
    """
    found = read_json(path, "results of `llava-sparse pope`")
    if not isinstance(found, dict) or not set(KEYS) <= found.keys():
        raise ValueError(f"{path}: no results of `llava-sparse pope`: it has no {' and '.join(map(repr, KEYS))}.")
    try:
        results: Results = read_as(Results, found)
        for name in ("model", "dataset"):
            read_as(Text, results.settings.get(name), f"settings.{name}")
        for entry in results.methods:
            entry.name = entry.name or entry.method + ("" if entry.budget is None else f"@{entry.budget}")
        _check_runs(results.methods, results.task)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return results


def as_results(found: Mapping[str, Any]) -> Results:
    """Results that are, or were, an object of a file."""
    return found if isinstance(found, Results) else read_as(Results, found)


def _check_runs(entries: Sequence[Entry], task: Task) -> None:
    if not entries or not entries[0].answers:
        raise ValueError("methods: one run with one answer at least is needed.")
    label = Check(" or ".join(map(repr, task.labels)), lambda x: not task.labels or x in task.labels)
    rows: list[list[str]] | None = None
    for n, entry in enumerate(entries):
        for m, answer in enumerate(entry.answers):
            for name in (*ROW, "answer", "parsed"):
                if name not in answer:
                    raise ValueError(f"methods[{n}].answers[{m}] has no {name!r}.")
            for name in ("label", "parsed"):
                read_as(Annotated[str, label], answer[name], f"methods[{n}].answers[{m}].{name}")
        found = [[answer[key] for key in ROW] for answer in entry.answers]
        if found != (rows := rows or found):
            raise ValueError(f"methods[{n}].answers are not to the questions of methods[0].")
        scored = ["score" in answer for answer in entry.answers]
        if any(scored) != all(scored):
            raise ValueError(f"methods[{n}].answers: some have a score, some do not.")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError("methods: two runs have the same name.")


def results_files(paths: Sequence[str | Path]) -> list[Path]:
    """Results files, in the order given; of a folder all that are in it, by name.

    Raises:
        OSError: if there is no such file or folder.
        ValueError: for a folder without results, and for a file given twice.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder.")
        if path.is_dir():
            timings = {timing_path(file).name for file in path.glob("*.json")}
            found = sorted(file for file in path.glob("*.json") if file.name not in timings)
            if not found:
                raise ValueError(f"{path}: there are no results (*.json) in this folder.")
            files += found
        else:
            files.append(path)
    for file in files:
        if files.count(file) > 1:
            raise ValueError(f"{file}: given more than once; each results file is allowed once.")
    return files


def timing_path(output: str | Path) -> Path:
    """What a results file is accompanied by: `run.json`, `run.timing.json`."""
    path = Path(output)
    return path.with_name(path.name.removesuffix(".json") + ".timing.json")


def score(
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    scores: Sequence[float] | None = None,
    task: str | Task = "pope",
) -> dict[str, Any]:
    """Scores answers.

    Args:
        rows: questions with the columns of `load_pope` but the image.
        texts: one answer for every row; scores: their log-odds of yes, if there are any.
        task: whose rules count.

    Returns:
        `scores`, all of `statistics.summarize`; `splits` and `average`, the bare numbers of its parts of that name;
        `answers`, one entry for every row.
    """
    task = get_task(task)
    answers: list[dict[str, Any]] = [
        {
            "split": row["category"],
            "question_id": row["question_id"],
            "image": row["image_source"],
            "question": row["question"],
            "label": row["answer"],
            "answer": text,
            "parsed": task.parse(text, row["answer"]),
        }
        for row, text in zip(rows, texts, strict=True)
    ]
    if scores is not None:
        answers = [{**answer, "score": value} for answer, value in zip(answers, scores, strict=True)]
    found = summarize(answers, task.measure)
    metrics = task.measure.metrics
    return {
        "scores": found,
        "splits": {
            split: {name: part[name] for name in ("questions", *metrics)} for split, part in found["splits"].items()
        },
        "average": {name: found["average"][name] for name in metrics},
        "answers": answers,
    }


def count_questions(rows: Sequence[Mapping[str, Any]], skipped: list[str]) -> Questions:
    """Questions of each split, all of which are scored, and the distinct (image, question) pairs that are asked."""
    pairs = {(row["image_source"], row["question"]) for row in rows}
    return Questions(
        splits=dict(Counter(row["category"] for row in rows)),
        scored=len(rows),
        asked=len(pairs),
        images=len({image for image, _ in pairs}),
        skipped=skipped,
        note="Each distinct (image, question) pair is asked once; its answer is scored in every split that has it.",
    )


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """Name and settings of a model."""
    return {
        "model": "reference" if loaded.name == str(CHECKPOINT) else loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        **({"quantization": loaded.quantization} if loaded.quantization else {}),
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
    method = None if run.method in UNPRUNED else model.model.sparsifier
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    encoder, grid = getattr(method, "encoder", None), run.grid(patches)
    return {
        "name": run.name,
        "method": run.method,
        "kind": None if method is None else method.kind,
        "budget": run.budget,
        "seed": run.seed,
        "layers": None if method is None else as_lists(method.layers),
        "budgets": None if method is None else as_lists(method.budgets or ()),
        "options": getattr(model.config, "sparse_options", None),
        "patches": patches,
        "entering": (patches if grid is None else grid**2) if encoder is None else encoder.tokens,
        "image_size": view_size(model),
    }


def repeat_line(settings: Mapping[str, Any]) -> str:
    """The command that asks the same questions again, of settings in a results file; no word of the reference model."""
    flags = {
        "model": None if settings["model"] == "reference" else settings["model"],
        "dataset": None if settings["dataset"] == "reference" or "annotations" in settings else settings["dataset"],
        **{name: settings.get(name) for name in ("config", "annotations", "images", "split", "ids", "variant")},
        **{name: settings.get(name) for name in ("limit", "streaming", "skip_bad", "methods", "budgets", "seeds")},
        **{name: settings.get(name) for name in ("controls", "answer_mode", "max_new_tokens", "batch_size")},
        "no_grouping": not settings.get("grouped", True),
        "prompt": str(settings.get("prompt", "")).replace("\n", r"\n"),
        "dtype": settings.get("dtype"),
        f"load_in_{settings.get('quantization')}": "quantization" in settings,
    }
    words = ["llava-sparse", "pope"]
    for name, value in flags.items():
        if value is not None and value is not False and value != "":
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [shlex.quote(text)])]
    return " ".join(words)


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
