"""What a trained checkpoint can do on scenes that it has never seen, and what pruning costs it."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from llava_sparse.evaluation import Asker, LoadedModel, evaluate_pope, load_model, load_pope
from llava_sparse.evaluation.tasks.build import write_pope
from llava_sparse.evaluation.units import Pictures, read_rows

from .scenes import CATEGORIES, Assets, write_question_folder

TEST_SEED = 1_000_000  # of the test scenes, far from any that trains
SEEDS = (0, 1, 2)
LAYERS = (1, 3, 5)
DEPTHS = [f"random_decoder:layers=[{n}]:budgets=[64]" for n in LAYERS]
METHODS = ["dense", "visionzip", "sparsevlm", "random", *DEPTHS]
CAPTIONED = 300


def evaluate(checkpoint: Path, folder: Path, count: int, assets: Assets, rank: int = 0, world: int = 1) -> None:
    """Prints POPE's accuracy, dense and pruned to 64 tokens, and how good captions are.

    Args:
        folder: for `count` test scenes, their questions and the answers; what is there is taken over.
        rank, world: of the processes that torchrun started, which share the questions.

    Questions are drawn, and tokens dropped at random, with each of `SEEDS`.
    """
    if rank == 0:
        write_questions(folder, count, assets)
    if world > 1:
        dist.barrier()
    loaded = load_model(checkpoint)
    table = Table("run", *(f"seed {seed}" for seed in SEEDS), "mean", title=f"Accuracy over {count} test scenes")
    accuracy: dict[str, list[float]] = {}
    for seed in SEEDS:
        results = evaluate_pope(
            loaded, methods=METHODS, budget=64, seeds=[seed], batch_size=24, output=folder / f"answers_{seed}.json",
            subset={"annotations": folder / f"questions_{seed}", "images": folder / "images"},
            on_progress=lambda name, done, total: (
                print(f"{name}: {done}/{total}", flush=True) if done == total and rank == 0 else None
            ),
        )  # fmt: skip
        for entry in results["methods"]:
            name = entry["name"].partition("@")[0].partition("#")[0]
            accuracy.setdefault(name, []).append(100 * entry["average"]["accuracy"])
    if rank:
        return
    for name, values in accuracy.items():
        table.add_row(name, *(f"{value:.1f}" for value in values), f"{statistics.mean(values):.1f}")
    Console(width=120).print(table)
    caption = captions(loaded, folder / f"questions_{SEEDS[0]}", folder / "images")
    print(", ".join(f"{name} {value:.3f}" for name, value in caption.items()))


def write_questions(folder: Path, count: int, assets: Assets) -> None:
    if not (folder / "objects.jsonl").is_file():
        write_question_folder(folder, TEST_SEED, count, assets, os.cpu_count() or 1)
    for seed in SEEDS:
        if not (folder / f"questions_{seed}").is_dir():
            write_pope(folder / "objects.jsonl", folder / f"questions_{seed}", seed=seed)


def captions(loaded: LoadedModel, questions: Path, images: Path) -> dict[str, float]:
    """Of dense captions: how many repeat a word, and how well they name what is there."""
    dataset = load_pope(annotations=questions, images=images, split="random")
    rows: list[dict[str, Any]] = read_rows(dataset)
    names = sorted({row["image_source"] for row in rows})[:CAPTIONED]
    pictures = Pictures(dataset, rows)
    asker = Asker(loaded.with_method("dense"), loaded.processor, loaded.prompt(short_answer=False))
    present: dict[str, set[str]] = {name: set() for name in names}
    for row in rows:
        if row["answer"] == "yes" and row["image_source"] in present:
            present[row["image_source"]].add(row["question"].split()[3])
    repeated = named = found = asked = empty = 0
    for name in names:
        (picture,) = pictures.of([(name, "")]).values()
        (answer,) = asker.answer(asker.pixels([picture]), [0], ["What is in the image?"], 1)
        said = [word for word in answer.text.replace(",", " ").split() if word in CATEGORIES]
        repeated += len(set(said)) < len(said)
        named += len(said)
        found += len(present[name] & set(said))
        asked += len(present[name])
        empty += not said
    return {
        "captions that repeat a word": repeated / len(names),
        "objects asked about that captions name": found / asked,
        "words a caption": named / len(names),
        "empty captions": empty / len(names),
    }
