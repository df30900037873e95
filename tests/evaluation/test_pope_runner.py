"""The POPE evaluation, on the embedded reference model."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import tiny
import torch
from PIL import Image

import llava_sparse
from llava_sparse.evaluation import (
    Asker,
    LoadedModel,
    ask,
    evaluate_pope,
    load_model,
    load_pope,
    plan_runs,
    score,
    table,
)
from llava_sparse.evaluation.answer import MAX_NEW_TOKENS
from llava_sparse.evaluation.answer_log import AnswerLog
from llava_sparse.evaluation.results import read_results
from llava_sparse.evaluation.statistics import unpack_kept
from llava_sparse.evaluation.units import Pictures
from llava_sparse.reference import CHECKPOINT

METHODS = ["dense", "visionzip", "sparsevlm"]
RUNS = ["dense", "visionzip@64", "sparsevlm@64"]
BUDGET = re.escape(
    "`sparse_budget` must be an int in [1, 576], the visual tokens of one image, or a float in (0, 1], a ratio of them"
)


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model(dtype="float32")


@pytest.fixture(scope="module")
def results(reference, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("results") / "results.json"
    returned = evaluate_pope(reference, methods=METHODS, budget=64, limit=8, batch_size=5, output=output)
    written = json.loads(output.read_text(encoding="utf-8"))
    timing = json.loads((output.parent / "results.timing.json").read_text())
    assert {**written, "timing": timing} == returned
    assert returned.methods[0].average["accuracy"] == returned["methods"][0]["average"]["accuracy"]
    names = sorted(file.name for file in output.parent.iterdir())
    assert names == ["results.answers.jsonl", "results.json", "results.timing.json"]
    return {**written, "log": (output.parent / names[0]).read_text(encoding="utf-8"), "timing": timing}


@pytest.fixture
def results_log(results) -> list[dict]:
    return [json.loads(line) for line in results["log"].splitlines()]


def test_settings_and_versions(results):
    assert results["settings"] == {
        "model": "reference",
        "dtype": "float32",
        "device": "cpu",
        "attn_implementation": "sdpa",
        "weights_sha256": results["settings"]["weights_sha256"],
        "configuration_sha256": results["settings"]["configuration_sha256"],
        "preprocessing": json.loads((CHECKPOINT / "processor_config.json").read_text())["image_processor"],
        "task": "pope",
        "dataset": "reference",
        "pictures_sha256": results["settings"]["pictures_sha256"],
        "questions_sha256": results["settings"]["questions_sha256"],
        "methods": METHODS,
        "budgets": [64],
        "seeds": [0],
        "limit": 8,
        "batch_size": 5,
        "prompt": "USER: <image>\n{question} ASSISTANT:",
        "answer_mode": "text",
        "grouped": True,
        "max_new_tokens": 16,
    }
    assert results["versions"]["llava_sparse"] == llava_sparse.__version__
    assert {"python", "torch", "transformers", "platform"} <= results["versions"].keys()
    assert results["timing"]["threads"] == torch.get_num_threads()
    for name in RUNS:
        timing = results["timing"]["runs"][name]
        assert timing["questions"] == results["questions"]["asked"]
        assert timing["questions_per_second"] == pytest.approx(timing["questions"] / timing["seconds"])


def test_every_question_is_scored_and_each_pair_asked_once(results):
    questions = results["questions"]
    assert questions["splits"] == {"random": 8, "popular": 8, "adversarial": 8}
    assert questions["scored"] == 24
    assert "asked once" in questions["note"]
    for entry in results["methods"]:
        answers = entry["answers"]
        assert len(answers) == 24
        assert len({(a["image"], a["question"]) for a in answers}) == questions["asked"] < 24
        assert {split: scores["questions"] for split, scores in entry["splits"].items()} == questions["splits"]
        for split, scores in entry["splits"].items():
            rows = [a for a in answers if a["split"] == split]
            assert scores["accuracy"] == sum(a["parsed"] == a["label"] for a in rows) / 8


@pytest.mark.slow
def test_a_ratio_is_the_number_of_tokens_it_comes_to(reference, tmp_path):
    """As `budget`, in names, results file and log; again from its file, the same bytes."""
    methods, output = ["dense", "visionzip", "sparsevlm", "divprune+sparsevlm", "random"], tmp_path / "ratio.json"
    settings = {"methods": methods, "limit": 3, "batch_size": 5}
    ratio = evaluate_pope(reference, budget=1 / 9, **settings, output=output)
    count = evaluate_pope(reference, budget=64, **settings)
    names = ["dense", *(f"{method}@{1 / 9}" for method in methods[1:4]), f"random@{1 / 9}#0"]
    assert [entry["name"] for entry in ratio["methods"]] == names
    assert [entry["budget"] for entry in ratio["methods"]] == [None, *[1 / 9] * 4]
    assert ratio["settings"]["budgets"] == [1 / 9]
    for one, other in zip(ratio["methods"], count["methods"], strict=True):
        for key in ("answers", "scores", "layers", "budgets", "options", "visual_tokens"):
            assert one[key] == other[key], key
    assert ratio["methods"][1]["budgets"] == [54, 10]
    shown = table(ratio)
    assert str(list(shown.columns[1].cells)[4]) == str(1 / 9)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    evaluate_pope(reference, budget=[1 / 9], **settings, output=output)
    assert read_results(output)["methods"] == ratio["methods"]
    for name in ("ratio.json", "ratio.answers.jsonl"):
        assert (tmp_path / name).read_bytes() == files[name]
    with pytest.raises(ValueError, match=r"was begun with budgets=\[0\.1111111111111111\], now it is \[0\.25\]"):
        evaluate_pope(reference, budget=0.25, **settings, output=output)


def test_averages_over_splits(results):
    for entry in results["methods"]:
        for name, value in entry["average"].items():
            assert value == pytest.approx(sum(split[name] for split in entry["splits"].values()) / 3)
        assert entry["average"]["accuracy"] > 0.75


def test_methods_are_described_as_they_ran(results):
    dense, visionzip, sparsevlm = results["methods"]
    assert (dense["method"], dense["budget"], dense["visual_tokens"]) == ("dense", None, 576)
    assert (visionzip["kind"], visionzip["budget"], visionzip["visual_tokens"]) == ("encoder", 64, 64)
    assert visionzip["budgets"] == [54, 10]
    assert (sparsevlm["kind"], sparsevlm["layers"], sparsevlm["budgets"]) == ("decoder", [1, 3, 5], [66, 30, 17])
    # 576, then 66 + 16 merged, then 30 + 2, then 17 + 1, after each of 8 layers.
    assert sparsevlm["visual_tokens"] == pytest.approx((576 + 2 * 82 + 2 * 32 + 3 * 18) / 8, abs=0.5)


def test_table_has_a_row_for_each_split_and_the_average(results):
    shown = table(results)
    assert shown.row_count == 3 * 4
    assert [str(column.header) for column in shown.columns][4:9] == [
        "accuracy",
        "precision",
        "recall",
        "F1",
        "yes ratio",
    ]
    assert f"{results['questions']['asked']} distinct" in str(shown.caption)


def test_answers_are_those_of_generate_whatever_the_batches(reference):
    dataset = load_pope(limit=4)
    prompt = reference.prompt(short_answer=True)
    alone = [ask(reference.model, reference.processor, row["image"], row["question"], prompt) for row in dataset]
    assert set(alone) == {"Yes", "No"}
    for batch_size in (1, 3, 50):
        (entry,) = evaluate_pope(reference, methods=["dense"], limit=4, batch_size=batch_size)["methods"]
        assert [answer["answer"] for answer in entry["answers"]] == alone


CROSSED = ["dense", "visionzip", "sparsevlm", "sparsevlm:version=2.0"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["text", "logits"])
def test_grouping_changes_no_prediction(reference, mode):
    grouped, alone = (
        evaluate_pope(reference, methods=CROSSED, limit=10, answer_mode=mode, grouped=grouped, batch_size=7)
        for grouped in (True, False)
    )
    for one, other in zip(grouped["methods"], alone["methods"], strict=True):
        assert [a["parsed"] for a in one["answers"]] == [a["parsed"] for a in other["answers"]]
        if mode == "logits":
            scores = [[a["score"] for a in entry["answers"]] for entry in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=2e-3)
            assert {a["answer"] for a in one["answers"]} == {"Yes", "No"}
            assert all((a["score"] > 0) == (a["parsed"] == "yes") for a in one["answers"])
        assert one["visual_tokens"] == other["visual_tokens"] or other["visual_tokens"] is None


@pytest.mark.slow
def test_longer_answers_are_those_of_generate(reference):
    """Captions of several words, which end at different lengths, behind a shared prefix and not."""
    prompt = "USER: <image>\n{question} ASSISTANT:"
    rows = load_pope(limit=8).select(range(8))
    pictures = list({row["image_source"]: row["image"].convert("RGB") for row in rows}.values())
    owners = [number for number in range(len(pictures)) for _ in range(2)]
    questions = ["What is in the image?", "Is there a dog in the image?"] * len(pictures)
    for run in plan_runs(["dense", "visionzip", "sparsevlm"], [64]):
        model = reference.with_run(run)
        asker = Asker(model, reference.processor, prompt)
        said = asker.answer(asker.pixels(pictures), owners, questions, batch_size=5)
        expected = [
            ask(model, reference.processor, pictures[owner], question, prompt, MAX_NEW_TOKENS)
            for owner, question in zip(owners, questions, strict=True)
        ]
        assert [answer.text for answer in said] == expected
        assert len({len(text) for text in expected}) > 2


def test_every_method_grouped_and_not(case, dense, processor):
    """Random weights and prompts of different lengths."""
    model = llava_sparse.sparsify(dense, case.method, **case.settings)
    questions = ["is it red", "what is there now", "is it"]
    grouped, alone = (
        Asker(model, processor, "<image> {question}", grouped=grouped).answer(
            torch.cat([tiny.inputs(processor, tiny.QUESTIONS)["pixel_values"][:2]]), [0, 1, 1], questions, 2
        )
        for grouped in (True, False)
    )
    assert [answer.text for answer in grouped] == [answer.text for answer in alone]
    method = model.model.sparsifier
    stages = int(method.encoder is not None) + (0 if method.decoder is None else len(method.decoder.layers))
    assert all(len(answer.kept) == stages for answer in grouped)


def test_kept_patches_and_tokens_are_recorded(results_log):
    header, *lines = results_log
    assert header["format"] == "llava-sparse answers 2"
    kept = {name: [len(line["kept"]) for line in lines if line["run"] == name] for name in RUNS}
    assert [set(counts) for counts in kept.values()] == [{0}, {1}, {3}]
    for line in lines:
        sizes = [int(unpack_kept(mask, 576).sum()) for mask in line["kept"]]
        most = {"dense": [], "visionzip@64": [53], "sparsevlm@64": [66, 30, 17]}[line["run"]]
        # Later stages of SparseVLM may keep merged tokens too, which are no patches.
        assert sizes[:1] == most[:1]
        assert all(few <= many for few, many in zip(sizes, most, strict=True))


def test_each_picture_is_preprocessed_once_a_run(reference, monkeypatch):
    seen, rgb = [], Pictures._rgb
    monkeypatch.setattr(Pictures, "_rgb", lambda self, name: seen.append(name) or rgb(self, name))
    steps = []
    evaluate_pope(reference, methods=["dense"], limit=6, on_progress=lambda *step: steps.append(step))
    assert len(seen) == len(set(seen)) == len(set(load_pope(limit=6)["image_source"]))
    assert steps[0][1] == 0 and steps[-1][1] == steps[-1][2]
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})


def test_finished_answers_survive_a_failure(reference, tmp_path, monkeypatch):
    answer = Asker.answer

    def fail_when_pruned(self, *args):
        if getattr(self.model.model, "sparsifier", None) is not None:
            raise ValueError("broken")
        return answer(self, *args)

    output = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        patch.setattr(Asker, "answer", fail_when_pruned)
        with pytest.raises(ValueError, match="broken"):
            evaluate_pope(reference, methods=METHODS, limit=2, output=output)
    written = json.loads(output.read_text())
    assert [entry["method"] for entry in written["methods"]] == ["dense"]
    assert len(written["methods"][0]["answers"]) == 6
    evaluate_pope(reference, methods=METHODS, limit=2, output=output)
    evaluate_pope(reference, methods=METHODS, limit=2, output=tmp_path / "whole.json")
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_log_cut_anywhere_is_continued_to_the_same_results(reference, tmp_path):
    settings = {"methods": ["dense", "visionzip"], "limit": 4, "batch_size": 3}
    output = tmp_path / "run.json"
    evaluate_pope(reference, **settings, output=output)
    log = tmp_path / "run.answers.jsonl"
    whole, results = log.read_bytes(), output.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1)
    for cut in (0, 5, whole.index(b"\n") + 1, second - 3, second + 1, len(whole) * 2 // 3, len(whole) - 1, len(whole)):
        log.write_bytes(whole[:cut])
        output.unlink(missing_ok=True)
        evaluate_pope(reference, **settings, output=output)
        assert (log.read_bytes(), output.read_bytes()) == (whole, results), cut


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 4}, "was begun with batch_size=3, now it is 4"),
        ({"budget": 32}, r"was begun with budgets=\[64\], now it is \[32\]"),
        ({"methods": ["dense"]}, "was begun with methods="),
        ({"limit": 3}, "was begun with limit=2, now it is 3"),
        ({"answer_mode": "logits"}, "was begun with answer_mode='text'"),
        ({"prompt": "<image> {question}"}, "was begun with prompt="),
    ],
)
def test_a_changed_setting_is_refused(reference, tmp_path, changed, message):
    settings = {"methods": ["visionzip"], "limit": 2, "batch_size": 3, "output": tmp_path / "run.json"}
    evaluate_pope(reference, **settings)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        evaluate_pope(reference, **{**settings, **changed})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_two_evaluations_do_not_write_one_log(reference, tmp_path):
    with_lock = AnswerLog(tmp_path / "run.answers.jsonl", {}, {})
    try:
        with pytest.raises(OSError, match="another evaluation is writing it"):
            evaluate_pope(reference, methods=["dense"], limit=1, output=tmp_path / "run.json")
    finally:
        with_lock.close()


def test_foreign_files_are_not_taken_for_logs(reference, tmp_path):
    log = tmp_path / "run.answers.jsonl"
    for text in ("my notes\n", "[]\n", '{"format": "other"}\n'):
        log.write_text(text)
        with pytest.raises(ValueError, match="log of answers"):
            evaluate_pope(reference, methods=["dense"], limit=1, output=tmp_path / "run.json")
        assert log.read_text() == text


def test_out_of_memory_halves_the_batch(reference, monkeypatch):
    answer, sizes, notices = Asker.answer, [], []

    def small_memory(self, pixels, owners, questions, batch_size):
        sizes.append(batch_size)
        if batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer(self, pixels, owners, questions, batch_size)

    monkeypatch.setattr(Asker, "answer", small_memory)
    halved = evaluate_pope(reference, methods=["dense"], limit=4, batch_size=12, on_notice=notices.append)
    assert sizes[:3] == [12, 6, 3] and set(sizes[2:]) == {3}
    assert notices == [f"out of memory: going on with {n} questions at a time" for n in (6, 3)]
    monkeypatch.undo()
    whole = evaluate_pope(reference, methods=["dense"], limit=4, batch_size=12)
    assert halved["methods"] == whole["methods"]
    monkeypatch.setattr(
        Asker, "answer", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(torch.OutOfMemoryError):
        evaluate_pope(reference, methods=["dense"], limit=1, batch_size=2)


def test_streamed_questions_give_the_same_answers(reference):
    streamed, whole = (
        evaluate_pope(reference, methods=["visionzip"], subset={"split": "popular", **extra}, limit=6)
        for extra in ({"streaming": True}, {})
    )
    assert streamed["methods"][0]["answers"] == whole["methods"][0]["answers"]


def test_skipped_rows_show_in_the_results(reference, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "images" / "a.png")
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": image, "text": f"Is there a {n} in the image?", "label": label}
            for n, (image, label) in enumerate([("a.png", "yes"), ("b.png", "no"), ("a.png", "maybe")])
        ]
        (tmp_path / f"x_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="row 2"):
        evaluate_pope(reference, tmp_path, methods=["dense"])
    questions = evaluate_pope(reference, tmp_path, methods=["dense"], skip_bad=True)["questions"]
    assert len(questions["skipped"]) == 6
    assert questions["scored"] == 3
    assert "b.png" in questions["skipped"][0] and "row 2" in questions["skipped"][0]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"methods": ["dense", "vizionzip"]}, ValueError, r"did you mean 'visionzip'\?\); allowed: dense, "),
        ({"methods": ["dense", "dense"]}, ValueError, "at most once"),
        ({"methods": []}, ValueError, "one at least"),
        ({"methods": ["visionzip:dominnat=1"]}, ValueError, "is no option"),
        ({"budget": []}, ValueError, "one at least"),
        ({"answer_mode": "logit"}, ValueError, "allowed: text, logits, likelihood"),
        ({"prompt": "<image>"}, ValueError, "{question} has to be in it once; it is there 0 times"),
        ({"methods": ["visionzip"], "budget": 577}, ValueError, f"{BUDGET}, got 577\\."),
        ({"methods": ["visionzip"], "budget": 1.01}, ValueError, f"{BUDGET}, got 1\\.01"),
        ({"methods": ["visionzip"], "budget": [0.5, 0.0]}, ValueError, f"{BUDGET}, got 0\\.0"),
        ({"output": "/no/such/folder/results.json"}, OSError, "a file in a folder that exists"),
        ({"dataset": "/no/such/folder"}, FileNotFoundError, "no such folder"),
    ],
)
def test_refused_before_anything_is_asked(reference, monkeypatch, settings, error, message):
    monkeypatch.setattr(Asker, "answer", lambda *a: pytest.fail("asked"))
    with pytest.raises(error, match=message):
        evaluate_pope(reference, **{"limit": 1, **settings})


def test_batch_size_below_one(reference):
    with pytest.raises(ValueError, match="batch_size=0: a positive number is allowed"):
        evaluate_pope(reference, limit=1, batch_size=0)


def test_score_of_known_answers():
    rows = load_pope(limit=4).remove_columns("image").to_list()
    always_yes = score(rows, ["Yes"] * 12)["average"]
    assert always_yes == pytest.approx(dict(accuracy=0.5, precision=0.5, recall=1, f1=2 / 3, yes_ratio=1))
    right = score(rows, [row["answer"].capitalize() for row in rows])
    assert right["average"] == pytest.approx(dict(accuracy=1, precision=1, recall=1, f1=1, yes_ratio=0.5))
    assert Counter(row["split"] for row in right["answers"]) == {"random": 4, "popular": 4, "adversarial": 4}


def test_mean_visual_tokens(case, dense, processor):
    if not case.lengths:
        pytest.skip("this method decides at run time")
    pixels = tiny.inputs(processor, tiny.QUESTIONS)["pixel_values"][:1]
    prompt = "<image> {question}"
    assert Asker(dense, processor, prompt).answer(pixels, [0], ["is it"], 1)[0].visual_tokens == tiny.PATCHES
    model = llava_sparse.sparsify(dense, case.method, **case.settings)
    (answer,) = Asker(model, processor, prompt).answer(pixels, [0], ["is it"], 1)
    after_each_layer = [*case.lengths[1:], case.lengths[-1]]
    decoder = model.model.sparsifier.decoder
    if decoder is None or decoder.layers[-1] < tiny.LAYERS - 1:
        assert answer.visual_tokens == pytest.approx(sum(after_each_layer) / tiny.LAYERS)
