"""Another task than POPE: questions with any answer, from a file of its own, with the evaluation as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from llava_sparse.evaluation import LoadedModel, Task, evaluate, read_results, register_task, table
from llava_sparse.evaluation.files import json_lines, refuse
from llava_sparse.evaluation.report import report
from llava_sparse.evaluation.run import Settings
from llava_sparse.evaluation.tasks import TASKS, get_task
from llava_sparse.evaluation.tasks.questions import Questions, ReportOnce
from llava_sparse.evaluation.tasks.sources import Files


@pytest.fixture
def counting():
    @register_task
    class Counting(Task):
        """How many? The first number of an answer counts."""

        name = "counting"
        title = "Counting"
        labels = ("one", "two", "three")
        max_new_tokens = 4

        def load(self, source, limit, *, on_bad, **subset):
            keys = {"question_id": "id", "image_source": "image", "image": "image", "question": "q", "answer": "a"}
            files = Files({"all": Path(source) / "counting.jsonl"}, keys, Path(source).resolve(), ["all"])
            report = refuse if on_bad is None else ReportOnce(on_bad)
            questions = Questions(files, ["all"], self.labels, report)
            if limit is not None:
                questions.choose(questions.labels(), None, limit)
            return questions.load(streaming=False)

        def parse(self, text, label):
            return next((word for word in text.lower().split() if word in self.labels), "three")

    yield Counting
    del TASKS["counting"]


@pytest.fixture
def folder(tmp_path) -> Path:
    with (tmp_path / "counting.jsonl").open("w") as file:
        for n in range(4):
            tiny.image(n).save(tmp_path / f"{n}.png")
            for m, answer in enumerate(("two", "one")):
                row = {"id": 2 * n + m, "image": f"{n}.png", "q": f"What is {('left', 'right')[m]}", "a": answer}
                file.write(json.dumps(row) + "\n")
    return tmp_path


def test_another_task_goes_all_the_way(counting, folder, dense, processor):
    loaded = LoadedModel(dense, processor, "tiny", False)
    settings = Settings(loaded, folder, ["dense", "visionzip"], 5, task="counting", output=folder / "run.json")
    results = evaluate(settings)
    assert results.settings["task"] == "counting" and results.settings["max_new_tokens"] == 4
    assert results.settings["prompt"] == "USER: <image> {question} ASSISTANT:", "the model's chat template"
    entry = results.methods[1]
    right = [answer["parsed"] == answer["label"] for answer in entry.answers]
    assert entry.average == {"accuracy": sum(right) / 8} and entry.scores["unique"]["intervals"].keys() == {"accuracy"}
    assert results.comparisons[0].pairs == 8
    assert read_results(folder / "run.json").written == results.written
    assert str(table(results).title).startswith("Counting, ")
    report([folder / "run.json"], folder / "report.html", folder / "report.md", images=folder)
    assert "Precision" not in (folder / "report.md").read_text().split("### Precision")[0]
    assert len(evaluate(Settings(loaded, folder, ["dense"], task="counting", limit=3)).methods[0].answers) == 3


def test_what_a_task_refuses(counting, folder, dense, processor):
    loaded = LoadedModel(dense, processor, "tiny", False)
    with pytest.raises(ValueError, match=r"task 'countin' is unknown \(did you mean 'counting'\?\); allowed: .*pope"):
        get_task("countin")
    with pytest.raises(ValueError, match="the task counting has no choices; text is allowed"):
        Settings(loaded, folder, task="counting", answer_mode="logits")
    with (folder / "counting.jsonl").open("a") as file:
        file.write(json.dumps({"id": 9, "image": "0.png", "q": "?", "a": "many"}))
    with pytest.raises(ValueError, match=r"counting.jsonl, row 9: label 'many' is neither of the allowed 'one' and"):
        evaluate(Settings(loaded, folder, ["dense"], task="counting"))
    assert len(list(json_lines(folder / "counting.jsonl"))) == 9
    with pytest.raises(ValueError, match="is there already"):

        @register_task
        class Other(Task):
            name = "counting"

            def load(self, source, limit, *, on_bad, **subset): ...

            def parse(self, text, label): ...
