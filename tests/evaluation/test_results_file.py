"""Reading results files: those of earlier versions too, and nothing that is damaged."""

from __future__ import annotations

import re

import pytest
from results import RUNS, earlier_version, make_results, write

from llava_sparse.evaluation.report import report
from llava_sparse.evaluation.results import read_results, results_files


def damage(results: dict, *path: object, value: object = None) -> None:
    for key in path[:-1]:
        results = results[key]
    if value is None:
        del results[path[-1]]
    else:
        results[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("settings",), None, "no results of `llava-sparse pope`"),
        (("questions",), None, "the file has no 'questions'"),
        (("methods",), [], "one run with one answer at least is needed"),
        (("methods",), "many", "methods is 'many'; a list is allowed"),
        (
            ("methods", 1, "scores", "average", "accuracy"),
            "abc",
            "methods[1].scores.average.accuracy is 'abc'; a number",
        ),
        (("methods", 0, "scores", "pooled", "f1"), float("nan"), "methods[0].scores.pooled.f1 is nan"),
        (("methods", 0, "scores", "pooled", "f1"), 1.5, "a number from 0 to 1 is allowed"),
        (("methods", 0, "scores", "unique", "intervals", "f1"), [0.5], "a list of two numbers is allowed"),
        (("methods", 0, "answers", 3, "label"), "maybe", "methods[0].answers[3].label is 'maybe'; 'yes' or 'no'"),
        (
            ("methods", 1, "answers", 3, "image"),
            "other.jpg",
            "methods[1].answers are not to the questions of methods[0]",
        ),
        (("methods", 1, "answers", 3, "score"), None, "some have a score, some do not"),
        (("methods", 1, "answers", 3, "answer"), None, "methods[1].answers[3] has no 'answer'"),
        (("methods", 1, "answers"), None, "methods[1] has no 'answers'"),
        (("methods", 1, "answers", 3, "score"), "1", "methods[1].answers[3].score is '1'; a number is allowed"),
        (("methods", 1, "visual_tokens"), float("nan"), "methods[1].visual_tokens is nan; a number from 0 or null"),
        (("methods", 1), 7, "methods[1] is 7; an object is allowed"),
        (("questions", "splits"), [1], "questions.splits is [1]; an object is allowed"),
        (("methods", 1, "budget"), 1.5, "methods[1].budget is 1.5; a whole number, a ratio or null is allowed"),
        (("methods", 1, "budget"), 0.0, "methods[1].budget is 0.0; a whole number, a ratio or null is allowed"),
        (("methods", 1, "budget"), "4", "methods[1].budget is '4'; a whole number, a ratio or null is allowed"),
        (("methods", 1, "budget"), True, "methods[1].budget is True; a whole number, a ratio or null is allowed"),
        (("methods", 2, "name"), "dense", "two runs have the same name"),
        (("methods", 2, "name"), "\ud800", "methods[2].name"),
        (("comparisons", 0, "p"), None, "comparisons[0] has no 'p'"),
        (("settings", "dataset"), 3, "settings.dataset is 3; text is allowed"),
    ],
)
def test_damaged_results_are_refused(tmp_path, path, value, message):
    results, _ = make_results()
    damage(results, *path, value=value)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_results(write(tmp_path, results))
    assert str(tmp_path / "run.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    text = write(tmp_path, make_results()[0]).read_text().replace('"settings":', '"settings": {}, "settings":', 1)
    (tmp_path / "twice.json").write_text(text)
    with pytest.raises(ValueError, match="the key 'settings' is there twice"):
        read_results(tmp_path / "twice.json")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"not json", b"[" * 100_000, b"3", b"{}"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"results of `llava-sparse pope`"):
        read_results(tmp_path / "file.json")


def test_earlier_results_get_names(tmp_path):
    results, _ = make_results()
    names = [entry["name"] for entry in read_results(write(tmp_path, earlier_version(results)))["methods"]]
    assert names == list(RUNS)


def test_budgets_may_be_ratios(tmp_path):
    results, _ = make_results()
    for entry in results["methods"][1:]:
        entry["budget"] = 0.25
        entry["name"] = entry["name"].replace("@4", "@0.25")
    names = [entry["name"] for entry in results["methods"]]
    assert [entry["name"] for entry in read_results(write(tmp_path, results))["methods"]] == names
    old = read_results(write(tmp_path, earlier_version(results)))
    assert [entry["name"] for entry in old["methods"]] == names


def test_folders_and_several_files(tmp_path):
    results, log = make_results()
    first, second = write(tmp_path, results, log), write(tmp_path, results, name="another.json")
    (tmp_path / "run.timing.json").write_text("{}")
    assert results_files([tmp_path]) == [second, first]
    report([tmp_path], markdown=tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.index("## another.json") < text.index("## run.json")
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([first, first], "more than once"),
        ([tmp_path / "empty"], "no results"),
        (["x"], "no such"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            results_files(paths)
