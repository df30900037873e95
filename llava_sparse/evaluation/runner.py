"""Asking a model POPE's questions with many methods and budgets, and scoring what it says."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from llava_sparse.plugins import plugin_files

from .answer_log import AnswerLog, Key, log_path
from .answering import ANSWER_MODES, MAX_NEW_TOKENS, Answer, Asker
from .data import load_pope
from .models import LoadedModel, check_prompt, load_model
from .processes import Processes, join_processes
from .report import (
    check_output,
    count_questions,
    describe_model,
    describe_run,
    score,
    timing_path,
    versions,
    write_json,
)
from .runs import Run, plan_runs
from .statistics import compare, pack_kept
from .units import Pictures, Unit, pictures_digest, plan_units, read_rows

# Called with the run's name, the distinct questions answered and those there are.
Progress = Callable[[str, int, int], None]
Notice = Callable[[str], None]


@dataclass
class Evaluation:
    """What the runs of one evaluation share.

    Attributes:
        dataset: the questions with their pictures; rows: all of them without; units: what is answered together, in
            order.
        batch_size: questions at a time; halved where memory does not suffice.
        resumed: units, over all runs, that the log has already.
        timing: by the names of runs, what `timing_path` is to hold.
    """

    loaded: LoadedModel
    dataset: Any
    rows: list[dict[str, Any]]
    units: list[Unit]
    prompt: str
    answer_mode: str
    grouped: bool
    batch_size: int
    log: AnswerLog
    processes: Processes
    on_progress: Progress
    on_notice: Notice
    resumed: int = 0
    timing: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, run: Run, number: int) -> None:
        """Answers what the log lacks of a run, the `number`-th: one unit a process, then the next ones."""
        total = sum(map(len, self.units))
        first = min(max(self.resumed - number * len(self.units), 0), len(self.units))
        done = sum(map(len, self.units[:first]))
        self.on_progress(run.name, done, total)
        asker = Asker(self.loaded.with_run(run), self.loaded.processor, self.prompt, self.answer_mode, self.grouped)
        pictures = Pictures(self.dataset, self.rows)
        start, fresh = time.perf_counter(), 0
        for begin in range(first, len(self.units), self.processes.count):
            own = begin + self.processes.rank
            lines = self._answer(asker, run, self.units[own], pictures) if own < len(self.units) else []
            for part in self.processes.gather(lines):
                self.log.add(part)
                fresh += len(part)
            self.on_progress(run.name, done + fresh, total)
        seconds = time.perf_counter() - start
        self.timing[run.name] = {
            "questions": fresh,
            "seconds": seconds,
            "questions_per_second": fresh / seconds if fresh else None,
        }

    def _answer(self, asker: Asker, run: Run, unit: Unit, pictures: Pictures) -> list[dict[str, Any]]:
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


def _line(run: Run, pair: tuple[str, str], answer: Answer) -> dict[str, Any]:
    line: dict[str, Any] = {"run": run.name, "image": pair[0], "question": pair[1], "answer": answer.text}
    if answer.score is not None:
        line["score"] = answer.score
    return {**line, "visual_tokens": answer.visual_tokens, "kept": [pack_kept(mask) for mask in answer.kept]}


def evaluate_pope(
    model: str | Path | LoadedModel | None = None,
    dataset: str | Path = "reference",
    methods: Sequence[str] = ("dense", "visionzip", "sparsevlm"),
    budget: float | Sequence[float] = 64,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
    limit: int | None = None,
    answer_mode: str = "text",
    prompt: str | None = None,
    grouped: bool = True,
    skip_bad: bool = False,
    output: str | Path | None = None,
    on_progress: Progress | None = None,
    on_notice: Notice | None = None,
    subset: dict[str, Any] | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Evaluates methods on POPE, one after the other on the same weights.

    Args:
        model: a loaded model, or the name that `load_model` takes; None for the embedded reference model.
        dataset, limit: as for `load_pope`; `subset` holds its other arguments.
        methods, budget, seeds: as for `plan_runs`; `"dense"` is a method too.
        batch_size: questions answered at a time; halved where memory does not suffice.
        answer_mode: `"text"` parses what the model says by the official rule; `"logits"` compares Yes with No at the
            first token of the answer, `"likelihood"` by all their tokens, which also gives a score for each answer.
        prompt: with `<image>` and `{question}`; None for LLaVA-1.5's.
        grouped: whether a picture is encoded once for all its questions; without, `generate` is called as by anyone.
        skip_bad: whether rows that cannot be used are left out, and listed in the results, instead of refused.
        output: a JSON file, written after every run. Answers go to `*.answers.jsonl` beside it as they come; the same
            call goes on from them. `*.timing.json` says how long it took.
        on_progress: called with the run, the questions answered and the questions in all.
        on_notice: called with what a user should know.
        loading: dtype, device and attn_implementation for `load_model`.

    Returns:
        what `output` holds: settings, versions, questions, for every run its scores (from 0 to 1) with intervals and
        every answer, and comparisons of the runs; and `timing`, which is in a file of its own because it differs from
        one call to the next.

    Raises:
        ValueError: for invalid settings or data, before the first question is asked; for an `output` that was begun
            with other settings.
        OSError: for files that cannot be read or written.
        RuntimeError: if another process of a data-parallel evaluation stops.
    """
    budgets = [budget] if isinstance(budget, int | float) else list(budget)
    runs = plan_runs(methods, budgets, seeds)
    if answer_mode not in ANSWER_MODES:
        raise ValueError(f"answer_mode {answer_mode!r} is unknown; allowed: {', '.join(ANSWER_MODES)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: a positive number is allowed.")
    if prompt is not None:
        check_prompt(prompt)
    if output is not None:
        check_output(output)
    processes = join_processes(str(loading.get("device", "auto")))
    if processes.device is not None:
        loading = {**loading, "device": str(processes.device)}
    skipped: list[str] = []
    questions = load_pope(dataset, limit, **(subset or {}), on_bad=skipped.append if skip_bad else None)
    rows = read_rows(questions)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, **loading)
    for run in runs:
        loaded.with_run(run)

    prompt = loaded.prompt(short_answer=True) if prompt is None else prompt
    settings = {
        **describe_model(loaded),
        **_describe_questions(questions, rows, dataset, limit, skip_bad, subset or {}),
        "methods": list(methods),
        **plugin_files(run.method for run in runs),
        "budgets": budgets,
        "seeds": list(seeds),
        "batch_size": batch_size,
        "prompt": prompt,
        "answer_mode": answer_mode,
        "grouped": grouped,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    units = plan_units(rows, batch_size, streamed=bool(settings.get("streaming")))
    # One process writes; the others keep in memory what they are told.
    path = Path(output) if output is not None and processes.rank == 0 else None
    log = AnswerLog(None if path is None else log_path(path), settings, versions())
    evaluation = Evaluation(
        loaded, questions, rows, units, prompt, answer_mode, grouped, batch_size, log, processes,
        on_progress or _ignore, on_notice or _ignore,
    )  # fmt: skip
    results: dict[str, Any] = {
        "settings": settings,
        "versions": versions(),
        "questions": {**count_questions(rows), "skipped": skipped},
        "methods": [],
        "comparisons": [],
    }
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(processes.gather(_threads(output))[0])
        if path is not None and not timing_path(path).exists():
            write_json(_timing(evaluation), timing_path(path))
        evaluation.resumed = processes.gather(log.resume(_keys(runs, units)))[0]
        evaluation.log.lines = processes.gather(log.lines)[0]
        for number, run in enumerate(runs):
            evaluation.run(run, number)
            results["methods"].append(_entry(evaluation, run))
            if number + 1 == len(runs) and len(runs) > 1:
                results["comparisons"] = compare(results["methods"])
            if path is not None:
                write_json(results, path)
                if evaluation.timing[run.name]["questions"]:
                    write_json(_timing(evaluation), timing_path(path))
        return {**results, "timing": _timing(evaluation)}
    finally:
        torch.set_num_threads(threads)
        log.close()


def _describe_questions(
    questions: Any, rows: list[dict[str, Any]], dataset: Any, limit: int | None, skip_bad: bool, subset: dict[str, Any]
) -> dict[str, Any]:
    """Which questions are asked: how they were chosen, and digests of them and of their pictures."""
    chosen = {"dataset": dataset, **subset, "skip_bad": skip_bad}
    return {
        **{name: value if isinstance(value, (int, list)) else str(value) for name, value in chosen.items() if value},
        "limit": limit,
        "pictures_sha256": pictures_digest(questions, rows),
        "questions_sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
    }


def _threads(output: str | Path | None) -> int:
    """Threads with which an evaluation was begun, else torch's: sums of other numbers differ in the last bits."""
    if output is None:
        return torch.get_num_threads()
    try:
        return int(json.loads(timing_path(output).read_text(encoding="utf-8"))["threads"])
    except (OSError, ValueError, KeyError, TypeError):
        return torch.get_num_threads()


def _timing(evaluation: Evaluation) -> dict[str, Any]:
    """Of this call alone: questions that an earlier one answered take no time."""
    return {
        "processes": evaluation.processes.count,
        "threads": torch.get_num_threads(),
        "batch_size": evaluation.batch_size,
        "runs": evaluation.timing,
    }


def _ignore(*_: Any) -> None:
    pass


def _keys(runs: Sequence[Run], units: Sequence[Unit]) -> Iterator[list[Key]]:
    """Keys of the log's lines, unit by unit in the order in which they are written."""
    for run in runs:
        for unit in units:
            yield [(run.name, *pair) for pair in unit]


def _entry(evaluation: Evaluation, run: Run) -> dict[str, Any]:
    """A run's part of the results."""
    pairs = [pair for unit in evaluation.units for pair in unit]
    lines = {(image, asked): evaluation.log.lines[run.name, image, asked] for image, asked in pairs}
    of_row = [lines[row["image_source"], row["question"]] for row in evaluation.rows]
    scores = [line["score"] for line in of_row] if evaluation.answer_mode != "text" else None
    tokens = [line["visual_tokens"] for line in lines.values()]
    return {
        **describe_run(run, evaluation.loaded.with_run(run)),
        "visual_tokens": None if None in tokens else sum(tokens) / len(tokens),
        **score(evaluation.rows, [line["answer"] for line in of_row], scores),
    }
