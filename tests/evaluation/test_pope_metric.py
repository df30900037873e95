"""The POPE metric: parsing by the official rule, and scores against hand-computed and brute-force ones."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llava_sparse
from llava_sparse.metrics.pope import pope as module
from llava_sparse.metrics.pope.pope import Pope, parse_answer

FOLDER = Path(llava_sparse.__file__).parent / "metrics" / "pope"


@pytest.fixture(scope="module")
def metric():
    return Pope(keep_in_memory=True)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("No.", "no"),
        ("No, there is no dog.", "no"),
        ("There is not a dog in the image.", "no"),
        ("There is no dog", "no"),
        ("Yes. No", "yes"),
        (". No", "yes"),
        ("It does,not", "yes"),
        ("Yes, no doubt", "no"),
        ("NO", "yes"),
        ("Not at all", "yes"),
        ("None", "yes"),
        ("There isn't", "yes"),
        ("Nothing, nowhere", "yes"),
        ("", "yes"),
        ("No\nYes", "yes"),
    ],
)
def test_parsing(text, label):
    assert parse_answer(text) == label


@given(st.text(alphabet="noNty ,.", max_size=20))
def test_parsing_follows_the_official_rule(text):
    head = ""
    for letter in text:
        if letter == ".":
            break
        head += "" if letter == "," else letter
    assert parse_answer(text) == ("no" if re.search(r"(^| )(No|not|no)( |$)", head) else "yes")


def test_hand_computed(metric):
    answers = ["Yes", "yes, two.", "No", "There is not.", "Yes", "No"]
    labels = ["yes", "no", "no", "yes", "yes", "no"]
    # 2 hits, 1 false alarm, 1 miss, 2 correct rejections.
    scores = metric.compute(predictions=answers, references=labels)
    assert scores == pytest.approx(dict(accuracy=4 / 6, precision=2 / 3, recall=2 / 3, f1=2 / 3, yes_ratio=1 / 2))


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        ([0, 0], [1, 0], dict(accuracy=0.5, precision=0, recall=0, f1=0, yes_ratio=0)),
        ([1, 0], [0, 0], dict(accuracy=0.5, precision=0, recall=0, f1=0, yes_ratio=0.5)),
        ([0], [0], dict(accuracy=1, precision=0, recall=0, f1=0, yes_ratio=0)),
        ([1], [1], dict(accuracy=1, precision=1, recall=1, f1=1, yes_ratio=1)),
    ],
)
def test_quotients_by_zero_are_zero(metric, predictions, references, expected):
    assert metric.compute(predictions=predictions, references=references) == expected


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_against_brute_force(pairs):
    count = {cell: pairs.count(cell) for cell in [(True, True), (True, False), (False, True), (False, False)]}
    hits, alarms, misses = count[True, True], count[True, False], count[False, True]
    scores = Pope(keep_in_memory=True).compute(
        predictions=[int(said) for said, _ in pairs], references=[int(true) for _, true in pairs]
    )
    assert scores["accuracy"] == pytest.approx((hits + count[False, False]) / len(pairs))
    assert scores["yes_ratio"] == pytest.approx((hits + alarms) / len(pairs))
    assert scores["f1"] == pytest.approx(2 * hits / (2 * hits + alarms + misses) if hits else 0)
    assert scores["precision"] * (hits + alarms) == pytest.approx(hits)
    assert scores["recall"] * (hits + misses) == pytest.approx(hits)


@pytest.mark.parametrize("references", [["yes", "no", "no"], [1, 0, 0], [True, False, False]])
@pytest.mark.parametrize("predictions", [["Yes", "Yes.", "no"], [1, 1, 0], [True, True, False]])
def test_texts_and_labels_score_alike(metric, predictions, references):
    scores = metric.compute(predictions=predictions, references=references)
    assert scores == pytest.approx(dict(accuracy=2 / 3, precision=1 / 2, recall=1, f1=2 / 3, yes_ratio=2 / 3))


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["Yes", "No"], ["yes", "maybe"], r"references\[1\] is 'maybe'; allowed: 'yes', 'no', 1, 0"),
        ([1, 2], [1, 0], r"predictions\[1\] is 2; allowed: text, 1, 0"),
        ([0.7, 0.2], [1, 0], r"predictions\[0\] is 0.7; allowed"),
        (["Yes", None], [1, 0], r"predictions\[1\] is None; allowed"),
        (["Yes", "No"], ["yes", ["no"]], r"references\[1\] is \['no'\]; allowed"),
        (["Yes"], ["yes", "no"], "Mismatch"),
        ([], [], "nothing to score"),
    ],
)
def test_refuses(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        Pope(keep_in_memory=True).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("convert", [np.array, torch.tensor, lambda x: np.array(x, bool)])
def test_arrays_are_labels(metric, convert):
    rows = {"predictions": convert([1, 1, 0]), "references": convert([1, 0, 0])}
    assert metric.compute(**rows) == metric.compute(predictions=[1, 1, 0], references=[1, 0, 0])


def test_text_and_labels_mix(metric):
    """A label after text is not the text of a number, and text after a label is no number."""
    said, true = ["Yes", 0, False, "No way", 1], [1, "no", "yes", 0, "yes"]
    scores = metric.compute(predictions=said, references=true)
    assert scores == metric.compute(predictions=[1, 0, 0, 0, 1], references=[1, 0, 1, 0, 1])
    for prediction, reference in zip(said, true, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == scores
    metric.add_batch(predictions=said[:1], references=true[:1])
    metric.add_batch(predictions=said[1:], references=true[1:])
    assert metric.compute() == scores


def test_describes_itself(metric):
    kinds = {tuple(column.dtype for column in features.values()) for features in metric.features}
    assert kinds == {(p, r) for p in ("string", "int64") for r in ("string", "int64")}
    assert all(set(features) == {"predictions", "references"} for features in metric.features)
    assert metric.license and metric.citation and metric.homepage
    scores = metric.compute(predictions=["Yes"], references=["yes"])
    assert all(name in metric.inputs_description for name in scores)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in scores)


def test_loads_from_its_folder(tmp_path, monkeypatch, metric):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = evaluate.load(str(FOLDER), cache_dir=str(tmp_path), keep_in_memory=True)
    rows = {"predictions": ["Yes", "No", "No", "Yes"], "references": ["yes", "yes", "no", "no"]}
    assert type(loaded) is not Pope
    assert loaded.compute(**rows) == metric.compute(**rows)


def test_one_import_a_line():
    imports = [line for line in inspect.getsource(module).splitlines() if re.match(r"(import|from) ", line)]
    assert imports
    assert all("," not in line for line in imports)
