"""Asking a model a task's questions with many methods and budgets, and scoring what it says."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from llava_sparse.plugins import plugin_files

from .answer import ANSWER_MODES, Answer, Asker
from .answer_log import AnswerLog, Line, key_of, log_path
from .files import check_output, write_json
from .model import LoadedModel, Memory, check_prompt, load_model
from .plan import Run, plan_runs, with_controls
from .processes import Processes, join_processes
from .results import (
    FORMAT,
    KEYS,
    Comparison,
    Entry,
    Results,
    count_questions,
    describe_model,
    describe_run,
    score,
    timing_path,
    versions,
)
from .statistics import compare, pack_kept
from .tasks import Task, get_task
from .units import Pictures, Unit, pictures_digest, plan_units, read_rows

LOADING = {"dtype", "device", "attn_implementation", *(f.name for f in fields(Memory))}


def _ignore(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Attributes:
        model: a loaded model, or the name that `load_model` takes; None for the embedded reference model.
        dataset, limit: as for the task's `load`; `subset` holds its other arguments.
        methods, budget, seeds: as for `plan_runs`; `"dense"` is a method too.
        batch_size: questions answered at a time; halved where memory does not suffice.
        answer_mode: `"text"` parses what the model says by the task's rule; `"logits"` compares Yes with No at the
            first token of the answer, `"likelihood"` by all their tokens, which also gives a score for each answer.
        prompt: with `<image>` and `{question}`; None for the model's chat template, or LLaVA-1.5's.
        grouped: whether a picture is encoded once for all its questions; without, `generate` is called as by anyone.
        skip_bad: whether rows that cannot be used are left out, and listed in the results, instead of refused.
        output: a JSON file, written after every run. Answers go to `*.answers.jsonl` beside it as they come; the same
            call goes on from them. `*.timing.json` says how long it took.
        max_new_tokens: of an answer; None for the task's.
        controls: whether `plan.CONTROLS` run too, those that draw with five seeds at least.
        task: a name, or a task.
        loading: dtype, device, attn_implementation and the fields of `Memory`, for `load_model`.
    """

    model: str | Path | LoadedModel | None = None
    dataset: str | Path = "reference"
    methods: Sequence[str] = ("dense", "visionzip", "sparsevlm")
    budget: float | Sequence[float] = 64
    seeds: Sequence[int] = (0,)
    batch_size: int = 16
    limit: int | None = None
    answer_mode: str = "text"
    prompt: str | None = None
    grouped: bool = True
    skip_bad: bool = False
    output: str | Path | None = None
    subset: dict[str, Any] | None = None
    max_new_tokens: int | None = None
    controls: bool = False
    task: str | Task = "pope"
    loading: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.answer_mode not in ANSWER_MODES:
            raise ValueError(f"answer_mode {self.answer_mode!r} is unknown; allowed: {', '.join(ANSWER_MODES)}.")
        for name in ("batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: a positive number is allowed.")
        if self.prompt is not None:
            check_prompt(self.prompt)
        if self.answer_mode != "text" and get_task(self.task).choices is None:
            raise ValueError(f"answer_mode {self.answer_mode!r}: the task {self.task} has no choices; text is allowed.")
        if self.output is not None:
            check_output(self.output, KEYS)

    @property
    def budgets(self) -> list[float]:
        """All budgets."""
        return [self.budget] if isinstance(self.budget, int | float) else list(self.budget)

    @property
    def runs(self) -> list[Run]:
        """Every method with every budget."""
        methods, seeds = with_controls(self.methods, self.seeds) if self.controls else (self.methods, self.seeds)
        return plan_runs(methods, self.budgets, seeds)

    @property
    def questions(self) -> dict[str, Any]:
        """How the questions were chosen; own files are named, whatever `dataset` says."""
        subset = self.subset or {}
        chosen = {"dataset": subset.get("annotations") or self.dataset, **subset, "skip_bad": self.skip_bad}
        return {
            **{n: value if isinstance(value, (int, list)) else str(value) for n, value in chosen.items() if value},
            "limit": self.limit,
        }


