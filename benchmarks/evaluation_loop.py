"""Questions a second of a POPE evaluation: the loop that users of transformers write, and ours, in one run.

    python benchmarks/evaluation_loop.py --output benchmarks/results/evaluation_loop-NAME.json

Both loops answer the same distinct questions with the same model, dtype, attention backend and batch size, and their
answers must be the same: otherwise the script fails. They take turns; numbers are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llava_sparse.benchmark.run import environment
from llava_sparse.evaluation import evaluate_pope, load_model, load_pope
from llava_sparse.evaluation.answer import MAX_NEW_TOKENS
from llava_sparse.evaluation.files import check_output, write_json
from llava_sparse.evaluation.plan import plan_runs

Answers = dict[tuple[str, str], str]


@torch.inference_mode()
def plain_loop(model: Any, processor: Any, rows: Sequence[dict[str, Any]], prompt: str, batch_size: int) -> Answers:
    """A batch of questions at a time, each with its picture, through the processor and `generate`."""
    answers: Answers = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        texts = [prompt.replace("{question}", row["question"]) for row in batch]
        images = [row["image"].convert("RGB") for row in batch]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
        inputs = inputs.to(model.device, model.dtype)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(batch, said, strict=True):
            answers[row["image_source"], row["question"]] = text.strip()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder; the reference model if left out")
    parser.add_argument("--methods", default="dense,visionzip,sparsevlm")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--limit", type=int, default=96, help="questions per split")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.output is not None:
        check_output(given.output)

    loaded = load_model(given.model, given.dtype)
    prompt = loaded.prompt(short_answer=True)
    questions = load_pope(limit=given.limit)
    first = {
        (r["image_source"], r["question"]): n for n, r in reversed(list(enumerate(questions.remove_columns("image"))))
    }
    names = [run.name for run in plan_runs(given.methods.split(","), [given.budget])]
    seconds: dict[str, dict[str, list[float]]] = {name: {"plain": [], "ours": []} for name in names}
    for number in range(given.rounds + 1):  # The first warms up.
        for name, run in zip(names, plan_runs(given.methods.split(","), [given.budget]), strict=True):
            model = loaded.with_run(run)
            start = time.perf_counter()
            # Pictures are decoded as they are needed, as in ours.
            answers: Answers = {}
            order = sorted(first.values())
            for begin in range(0, len(order), given.batch_size):
                rows = [questions[n] for n in order[begin : begin + given.batch_size]]
                answers |= plain_loop(model, loaded.processor, rows, prompt, given.batch_size)
            plain = time.perf_counter() - start
            results = evaluate_pope(
                loaded, methods=[given.methods.split(",")[names.index(name)]], budget=given.budget,
                batch_size=given.batch_size, limit=given.limit,
            )  # fmt: skip
            for answer in results["methods"][0]["answers"]:
                if answers[answer["image"], answer["question"]] != answer["answer"]:
                    raise SystemExit(f"{name}: the loops disagree about {answer['question']} of {answer['image']}.")
            if number:
                seconds[name]["plain"].append(plain)
                seconds[name]["ours"].append(results["timing"]["runs"][name]["seconds"])

    rates = {name: {k: len(first) / statistics.median(v) for k, v in loops.items()} for name, loops in seconds.items()}
    table = Table("run", "plain loop", "ours", "ours / plain", "ours / plain dense", title="Questions a second")
    for name, rate in rates.items():
        against = f"{rate['ours'] / rates[names[0]]['plain']:.1f}x"
        table.add_row(
            name, f"{rate['plain']:.1f}", f"{rate['ours']:.1f}", f"{rate['ours'] / rate['plain']:.1f}x", against
        )
    Console(width=120).print(table)
    print(f"{len(first)} distinct questions; both loops give the same answers.")
    if given.output is not None:
        settings = {name: str(value) for name, value in vars(given).items() if name != "output"}
        found = {"settings": settings, "environment": environment(loaded.model.device), "questions_per_second": rates}
        write_json({**found, "seconds": seconds}, given.output)


if __name__ == "__main__":
    main()
