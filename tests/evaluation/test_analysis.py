"""Failure analysis: boxes, patches and curves of made-up runs whose truth is known."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from statsmodels.discrete.discrete_model import Logit

from llava_sparse.evaluation import failures
from llava_sparse.evaluation.answer_log import FORMAT, read_log
from llava_sparse.evaluation.failures import logistic_regression
from llava_sparse.evaluation.statistics import pack_kept
from llava_sparse.reference import SCENES

PATCHES = 576


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def question(name):
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def answer(image, name, label, parsed):
    ids = {"split": "random", "question_id": f"{image} {name}", "image": image, "question": question(name)}
    return {**ids, "label": label, "answer": parsed, "parsed": parsed}


def entry(answers, name="x@64", method="x"):
    return {"name": name, "method": method, "patches": PATCHES, "answers": answers}


def box(size, x=0, y=0):
    return [x, y, x + size, y + size]


def write(path: Path, *lines) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_reference_set_is_covered():
    objects = failures.load_objects(SCENES / "objects.jsonl")
    assert len(objects) == 200
    pairs = set()
    for file in SCENES.glob("*.json"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            pairs.add((row["image"], row["text"], row["label"]))
    assert len(pairs) == 2151
    for image, text, label in pairs:
        features = failures.question_features(image, text, label, objects)
        assert features["present"] == (label == "yes")
        assert 3 <= features["clutter"] <= 7
        if label == "yes":
            assert 28 <= features["size"] <= 140 and 0 < features["distance"] < 1
            # A box touches this many patches, and at least a quarter of most of them is its own.
            assert len(features["patches"]) <= (features["size"] // 14 + 2) ** 2
            assert features["area"] == pytest.approx(len(features["patches"]) / PATCHES, rel=0.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[", "invalid JSON"),
        ("[]", "'image' and the list 'objects'"),
        ('{"image": "a"}', "'image' and the list 'objects'"),
        ('{"image": "b", "objects": []}', "has a line already"),
        ('{"image": "a", "objects": [{"box": [0, 0, 1, 1]}]}', "'name' and 'box'"),
        ('{"image": "a", "size": [3], "objects": []}', r"size \[3\]: \[width, height\] in pixels is allowed"),
        ('{"image": "a", "size": [0, 9], "objects": []}', r"size \[0, 9\]"),
        ('{"image": "a", "objects": [{"name": "cat"}]}', "'cat' has the box None; allowed"),
        ('{"image": "a", "objects": [{"name": "cat", "box": [5, 0, 5, 1]}]}', r"box \[5, 0, 5, 1\]; allowed"),
        ('{"image": "a", "objects": [{"name": "cat", "box": [0, 0, 1, 337]}]}', "y1 <= 336"),
        ('{"image": "a", "objects": [{"name": "cat", "box": [0, 0, 1, NaN]}]}', "nan"),
        ('{"image": "a", "objects": [{"name": "cat", "box": [0, 0, 1, "2"]}]}', "'2'"),
    ],
)
def test_bad_objects_are_refused(tmp_path, line, message):
    path = write(tmp_path / "objects.jsonl", '{"image": "b", "objects": []}', "", line)
    with pytest.raises(ValueError, match=rf"objects\.jsonl, line 3: .*{message}"):
        failures.load_objects(path)


@pytest.mark.parametrize(
    ("corners", "patches"),
    [
        ([14, 28, 28, 42], [2 * 24 + 1]),
        ([0, 0, 28, 14], [0, 1]),
        ([7, 7, 21, 21], [0, 1, 24, 25]),
        # A little more than a quarter of the second patch, and a little less.
        ([0, 0, 18, 14], [0, 1]),
        ([0, 0, 17, 14], [0]),
        # Small, across four patches: the one that it covers most.
        ([12, 12, 17, 17], [25]),
        ([322, 322, 336, 336], [575]),
    ],
)
def test_patches_of_a_box(corners, patches):
    objects = {"a": [{"name": "cat", "box": corners}]}
    assert failures.question_features("a", question("cat"), "yes", objects)["patches"] == patches


def test_question_features():
    things = [{"name": "apple", "box": [0, 0, 28, 14]}, {"name": "apple", "box": [154, 140, 182, 196]}]
    objects = {"a": [*things, {"name": "dining table", "box": [300, 300, 336, 336]}]}
    found = failures.question_features("a", question("apple"), "yes", objects)
    assert found.pop("patches") == [row * 24 + column for row in range(10, 14) for column in (11, 12)]
    # The larger of two apples, in the centre.
    expected = dict(name="apple", present=True, clutter=3, size=56, area=28 * 56 / 336**2, distance=0)
    assert found == pytest.approx(expected)
    table = failures.question_features("a", question("dining table"), "yes", objects)
    assert table["distance"] == pytest.approx(150 / 168)
    absent = failures.question_features("a", question("dog"), "no", objects)
    assert (absent["present"], absent["clutter"], absent["size"], absent["patches"]) == (False, 3, None, None)


@pytest.mark.parametrize(
    ("image", "text", "label", "message"),
    [
        ("a", "What is in the image?", "yes", "'Is there a … in the image"),
        ("b", question("cat"), "yes", "b: its objects are not listed"),
        ("a", question("cat"), "no", "'no' contradicts the 1 boxes"),
        ("a", question("dog"), "yes", "'yes' contradicts the 0 boxes"),
    ],
)
def test_questions_that_do_not_fit_are_refused(image, text, label, message):
    objects = {"a": [{"name": "cat", "box": box(30)}]}
    with pytest.raises(ValueError, match=message):
        failures.question_features(image, text, label, objects)


def test_survival():
    stages = np.zeros((2, PATCHES), bool)
    stages[0, [1, 2, 3]] = stages[1, [2]] = True
    assert failures.survival(list(stages), [0, 1, 2, 3]) == [0.75, 0.25]
    with pytest.raises(ValueError, match="no patches"):
        failures.survival(list(stages), [])


SIZES = (30, 50, 70, 110)


@pytest.fixture
def study():
    """40 images with an object of each of four sizes; the smallest is never found, half of it survives."""
    objects, answers, kept = {}, [], {}
    for i in range(40):
        image = f"{i}.jpg"
        things = [{"name": f"thing{k}", "box": box(size, 100 + i)} for k, size in enumerate(SIZES)]
        objects[image] = things + [{"name": "other", "box": box(20)}] * (i % 2)
        for k in range(4):
            answers.append(answer(image, f"thing{k}", "yes", "yes" if k > (i < 10) else "no"))
            patches = failures.question_features(image, question(f"thing{k}"), "yes", objects)["patches"]
            mask = np.zeros(PATCHES, bool)
            mask[patches if k else patches[::2]] = True
            kept[image, question(f"thing{k}")] = [pack_kept(np.ones(PATCHES)), pack_kept(mask)]
        answers.append(answer(image, "ghost", "no", "yes" if i % 2 else "no"))
        kept[image, question("ghost")] = [pack_kept(np.zeros(PATCHES))] * 2
    return entry(answers), kept, objects


SOME = "7.jpg", question("thing2")


def rates(bins):
    return [bin["rate"] for bin in bins]


def test_failure_curves(study):
    run, kept, objects = study
    # The same questions in another split are no new observations.
    run["answers"] += [{**row, "split": "popular"} for row in run["answers"] if row["label"] == "yes"]
    found = failures.failure_curves(run, kept, objects, resamples=200)
    assert (found["run"], found["positives"], found["negatives"]) == ("x@64", 160, 40)
    size = found["recall"]["size"]
    assert [(bin["low"], bin["high"], bin["count"]) for bin in size] == [
        (28, 40, 40),
        (40, 56, 40),
        (56, 80, 40),
        (80, 120, 40),
    ]
    assert rates(size) == [0, 0.75, 1, 1]
    low, high = size[1]["interval"]
    error = 1.96 * math.sqrt(0.75 * 0.25 / 40)
    assert [low, high] == pytest.approx([0.75 - error, 0.75 + error], abs=0.05)
    assert size[2]["interval"] == pytest.approx([0.025 ** (1 / 40), 1])
    assert sum(bin["count"] for bin in found["recall"]["distance"]) == 160
    assert [(bin["low"], bin["high"], bin["count"]) for bin in found["recall"]["clutter"]] == [(4, 4, 80), (5, 5, 80)]
    assert [bin["low"] for bin in found["recall"]["survival"]] == [0.5, 0.75]
    assert rates(found["recall"]["survival"]) == [0, pytest.approx(110 / 120)]
    assert rates(found["false_positive_rate"]["clutter"]) == [0, 1]
    first, last = found["survival"]["stages"]
    assert first["rate"] == 1 and first["count"] == 160
    small, *others = (bin["stages"][1]["rate"] for bin in found["survival"]["by_size"])
    assert 0.5 <= small <= 0.6 and others == [1, 1, 1]
    assert last["rate"] == pytest.approx((small + 3) / 4)
    # Only the smallest are never found: their size alone tells nearly all.
    assert found["regression"]["questions"] == 160 and found["regression"]["images"] == 40
    json.dumps(found, allow_nan=False)


def test_failure_curves_of_the_dense_model(study):
    run, _, objects = study
    for kept in (None, {(row["image"], row["question"]): [] for row in run["answers"]}):
        found = failures.failure_curves(run, kept, objects, resamples=50)
        assert set(found["recall"]) == {"size", "distance", "clutter"}
        assert found["survival"] == {"stages": [], "by_size": []}
        assert "survival" not in {**found["regression"]["terms"], **found["regression"]["left_out"]}


@pytest.mark.parametrize("label", ["yes", "no"])
def test_failure_curves_of_one_label(study, label):
    run, kept, objects = study
    run["answers"] = [{**row, "parsed": "yes"} for row in run["answers"] if row["label"] == label]
    found = failures.failure_curves(run, kept, objects, resamples=50)
    assert found["regression"]["terms"] == {}
    assert bool(found["recall"]["size"]) == (label == "yes")
    assert rates(found["false_positive_rate"]["clutter"]) == ([] if label == "yes" else [1, 1])
    json.dumps(found, allow_nan=False)


def test_sizes_of_other_pictures_are_cut_into_quartiles(study):
    run, _, objects = study
    for things in objects.values():
        for k, thing in enumerate(things[:4]):
            thing["box"] = box(10 + k)
        things[0]["box"] = box(6 + len(things))
    size = failures.failure_curves(run, None, objects, resamples=20)["recall"]["size"]
    assert [bin["low"] for bin in size] == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, kept: kept.pop(SOME), "masks of the same stages"),
        (lambda run, kept: kept.update({SOME: ["ff"]}), "masks of the same stages"),
        (lambda run, kept: kept.update({SOME: ["ff", "ff"]}), "a mask of 576 patches"),
        (lambda run, kept: run.update(patches=575), "575 patches; a square number"),
    ],
)
def test_failure_curves_refuse(study, change, message):
    run, kept, objects = study
    change(run, kept)
    with pytest.raises(ValueError, match=message):
        failures.failure_curves(run, kept, objects)


def test_regression_finds_the_coefficients():
    generator = np.random.default_rng(0)
    images = np.repeat(np.arange(300), 4)
    size, other = generator.normal(6, 1, 1200), generator.normal(0, 0.01, 1200)
    chance = 1 / (1 + np.exp(-(1.5 * (size - 6) - 60 * other)))
    right = generator.random(1200) < chance
    found = logistic_regression(right, {"size": size, "other": other}, images.astype(str).tolist())
    assert (found["questions"], found["images"], found["left_out"]) == (1200, 300, {})
    stock = Logit(right.astype(float), np.column_stack([np.ones(1200), size, other]))
    fit = stock.fit(disp=0, cov_type="cluster", cov_kwds={"groups": images})
    for k, (name, truth) in enumerate({"size": 1.5, "other": -60}.items(), start=1):
        term = found["terms"][name]
        assert term["coefficient"] == pytest.approx(fit.params[k], rel=1e-4)
        assert term["interval"] == pytest.approx(fit.conf_int(0.05)[k].tolist(), rel=1e-3)
        assert term["interval"][0] < truth < term["interval"][1]


def test_regression_clusters():
    """Every question asked four times is no more information than once."""
    generator = np.random.default_rng(0)
    size = generator.normal(size=200)
    right = generator.random(200) < 1 / (1 + np.exp(-size))
    names = [str(i) for i in range(200)]
    once = logistic_regression(right, {"size": size}, names)["terms"]["size"]
    four = logistic_regression(np.repeat(right, 4), {"size": np.repeat(size, 4)}, np.repeat(names, 4).tolist())
    assert four["terms"]["size"]["coefficient"] == pytest.approx(once["coefficient"], rel=1e-4)
    assert four["terms"]["size"]["interval"] == pytest.approx(once["interval"], rel=0.03)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (lambda x, y: np.full(60, 3.0), "constant"),
        (lambda x, y: 2 - 5 * x, "follows from the terms before it"),
        (lambda x, y: y + 0.1 * x, "separates"),
        # Right wherever it is 1, both where it is 0.
        (lambda x, y: y & (np.arange(60) % 3 == 0), "separates"),
    ],
)
def test_terms_that_cannot_be_estimated_are_left_out(column, reason):
    generator = np.random.default_rng(0)
    x = generator.normal(size=60)
    y = generator.random(60) < 0.5
    images = [str(i) for i in range(60)]
    found = logistic_regression(y, {"x": x, "bad": column(x, y)}, images)
    assert reason in found["left_out"]["bad"]
    assert found["terms"] == logistic_regression(y, {"x": x}, images)["terms"]
    assert set(found["terms"]) == {"x"}


def test_regression_of_next_to_nothing():
    assert "too few images" in logistic_regression([1, 0, 1], {"x": [1, 2, 0]}, ["a", "b", "b"])["left_out"]["x"]
    assert "all answers" in logistic_regression([1, 1, 1], {"x": [1, 2, 0]}, ["a", "b", "c"])["left_out"]["x"]
    assert logistic_regression([], {"x": []}, []) == {
        "questions": 0,
        "images": 0,
        "terms": {},
        "left_out": {"x": "all answers are right, or all are wrong"},
    }


def test_disagreements():
    def answers(**said):
        pairs = {"a": ("1.jpg", "bat"), "b": ("1.jpg", "bee"), "c": ("2.jpg", "cow"), "d": ("0.jpg", "dog")}
        return [answer(*pairs[key], "yes", "yes" if right else "no") for key, right in said.items()] + [
            answer("9.jpg", "emu", "yes", "yes")
        ]

    pruned = entry(answers(a=False, b=False, c=False, d=True), "x@64")
    other = entry(answers(a=False, b=False, c=False, d=False), "y@64")
    dense = entry(answers(a=True, b=True, c=True, d=False), "dense", "dense")
    found = failures.disagreements([pruned, other, dense])
    # Where dense alone is right comes first, another image before the same one again.
    assert [row["question"] for row in found] == [question(name) for name in ("bat", "cow", "bee", "dog")]
    assert found[3] == {
        "image": "0.jpg",
        "question": question("dog"),
        "label": "yes",
        "answers": {"x@64": "yes", "y@64": "no", "dense": "no"},
    }
    assert failures.disagreements([dense, other, pruned], limit=2)[1]["question"] == question("cow")
    assert failures.disagreements([dense, {**dense, "name": "again"}]) == []


HEADER = {"format": FORMAT, "settings": {"limit": None}, "versions": {}}


def logged(run, image, **more):
    return {"run": run, "image": image, "question": question("ärmel"), "answer": "Yes", **more}


def test_read_log_cut_anywhere(tmp_path):
    rows = [HEADER, logged("dense", "a"), logged("x@1", "a", kept=["ff"], score=0.5), logged("x@1", "b", kept=["00"])]
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    path = tmp_path / "run.answers.jsonl"
    path.write_bytes(b"".join(lines))
    header, found, size = read_log(path)
    assert (header, size) == (HEADER, sum(map(len, lines)))
    assert [key[:2] for key in found] == [("dense", "a"), ("x@1", "a"), ("x@1", "b")]
    assert found["x@1", "a", question("ärmel")] == rows[2]
    for cut in range(1, len(lines[-1])):
        path.write_bytes(b"".join(lines)[:-cut])
        assert len(read_log(path)[1]) == (3 if cut == 1 else 2)
        assert read_log(path)[2] == read_log(path, torn=False)[2] == sum(map(len, lines[:-1]))
        assert len(read_log(path, torn=False)[1]) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no format"),
        (['{"settings": {}}'], "no format"),
        (['{"format": "llava-sparse answers 0"}'], "no format"),
        ([json.dumps(HEADER), "{", json.dumps(logged("a", "b"))], "line 2: invalid JSON"),
        ([json.dumps(HEADER), "7", ""], "line 2: int"),
        ([json.dumps(HEADER), '{"run": "a"}'], "line 2, answer has no '(image|question|answer)'"),
        ([json.dumps(HEADER), *(json.dumps(logged("a", "b", score=s)) for s in (1, 2))], "line 3: .* another answer"),
        ([json.dumps(HEADER), json.dumps(logged("a", "b", score="1"))], r"line 2, answer\.score is '1'; a number is"),
        ([json.dumps(HEADER), json.dumps(logged("a", "b", visual_tokens=math.nan))], "visual_tokens is nan; a number"),
        ([json.dumps(HEADER), json.dumps(logged("a", "b", kept=["zz"]))], "kept is .*; a list of masks"),
        ([json.dumps(HEADER), '{"run": "a", "run": "b"}'], "line 2: .*the key 'run' is there twice"),
    ],
)
def test_read_log_refuses(tmp_path, lines, message):
    path = write(tmp_path / "run.answers.jsonl", *lines)
    with pytest.raises(ValueError, match=message):
        read_log(path)
