"""Results of an evaluation as `llava-sparse pope --output` writes them, small, consistent, and with hostile names."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from llava_sparse.evaluation import compare, summarize
from llava_sparse.evaluation.statistics import METRICS, pack_kept

PATCHES = 16
SCRIPT = "<script>document.title='hacked'</script>"
THINGS = ("dog", "cat", SCRIPT, "a | `b` *c* [d](http://e.example)")
IMAGE = '"><img src=x onerror="document.title=\'hacked\'">.jpg'
HOSTILE = f"sparse|{SCRIPT}@4"
RUNS = ("dense", "visionzip@4", HOSTILE)


def question(thing: str) -> str:
    return f"Is there a {thing} in the image?"


def make_results() -> tuple[dict, list[dict]]:
    """Results of three runs on 8 pictures, and the lines of their log."""
    return copy.deepcopy(_results())


@lru_cache
def _results() -> tuple[dict, list[dict]]:
    random = np.random.default_rng(0)
    settings = {"model": "tiny", "dataset": "pictures", "note": SCRIPT, "answer_mode": "logits"}
    names = [f"picture_{n}.jpg" for n in range(7)] + [IMAGE]
    rows = [
        {"split": split, "question_id": f"{n}-{thing}", "image": name, "question": question(thing), "label": label}
        for split in ("random", "popular")
        for n, name in enumerate(names)
        for thing, label in zip(THINGS, ("yes", "yes", "no", "no"), strict=True)
    ]
    log = [{"format": "llava-sparse answers 1", "settings": settings, "versions": {}}]
    methods = []
    for number, name in enumerate(RUNS):
        given = {}
        for row in rows:
            score = random.normal(2 - number if row["label"] == "yes" else number - 2, 1)
            given.setdefault((row["image"], row["question"]), round(float(score), 3))
        for (image, asked), score in given.items():
            masks = [pack_kept(random.permutation(PATCHES) < n) for n in ((), (4,), (8, 4))[number]]
            answer = "Yes" if score > 0 else "No"
            log.append(
                {"run": name, "image": image, "question": asked, "answer": answer, "score": score, "kept": masks}
            )
        scores = [given[row["image"], row["question"]] for row in rows]
        answers = [
            {**row, "answer": "Yes" if s > 0 else "No", "parsed": "yes" if s > 0 else "no", "score": s}
            for row, s in zip(rows, scores, strict=True)
        ]
        found = summarize(answers, resamples=50)
        methods.append(
            {
                "name": name,
                "method": name.partition("@")[0],
                "kind": (None, "encoder", "decoder")[number],
                "budget": None if number == 0 else 4,
                "seed": None,
                "layers": [1],
                "budgets": [4],
                "options": {},
                "visual_tokens": 16.0 if number == 0 else 4.0 + number,
                "patches": PATCHES,
                "scores": found,
                "splits": {
                    split: {key: part[key] for key in (*METRICS, "questions")}
                    for split, part in found["splits"].items()
                },
                "average": {key: found["average"][key] for key in METRICS},
                "answers": answers,
            }
        )
    counts = {"splits": {"random": 32, "popular": 32}, "scored": 64, "asked": 32, "images": 8, "note": "A note."}
    results = {
        "settings": settings,
        "versions": {"python": "3"},
        "questions": {**counts, "skipped": [f"row 3: {SCRIPT} cannot be decoded", "- 1. `row` | 4"]},
        "methods": methods,
        "comparisons": compare(methods, resamples=50),
    }
    return results, log


def earlier_version(results: dict) -> dict:
    """The results as the first version wrote them."""
    old = copy.deepcopy(results)
    del old["comparisons"], old["questions"]["skipped"]
    for entry in old["methods"]:
        entry["method"] = entry["name"].partition("@")[0]
        del entry["name"], entry["scores"], entry["patches"], entry["seed"]
        for answer in entry["answers"]:
            del answer["score"]
    return old


def write(folder: Path, results: dict, log: list[dict] | None = None, name: str = "run.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(results), encoding="utf-8")
    if log is not None:
        lines = "".join(json.dumps(line) + "\n" for line in log)
        path.with_suffix(".answers.jsonl").write_text(lines, encoding="utf-8")
    return path
