"""SparseVLM's tables 1 and 2 and VisionZip's, run again with lmms-eval and set beside the published numbers.

    pip install 'llava-sparse[lmms]'
    python examples/paper_tables.py --tables 1                        # LLaVA-1.5-7B on pictures; resumes
    python examples/paper_tables.py --tables 2 --videos GPT_Zero_Shot_QA    # Video-LLaVA-7B on videos
    python examples/paper_tables.py --tables scenes --model reference # what needs no download

Each cell is one run of lmms-eval in a process, whose results stay in --results: what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_sparse.integrations import TASKS, paired, video_qa
from llava_sparse.reference import CHECKPOINT, SCENES

DENSE = "dense"
SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Benchmark:
    """A column: its name in the papers, lmms-eval's task, the metrics that are summed, and the scale of the papers."""

    title: str
    task: str
    metrics: tuple[str, ...]
    scale: float = 100.0


PICTURES = (
    Benchmark("GQA", "gqa", ("exact_match",)),
    Benchmark("MMB", "mmbench_en_dev_static", ("gpt_eval_score",), 1.0),
    Benchmark("MME", "mme", ("mme_perception_score", "mme_cognition_score"), 1.0),
    Benchmark("POPE", "pope", ("pope_f1_score",)),
    Benchmark("SQA", "scienceqa_img", ("exact_match",)),
    Benchmark("VQAv2", "vqav2_val", ("exact_match",)),
    Benchmark("VQAText", "textvqa_val", ("exact_match",)),
    Benchmark("ConB", "ConBench", ("ConScore_D",), 1.0),
)
VIDEOS = (
    Benchmark("TGIF", "tgif_qa", ("accuracy",)),
    Benchmark("MSVD", "msvd_qa", ("accuracy",)),
    Benchmark("MSRVTT", "msrvtt_qa", ("accuracy",)),
    Benchmark("ActivityNet", "activitynetqa", ("gpt_eval_accuracy",), 1.0),
)
OF_SCENES = tuple(
    Benchmark(f"{split} {name}", f"scenes_pope_{split}", (name,)) for split in SPLITS for name in ("accuracy", "f1")
)
# Model, columns, and rows: method and visual tokens, with what the papers print, None where they print nothing.
# SparseVLM, arXiv 2410.04417v1, tables 1 and 2; VisionZip, arXiv 2412.04467, tables 1 and 3.
Row = tuple[float | None, ...]
TABLES: dict[str, tuple[str, tuple[Benchmark, ...], dict[tuple[str, int | None], Row]]] = {
    "1": (
        "llava-hf/llava-1.5-7b-hf",
        PICTURES,
        {
            (DENSE, None): (61.9, 64.7, 1862, 85.9, 69.5, 78.5, 58.2, 19.8),
            ("tome", 192): (54.3, 60.5, 1563, 72.4, 65.2, 68.0, 52.1, 17.4),
            ("fastv", 192): (52.7, 61.2, 1612, 64.8, 67.3, 67.1, 52.5, 18.0),
            ("sparsevlm", 192): (57.6, 62.5, 1721, 83.6, 69.1, 75.6, 56.1, 18.8),
            ("visionzip", 192): (59.3, 63.0, 1783, 85.3, 68.9, 76.8, 57.3, None),
            ("tome", 128): (52.4, 53.3, 1343, 62.8, 59.6, 63.0, 49.1, 16.0),
            ("fastv", 128): (49.6, 56.1, 1490, 59.6, 60.2, 61.8, 50.6, 17.1),
            ("sparsevlm", 128): (56.0, 60.0, 1696, 80.5, 67.1, 73.8, 54.9, 18.5),
            ("visionzip", 128): (57.6, 62.0, 1762, 83.2, 68.9, 75.6, 56.8, None),
            ("tome", 64): (48.6, 43.7, 1138, 52.5, 50.0, 57.1, 45.3, 14.0),
            ("fastv", 64): (46.1, 48.0, 1256, 48.0, 51.1, 55.0, 47.8, 15.6),
            ("sparsevlm", 64): (52.7, 56.2, 1505, 75.1, 62.2, 68.2, 51.8, 17.7),
            ("visionzip", 64): (55.1, 60.1, 1690, 77.0, 69.0, 72.4, 55.5, None),
        },
    ),
    "2": (
        "LanguageBind/Video-LLaVA-7B-hf",
        VIDEOS,
        {
            (DENSE, None): (47.1, 69.8, 56.7, 43.1),
            ("fastv", 194): (23.1, 38.0, 19.3, 30.6),
            ("sparsevlm", 194): (44.7, 68.2, 31.0, 42.6),
            ("visionzip", 136): (42.4, 63.5, 52.1, 43.0),
        },
    ),
    # Published nowhere: a check that all runs.
    "scenes": (str(CHECKPOINT), OF_SCENES, {(DENSE, None): (), ("visionzip", 64): (), ("sparsevlm", 64): ()}),
}


