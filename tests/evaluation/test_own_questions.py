"""Questions, pictures and files of one's own: what is reported is what was asked, and nothing foreign is touched."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from results import make_results, write

from llava_sparse.evaluation import LoadedModel, evaluate_pope, plan_runs, read_results
from llava_sparse.evaluation.failures import failure_curves, load_objects
from llava_sparse.evaluation.figures import COLOURS, styles
from llava_sparse.evaluation.files import check_output
from llava_sparse.evaluation.model import Memory, check_memory
from llava_sparse.evaluation.report import report
from llava_sparse.evaluation.statistics import ACCURACY, questions_needed, risk_coverage, summarize
from llava_sparse.evaluation.tables import scores_table
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.reference import SCENES

THINGS = ("dog", "cat")


@pytest.fixture
def loaded(dense, processor) -> LoadedModel:
    return LoadedModel(dense, processor, "tiny", False)


@pytest.fixture
def asked(tmp_path) -> dict[str, Path]:
    """Four pictures named as embedded scenes are, with questions and objects of their own."""
    images, annotations = tmp_path / "images", tmp_path / "annotations"
    images.mkdir()
    annotations.mkdir()
    names = sorted(path.name for path in (SCENES / "images").iterdir())[:4]
    rows, objects = [], []
    for n, name in enumerate(names):
        Image.new("RGB", (56, 56), (10 * n, 200, 0)).save(images / name)
        for m, thing in enumerate(THINGS):
            text, label = f"Is there a {thing} in the image?", ("yes", "no")[m]
            rows.append({"question_id": 2 * n + m, "image": name, "text": text, "label": label})
        # The lower right quarter of the 56 x 56 pixels that the model sees.
        objects.append({"image": name, "objects": [{"name": "dog", "box": [28, 28, 56, 56]}]})
    for split in ("random", "popular", "adversarial"):
        (annotations / f"x_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "objects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    return {"annotations": annotations, "images": images, "objects": tmp_path / "objects.jsonl"}


def run(loaded, asked, tmp_path, **settings):
    subset = {name: asked[name] for name in ("annotations", "images")}
    given = {"methods": ["dense", "visionzip"], "budget": 5, "subset": subset, "output": tmp_path / "run.json"}
    return evaluate_pope(loaded, **{**given, **settings})


def test_a_report_shows_and_measures_what_was_asked(loaded, asked, tmp_path):
    results = run(loaded, asked, tmp_path)
    assert results.settings["dataset"] == str(asked["annotations"])
    page = tmp_path / "report.html"
    report([tmp_path / "run.json"], page, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "The objects in these pictures are not known" in text and "recall by size" not in text
    # A file of an earlier version said "reference".
    old = json.loads((tmp_path / "run.json").read_text())
    old["settings"]["dataset"] = "reference"
    (tmp_path / "old.json").write_text(json.dumps(old))
    report([tmp_path / "old.json"], markdown=tmp_path / "old.md")
    assert "The objects in these pictures are not known" in (tmp_path / "old.md").read_text()


def test_boxes_are_measured_in_the_models_own_size(loaded, asked, tmp_path):
    results = run(loaded, asked, tmp_path)
    assert [entry.image_size for entry in results.methods] == [tiny.SIDE] * 2
    (dense, _), objects = results.methods, load_objects(asked["objects"], tiny.SIDE)
    found = failure_curves(dense, None, objects, resamples=10)
    assert found["recall"]["distance"][0]["low"] == pytest.approx(0.5)
    assert found["recall"]["size"][0]["low"] == 28
    report([tmp_path / "run.json"], markdown=tmp_path / "report.md", objects=asked["objects"])
    assert re.search(r"recall by distance \| 0\.5 ", (tmp_path / "report.md").read_text())
    (tmp_path / "large.jsonl").write_text(asked["objects"].read_text().replace("56]", "57]"))
    with pytest.raises(ValueError, match=r"0 <= x0 < x1 <= 56"):
        report([tmp_path / "run.json"], markdown=tmp_path / "report.md", objects=tmp_path / "large.jsonl")


def test_boxes_of_pictures_are_mapped_as_the_model_sees_them(loaded, asked, tmp_path):
    """Of pictures twice as wide as high the middle square is seen, here half as large."""
    lines = [json.loads(line) for line in asked["objects"].read_text().splitlines()]
    boxes = [[28, 0, 84, 56], [56, 56, 140, 112], [0, 0, 28, 28], [56, 28, 168, 84]]
    for line, box in zip(lines, boxes, strict=True):
        line |= {"size": [224, 112], "objects": [{"name": "dog", "box": box}]}
    path = tmp_path / "sized.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = run(loaded, asked, tmp_path)
    objects = load_objects(path, tiny.SIDE, results.settings["preprocessing"])
    found = [things[0]["box"] for things in objects.values()]
    assert [None if box is None else list(box) for box in found] == [
        [0, 0, 14, 28], [0, 28, 42, 56], None, [0, 14, 56, 42],
    ]  # fmt: skip
    curves = failure_curves(results.methods[0], None, objects, resamples=10)
    assert (curves["positives"], curves["negatives"]) == (3, 4), "what is cropped away cannot be missed"
    report([tmp_path / "run.json"], markdown=tmp_path / "report.md", objects=path)
    assert "3 distinct questions ask for an object that is there" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="line 1: boxes in pixels of pictures need results that say"):
        load_objects(path)


def test_pictures_named_without_a_suffix(tmp_path):
    results, log = make_results()
    for part in (*(answer for entry in results["methods"] for answer in entry["answers"]), *log[1:]):
        part["image"] = Path(part["image"]).stem if part["image"].startswith("picture") else "last"
    (tmp_path / "pictures").mkdir()
    for name in {line["image"] for line in log[1:]}:
        Image.new("RGB", (20, 20), "red").save(tmp_path / "pictures" / f"{name}.jpg")
    report([write(tmp_path, results, log)], tmp_path / "report.html", images=tmp_path / "pictures")
    assert "data:image/jpeg" in (tmp_path / "report.html").read_text()


def test_empty_and_cut_answers_are_counted_and_shown(loaded, asked, tmp_path):
    loaded.model.generation_config.eos_token_id = None
    results = run(loaded, asked, tmp_path, max_new_tokens=2)
    assert results.settings["max_new_tokens"] == 2
    assert [entry.cut for entry in results.methods] == [8, 8] and results.questions.asked == 8
    shown = scores_table(results, splits=True)
    assert "empty / cut" in shown.columns and f"{results.methods[0].empty} / 8" in shown.plain()
    assert "ended by the limit of 2 tokens" in shown.caption
    loaded.model.generation_config.eos_token_id = list(range(64))
    results = run(loaded, asked, tmp_path, output=None)
    assert [(entry.empty, entry.cut) for entry in results.methods] == [(8, 0), (8, 0)]
    loaded.model.generation_config.eos_token_id = [2, *range(5, 64)]
    with pytest.raises(ValueError, match="max_new_tokens=0: a positive number"):
        run(loaded, asked, tmp_path, max_new_tokens=0)


def test_few_images_are_a_warning(loaded, asked, tmp_path):
    results = run(loaded, asked, tmp_path)
    assert "4 images are too few for them" in scores_table(results).caption
    for entry in results.methods:
        entry.scores["bootstrap"]["images"] = 50
    assert "too few" not in scores_table(results).caption


def test_nothing_foreign_is_replaced_or_read(loaded, asked, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "other.json").write_text('{"name": "package"}')
    (tmp_path / "notes.json").write_text("my notes")
    for name in ("pipe.json", "folder.json", "other.json", "notes.json"):
        with pytest.raises(OSError, match=rf"{name}: (this is no regular|results cannot be written|another file is)"):
            run(loaded, asked, tmp_path, output=tmp_path / name)
    with pytest.raises(OSError, match="no regular file"):
        check_output("/dev/null")
    assert (tmp_path / "other.json").read_text() == '{"name": "package"}'
    for reader in (read_results, load_objects, lambda path: report([path], markdown=tmp_path / "report.md")):
        with pytest.raises(OSError, match="no regular file"):
            reader(tmp_path / "pipe.json")
    (tmp_path / "empty.json").touch()
    run(loaded, asked, tmp_path, output=tmp_path / "empty.json")
    run(loaded, asked, tmp_path, output=tmp_path / "empty.json")
    assert len(read_results(tmp_path / "empty.json").methods) == 2


@pytest.mark.parametrize("text", ["visionzip:budgets=[4,1]:budgets=[1,2]", "sparsevlm:raters=all:raters=text"])
def test_an_option_that_is_given_twice_is_refused(text):
    with pytest.raises(ValueError, match=r"(budgets|raters) is given twice; each option once"):
        plan_runs([text], [5])


def test_a_method_has_one_colour_everywhere():
    assert len(METHODS) <= len(set(COLOURS)) == len(COLOURS)
    several = styles(["dense", *(f"{name}@64" for name in sorted(METHODS))])
    assert len({style["color"] for style in several}) == len(several)
    for name, style in zip(sorted(METHODS), several[1:], strict=True):
        (alone,) = styles([f"{name}:option=1@32"])
        assert (alone["color"], alone["marker"]) == (style["color"], style["marker"])
    first, second = styles(["visionzip@64", "visionzip@32"])
    assert first["color"] == second["color"] and first["marker"] != second["marker"]


def test_weights_that_do_not_fit_are_refused_before_they_are_read():
    check_memory(7_000_000_000, "4bit", 11 * 10**9)
    with pytest.raises(
        ValueError, match=r"7\.0 billion weights in bfloat16 need 14\.0 GB, the GPU has 11\.0 GB free: use"
    ):
        check_memory(7_000_000_000, "bfloat16", 11 * 10**9)
    for free, advice in ((16, "--dtype bfloat16"), (11, "--load-in-8bit"), (6, "--load-in-4bit"), (3, "--device-map")):
        with pytest.raises(ValueError, match=f"use {advice}"):
            check_memory(7_000_000_000, "float32", free * 10**9)
    limits = Memory(device_map="auto", max_memory="0=10GiB,cpu=30GiB").arguments("auto", None)
    assert limits == {"device_map": "auto", "max_memory": {0: "10GiB", "cpu": "30GiB"}}
    with pytest.raises(ValueError, match="one of them is allowed"):
        Memory(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="with a device_map"):
        Memory(max_memory="cpu=1GiB")


def test_questions_needed():
    """Connor's formula by hand: 20 and 10 discordant of 100; found in four simulated studies of five."""
    needed = questions_needed(100, 20, 10)
    assert needed == int(np.ceil(((1.959964 * 0.3**0.5 + 0.841621 * 0.29**0.5) / 0.1) ** 2)) == 234
    assert questions_needed(100, 10, 10) is None
    assert questions_needed(100, 10, 20) == needed


def test_risk_and_coverage():
    """Surest first: right, wrong, then two equally sure ones of which one is wrong."""
    assert risk_coverage([1, 1, 0, 1], [3.0, -2.0, -1.0, -1.0]) == pytest.approx((0 + 1 / 2 + 1.5 / 3 + 2 / 4) / 4)
    assert risk_coverage([1, 0], [2.0, -1.0]) == 0


def test_accuracy_alone_is_a_measure():
    rows = [
        {"split": "all", "image": f"{n}", "question": "?", "label": "a", "parsed": "a" if n % 4 else "b"}
        for n in range(40)
    ]
    found = summarize(rows, ACCURACY, resamples=50)
    assert found["unique"]["accuracy"] == found["average"]["accuracy"] == 0.75
    low, high = found["unique"]["intervals"]["accuracy"]
    assert 0.5 < low < 0.75 < high < 1