@dataclass
class Evaluation:
    """What the runs of one evaluation share.

    Attributes:
        dataset: the questions with their pictures; rows: all of them without; units: what is answered together.
        ask: makes an `Asker` of a model.
        batch_size: questions at a time; halved where memory does not suffice.
        timing: by the names of runs, what `timing_path` is to hold.
    """

    loaded: LoadedModel
    dataset: Any
    rows: list[dict[str, Any]]
    units: list[Unit]
    ask: Callable[..., Asker]
    task: Task
    batch_size: int
    log: AnswerLog
    processes: Processes
    on_progress: Callable[[str, int, int], None]
    on_notice: Callable[[str], None]
    timing: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, run: Run, model: Any, described: dict[str, Any]) -> None:
        """Answers what the log lacks of a run: one unit a process, then the next ones."""
        left = [unit for unit in self.units if any(key_of(run.name, pair) not in self.log.lines for pair in unit)]
        total = sum(map(len, self.units))
        done = total - sum(map(len, left))
        self.on_progress(run.name, done, total)
        asker, pictures = self.ask(model, grid=run.grid(described["patches"])), Pictures(self.dataset, self.rows)
        start, fresh, each = time.perf_counter(), 0, list[float]()
        for begin in range(0, len(left), self.processes.count):
            own, begun = begin + self.processes.rank, time.perf_counter()
            lines = self._answer(asker, run, left[own], pictures) if own < len(left) else []
            each += [(time.perf_counter() - begun) / max(1, len(lines))] * len(lines)
            for part in self.processes.gather(lines):
                self.log.add(part)
                fresh += len(part)
            self.on_progress(run.name, done + fresh, total)
        seconds = time.perf_counter() - start
        self.timing[run.name] = {
            "questions": fresh,
            "seconds": seconds,
            "questions_per_second": fresh / seconds if fresh else None,
            # Of this process, a question's share of the time of those that were answered with it.
            "percentiles": np.percentile(each, [50, 99]).tolist() if each else None,
        }

    def _answer(self, asker: Asker, run: Run, unit: Unit, pictures: Pictures) -> list[Line]:
        """The log's lines for a unit, in smaller batches where memory does not suffice."""
        found = pictures.of(unit)
        while True:
            try:
                pixels = asker.pixels(list(found.values()))
                owners = [list(found).index(source) for source, _ in unit]
                answers = asker.answer(pixels, owners, [question for _, question in unit], self.batch_size)
                break
            except Exception as error:
                if not should_reduce_batch_size(error) or self.batch_size == 1:
                    raise
            self.batch_size //= 2
            clear_device_cache()
            self.on_notice(f"out of memory: going on with {self.batch_size} questions at a time")
        return [_line(run, pair, answer) for pair, answer in zip(unit, answers, strict=True)]

    def entry(self, run: Run, described: dict[str, Any]) -> Entry:
        """A run's part of the results."""
        lines = {pair: self.log.lines[key_of(run.name, pair)] for unit in self.units for pair in unit}
        of_row = [lines[row["image_source"], row["question"]] for row in self.rows]
        scores: list[Any] | None = [line.get("score") for line in of_row] if "score" in of_row[0] else None
        tokens: list[Any] = [line.get("visual_tokens") for line in lines.values()]
        return Entry(
            **described,
            visual_tokens=None if None in tokens else sum(tokens) / len(tokens),
            empty=sum(not line["answer"] for line in lines.values()),
            cut=sum(line.get("cut", False) for line in lines.values()),
            **score(self.rows, [line["answer"] for line in of_row], scores, self.task),
        )

    @property
    def timed(self) -> dict[str, Any]:
        """Of this call alone: questions that an earlier one answered take no time."""
        return {
            "processes": self.processes.count,
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "runs": self.timing,
        }


def _line(run: Run, pair: tuple[str, str], answer: Answer) -> Line:
    line: Line = {"run": run.name, "image": pair[0], "question": pair[1], "answer": answer.text}
    if answer.score is not None:
        line["score"] = answer.score
    kept = [pack_kept(mask) for mask in answer.kept]
    return {**line, "cut": answer.cut, "visual_tokens": answer.visual_tokens, "kept": kept}


def evaluate_pope(
    model: str | Path | LoadedModel | None = None,
    dataset: str | Path = "reference",
    methods: Sequence[str] = Settings.methods,
    budget: float | Sequence[float] = Settings.budget,
    **settings: Any,
) -> Results:
    """Evaluates methods on POPE, one after the other on the same weights.

    Args:
        model, dataset, methods, budget: as of `Settings`.
        settings: its other fields; the arguments of `load_model` behind the name, as keywords of their own; and
            `on_progress` and `on_notice`, as of `evaluate`.

    Returns and raises what `evaluate` does.
    """
    told = {name: settings.pop(name) for name in ("on_progress", "on_notice") if name in settings}
    loading = {name: settings.pop(name) for name in LOADING & settings.keys()}
    unknown = settings.keys() - {f.name for f in fields(Settings)}
    if unknown:
        raise TypeError(f"evaluate_pope has no argument {sorted(unknown)[0]!r}.")
    return evaluate(Settings(model, dataset, methods, budget, loading=loading, **settings), **told)


