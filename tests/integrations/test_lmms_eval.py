"""Pruned models in lmms-eval: `make test-lmms`, an environment of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_sparse.evaluation import ask, evaluate_pope, load_model
from llava_sparse.integrations import TASKS, paired, video_qa
from llava_sparse.pictures import read_picture
from llava_sparse.reference import SCENES

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval")

ROOT = Path(__file__).resolve().parents[2]
ROWS = [json.loads(line) for line in (SCENES / "scenes_pope_adversarial.json").read_text().splitlines()]
LIMIT = 48


def paper_tables(results: Path, *arguments: str) -> str:
    command = [
        sys.executable, str(ROOT / "examples" / "paper_tables.py"), "--tables", "scenes", "--model", "reference",
        "--tasks", "scenes_pope_adversarial", "--limit", str(LIMIT), "--dtype", "float32", "--results", str(results),
        *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    paper_tables(folder, "--methods", "dense,visionzip")
    return folder


def samples(folder: Path) -> Path:
    return max(folder.rglob("*_samples_*.jsonl"))


@pytest.mark.parametrize("method", ["dense", "visionzip"])
def test_the_scenes_are_what_pope_says(results, method, tmp_path):
    """Answer by answer, and to the digit."""
    ids = tmp_path / "ids.txt"
    ids.write_text("".join(f"{row['question_id']}\n" for row in ROWS[:LIMIT]))
    subset = {"split": ["adversarial"], "ids": ids}
    ours = evaluate_pope(methods=[method], budget=64, dtype="float32", subset=subset)
    run = ours["methods"][0]
    folder = results / f"{method}-{None if method == 'dense' else 64}-scenes_pope_adversarial"
    found = json.loads(max(folder.rglob("*_results.json")).read_text())["results"]["scenes_pope_adversarial"]
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found[f"{name},none"] == pytest.approx(run["average"][name], abs=1e-12), name
    rows = sorted(paired.read_log(samples(folder)), key=lambda row: row["doc_id"])
    assert [row["filtered_resps"] for row in rows] == [answer["answer"].strip() for answer in run["answers"]]


def test_two_processes_equal_one(results, tmp_path):
    from shutil import copytree

    copytree(results / "prepared", tmp_path / "prepared")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lmms_eval", "--model",
        "llava_sparse", "--model_args", "sparse_method=visionzip,sparse_budget=64,dtype=float32", "--include_path",
        str(TASKS), "--tasks", "scenes_pope_adversarial", "--batch_size", "5", "--limit", str(LIMIT), "--output_path",
        "out", "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        {row["doc_id"]: row["filtered_resps"] for row in paired.read_log(samples(folder))}
        for folder in (results / "visionzip-64-scenes_pope_adversarial", tmp_path / "out")
    )
    assert one == two and len(one) == LIMIT


def test_the_tables_resume_and_compare(results):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*_results.json")}
    page = paper_tables(results, "--methods", "dense,visionzip")
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*_results.json")} == before
    assert re.search(r"\| visionzip \| 64 \| [\d.]+ \| [\d.]+ \|", page)
    logs = [
        samples(results / name)
        for name in ("dense-None-scenes_pope_adversarial", "visionzip-64-scenes_pope_adversarial")
    ]
    found = paired.compare(*logs)
    assert (found["metric"], found["cluster"], found["questions"]) == ("accuracy", paired.PICTURES, LIMIT)


# --- The model alone ---------------------------------------------------------------------------------------------


def request(doc: dict, text: str, **generation):
    return SimpleNamespace(args=(text, {"max_new_tokens": 6} | generation, lambda d: d["seen"], doc["id"], "t", "s"))


def asked(model, docs, texts, **generation):
    model.task_dict = {"t": {"s": docs}}
    requests = [request(doc, text, **generation) for doc, text in zip(docs, texts, strict=True)]
    return model.generate_until(requests)


@pytest.fixture(scope="module")
def model():
    from llava_sparse.integrations.lmms_eval import LlavaSparse

    return LlavaSparse(sparse_method="visionzip", sparse_budgets="[54,10]", dtype="float32", batch_size=3)


def test_batches_of_several_pictures_and_none(model):
    loaded = load_model(dtype="float32")
    pruned, pictures = (
        loaded.with_method("visionzip", 64),
        [read_picture(SCENES / "images" / r["image"]) for r in ROWS[:7]],
    )
    docs = [{"id": i, "seen": [picture]} for i, picture in enumerate(pictures)]
    texts = ["Is there a dog in the image?"] * 7
    expected = [ask(pruned, loaded.processor, p, texts[0], loaded.prompt(False)) for p in pictures]
    assert asked(model, docs, texts) == expected
    # Alone and in a batch, whatever stands beside it.
    mixed = [docs[0], {"id": 1, "seen": pictures[1:3]}, {"id": 2, "seen": []}]
    texts = [texts[0], "Is there a dog in the image?", "Is there a dog ?"]
    assert asked(model, mixed, texts) == [
        asked(model, [doc | {"id": 0}], [text])[0] for doc, text in zip(mixed, texts, strict=True)
    ]


def test_what_ends_an_answer(model):
    doc = {"id": 0, "seen": [read_picture(SCENES / "images" / ROWS[0]["image"])]}
    whole = asked(model, [doc], ["Describe the image ."], max_new_tokens=12)[0]
    word = whole.split()[2]
    assert (
        asked(model, [doc], ["Describe the image ."], max_new_tokens=12, until=[word])[0]
        == whole.split(word)[0].strip()
    )


def test_what_is_refused(model):
    from llava_sparse.integrations.lmms_eval import LlavaSparse

    with pytest.raises(ValueError, match=r"sparse_buget is unknown .*sparse_budget"):
        LlavaSparse(sparse_method="visionzip", sparse_buget=64)
    with pytest.raises(ValueError, match="without sparse_method"):
        LlavaSparse(sparse_budget=64, dtype="float32")
    with pytest.raises(ValueError, match="takes pictures alone"):
        asked(model, [{"id": 0, "seen": ["video.mp4"]}], ["What ?"])


def test_a_video_model(tmp_path, monkeypatch):
    """Frames of a folder, in Video-LLaVA."""
    import family_cases

    from llava_sparse.evaluation.model import LoadedModel
    from llava_sparse.integrations import lmms_eval

    loaded = LoadedModel(family_cases.video_model(), family_cases.video_processor(), "tiny", False)
    monkeypatch.setattr(lmms_eval, "load_model", lambda *args: loaded)
    frames = tmp_path / "clip"
    frames.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(frames / f"{i}.png")
    made = lmms_eval.LlavaSparse(sparse_method="divprune", sparse_budget=5, frames=2)
    answers = asked(made, [{"id": 0, "seen": [str(frames)]}], ["Is there a dog ?"])
    assert len(answers) == 1 and isinstance(answers[0], str)


# --- Task files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", video_qa.BENCHMARKS)
def test_video_tasks_read_prepared_rows(benchmark, tmp_path, monkeypatch):
    from lmms_eval.tasks import TaskManager, get_task_dict

    monkeypatch.chdir(tmp_path)
    rows = [
        {"question_id": str(i), "video": f"/v/{i}.mp4", "question": "what is it", "answer": "a dog"} for i in range(4)
    ]
    video_qa.write_rows(rows, video_qa.PREPARED / f"{benchmark}.jsonl")
    task = get_task_dict([benchmark], TaskManager(include_path=str(TASKS)))[benchmark]
    docs = list(task.test_docs())
    assert len(docs) == 4 and task.doc_to_visual(docs[0]) == ["/v/0.mp4"]
    assert task.doc_to_text(docs[0]) == "what is it Answer the question using a single word or phrase."
    assert [task.process_results(docs[0], [said])["accuracy"] for said in ("A dog.", "the cat")] == [1.0, 0.0]


TEN = ["dog"] * 8 + ["cat"] * 2
PEOPLE = [{"answer": answer, "answer_id": i} for i, answer in enumerate(TEN)]
OTHERS = [
    ("pope", "pope", {"answer": "yes"}, "pope_f1_score", "Yes", "No"),
    ("mme", "mme", {"answer": "Yes", "category": "color"}, "mme_perception_score", "Yes.", "No"),
    ("scienceqa", "sqa", {"choices": ["a", "b"], "answer": 1}, "exact_match", "B", "A"),
    ("vqav2", "vqav2", {"answers": PEOPLE}, "exact_match", "Dog", "cow"),
    ("textvqa", "textvqa", {"answers": TEN}, "exact_match", "dog", "cow"),
    ("conbench", "conbench", {"question_field": "N/Y", "answer": "yes", "image_id": 3}, "ConScore_D", "Yes", "No"),
]


@pytest.mark.parametrize(("task", "prefix", "doc", "metric", "right", "wrong"), OTHERS, ids=[row[0] for row in OTHERS])
def test_scoring_of_other_tasks(task, prefix, doc, metric, right, wrong):
    """Rows of the form that lmms-eval's own tasks have, scored by their code, and read as their logs would be."""
    process = getattr(import_module(f"lmms_eval.tasks.{task}.utils"), f"{prefix}_process_results")
    scores = []
    for said in (right, wrong):
        row = {"doc_id": 0, "target": "x"} | process({"question_id": 1} | json.loads(json.dumps(doc)), [said])
        assert paired.metric_of([row], metric) == metric
        scores.append(paired._number(row[metric]))
    assert scores == [1.0, 0.0]


if not torch.cuda.is_available():
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