def run(model: str, task: str, method: str, budget: int | None, arguments: argparse.Namespace) -> Path:
    """The folder of one run, which is made unless its results are there.

    Raises:
        SystemExit: if lmms-eval fails; what it says is on the screen.
    """
    folder = arguments.results / f"{method}-{budget}-{task}"
    if not list(folder.rglob("*_results.json")):
        settings = "" if method == DENSE else f",sparse_method={method},sparse_budget={budget}"
        seen = folder / paired.PICTURES
        command = [
            sys.executable, "-m", "lmms_eval", "--model", "llava_sparse",
            "--model_args", f"pretrained={model},dtype={arguments.dtype},pictures={seen}{settings}",
            "--include_path", str(TASKS),
            "--tasks", task, "--batch_size", str(arguments.batch_size), "--output_path", str(folder), "--log_samples",
            *(["--limit", str(arguments.limit)] if arguments.limit else []),
        ]  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        seen.unlink(missing_ok=True)  # Of a run that was cut short.
        print(" ".join(command), flush=True)
        done = subprocess.run(command, cwd=arguments.results, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        if done.returncode or not list(folder.rglob("*_results.json")):
            sys.exit(f"{task} with {method}: lmms-eval failed; the same command goes on from here.")
    return folder


def value(folder: Path, benchmark: Benchmark) -> float:
    """A benchmark's number in the scale of the papers, of a run's results."""
    found = json.loads(max(folder.rglob("*_results.json")).read_text())["results"][benchmark.task]
    by_name = {name.split(",")[0]: number for name, number in found.items()}
    missing = [name for name in benchmark.metrics if not isinstance(by_name.get(name), int | float)]
    if missing:
        raise ValueError(f"{folder}: no number for {missing[0]} among {', '.join(by_name)}.")
    return benchmark.scale * sum(by_name[name] for name in benchmark.metrics)


def prepare(arguments: argparse.Namespace) -> None:
    """Writes the rows of the tasks that are ours into the results' folder."""
    rows = arguments.results / video_qa.PREPARED
    if "scenes" in arguments.tables:
        for split in SPLITS:
            lines = (SCENES / f"scenes_pope_{split}.json").read_text().splitlines()
            questions = [json.loads(line) for line in lines]
            made = [
                {"question_id": str(row["question_id"]), "image_source": row["image"], "question": row["text"],
                 "answer": row["label"], "image": str(SCENES / "images" / row["image"])}
                for row in questions
            ]  # fmt: skip
            video_qa.write_rows(made, rows / f"scenes_pope_{split}.jsonl")
    if "2" in arguments.tables:
        if arguments.videos is None:
            sys.exit("--videos: table 2 needs the folder GPT_Zero_Shot_QA of Video-LLaVA's release.")
        for benchmark in video_qa.BENCHMARKS:
            name = benchmark.removesuffix("_qa").upper()
            folder = arguments.videos / f"{name}_Zero_Shot_QA"
            videos = next((folder / sub for sub in ("videos", "mp4") if (folder / sub).is_dir()), folder)
            video_qa.prepare(benchmark, folder, videos, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="1", type=lambda text: text.split(","), help="1, 2, scenes")
    parser.add_argument("--model", help="in place of the papers'; `reference` is the embedded one")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="rows of these methods alone")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="columns of these tasks alone")
    parser.add_argument("--videos", type=Path, help="folder GPT_Zero_Shot_QA")
    parser.add_argument("--results", type=Path, default=Path("results/paper"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit", type=int, help="questions of each task")
    arguments = parser.parse_args()
    arguments.results = arguments.results.resolve()
    unknown = [name for name in arguments.tables if name not in TABLES]
    if unknown:
        sys.exit(f"--tables {unknown[0]}: {', '.join(TABLES)} are allowed.")
    prepare(arguments)
    pages: dict[str, str] = {}
    for name in arguments.tables:
        for page in table(name, arguments):
            pages[name] = page
            (arguments.results / "tables.md").write_text("\n".join(pages.values()))
    print("\n".join(pages.values()))


def table(name: str, arguments: argparse.Namespace) -> Iterator[str]:
    """A table in Markdown, again after each row."""
    stock, every, rows = TABLES[name]
    model = {None: stock, "reference": str(CHECKPOINT)}.get(arguments.model, arguments.model)
    columns = [x for x in every if not arguments.tasks or x.task in arguments.tasks]
    page = f"## Table {name}: {model}\n\nIn brackets, the published numbers.\n\n"
    page += f"| method | tokens | {' | '.join(x.title for x in columns)} |\n{'|---' * (len(columns) + 2)}|\n"
    for (method, budget), published in rows.items():
        if arguments.methods and method not in arguments.methods:
            continue
        known = dict(zip((x.title for x in every), published, strict=False))
        cells = []
        for x in columns:
            found = value(run(model, x.task, method, budget, arguments), x)
            cells.append(f"{found:.1f}" if known.get(x.title) is None else f"{found:.1f} ({known[x.title]})")
        page += f"| {method} | {budget or 'all'} | {' | '.join(cells)} |\n"
        yield page


if __name__ == "__main__":
    main()