def evaluate(
    settings: Settings,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> Results:
    """Evaluates methods on a task, one after the other on the same weights.

    Args:
        settings: what is evaluated.
        on_progress: called with the run, the distinct questions answered and those in all.
        on_notice: called with what a user should know.

    Returns:
        what `settings.output` holds: settings, versions, questions, for every run its scores (from 0 to 1) with
        intervals and every answer, and comparisons of the runs; and `timing`, which is in a file of its own because it
        differs from one call to the next. Attributes are items too: `results["methods"][0]["average"]["accuracy"]`.

    Raises:
        ValueError: for invalid settings or data, before the first question is asked; for an `output` that was begun
            with other settings.
        OSError: for files that cannot be read or written.
        RuntimeError: if another process of a data-parallel evaluation stops.
    """
    runs, task = settings.runs, get_task(settings.task)
    processes = join_processes(str(settings.loading.get("device", "auto")))
    loading = settings.loading if processes.device is None else {**settings.loading, "device": str(processes.device)}
    skipped: list[str] = []
    on_bad = skipped.append if settings.skip_bad else None
    questions = task.load(settings.dataset, settings.limit, on_bad=on_bad, **(settings.subset or {}))
    rows = read_rows(questions)
    loaded = settings.model if isinstance(settings.model, LoadedModel) else load_model(settings.model, **loading)
    built = [loaded.with_run(run) for run in runs]
    prompt = settings.prompt or loaded.prompt(task.short_answer)
    limit = settings.max_new_tokens or task.max_new_tokens
    found = Results(
        _describe(settings, loaded, questions, rows, prompt, limit), versions(), count_questions(rows, skipped), [],
        format=FORMAT,
    )  # fmt: skip
    # One process writes; the others keep in memory what they are told.
    path = Path(settings.output) if settings.output is not None and processes.rank == 0 else None
    evaluation = Evaluation(
        loaded, questions, rows,
        plan_units(rows, settings.batch_size, streamed=bool(found.settings.get("streaming"))),
        partial(
            Asker, processor=loaded.processor, prompt=prompt, mode=settings.answer_mode, grouped=settings.grouped,
            max_new_tokens=limit, choices=task.choices or Asker.choices,
        ),
        task, settings.batch_size, AnswerLog(path and log_path(path), found.settings, found.versions), processes,
        on_progress or _ignore, on_notice or _ignore,
    )  # fmt: skip
    try:
        _run_all(evaluation, runs, built, found, path)
    finally:
        evaluation.log.close()
    return found


def _run_all(evaluation: Evaluation, runs: Sequence[Run], built: list[Any], found: Results, path: Path | None) -> None:
    """Asks, scores and writes one run after the other."""
    evaluation.log.lines = evaluation.processes.gather(evaluation.log.lines)[0]
    for number, run in enumerate(runs):
        # A model that is sparse itself has one method at a time, others are built already.
        switched = built[number] is evaluation.loaded.model
        model = evaluation.loaded.with_run(run) if switched else built[number]
        described = describe_run(run, model)
        evaluation.run(run, model, described)
        found.methods.append(evaluation.entry(run, described))
        if number + 1 == len(runs) and len(runs) > 1:
            found.comparisons = [Comparison(**pair) for pair in compare(found.methods)]
        if path is not None:
            write_json(found.written, path)
            if evaluation.timing[run.name]["questions"] or not timing_path(path).exists():
                write_json(evaluation.timed, timing_path(path))
    found.timing = evaluation.timed


def _describe(
    settings: Settings, loaded: LoadedModel, questions: Any, rows: list[dict[str, Any]], prompt: str, limit: int
) -> dict[str, Any]:
    """All that decides about answers: of the model, the questions and their pictures, and how they are asked."""
    return {
        **describe_model(loaded),
        "task": get_task(settings.task).name,
        **settings.questions,
        "pictures_sha256": pictures_digest(questions, rows),
        "questions_sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
        "methods": list(settings.methods),
        **plugin_files(run.method for run in settings.runs),
        "budgets": settings.budgets,
        "seeds": list(settings.seeds),
        **({"controls": True} if settings.controls else {}),
        "batch_size": settings.batch_size,
        "prompt": prompt,
        "answer_mode": settings.answer_mode,
        "grouped": settings.grouped,
        "max_new_tokens": limit,
    }
