"""The POPE evaluation, on the embedded reference model."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import llava_sparse
from llava_sparse.evaluation import (
    LoadedModel,
    answer_questions,
    ask,
    evaluate_pope,
    load_model,
    load_pope,
    mean_visual_tokens,
    runner,
    score,
    table,
)
from llava_sparse.evaluation.models import read_picture
from llava_sparse.reference import CHECKPOINT

METHODS = ["dense", "visionzip", "sparsevlm"]


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model(dtype="float32")


@pytest.fixture(scope="module")
def results(reference, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("results") / "results.json"
    returned = evaluate_pope(reference, methods=METHODS, budget=64, limit=8, batch_size=5, output=output)
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written == returned
    assert [file.name for file in output.parent.iterdir()] == ["results.json"]
    return written


def test_settings_and_versions(results):
    assert results["settings"] == {
        "model": "reference",
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "attn_implementation": "sdpa",
        "dataset": "reference",
        "methods": METHODS,
        "budget": 64,
        "limit": 8,
        "batch_size": 5,
        "prompt": "USER: <image>\n{question} ASSISTANT:",
        "max_new_tokens": 16,
    }
    assert results["versions"]["llava_sparse"] == llava_sparse.__version__
    assert {"python", "torch", "transformers", "platform"} <= results["versions"].keys()


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


def test_answers_do_not_depend_on_batches_or_order(reference):
    dataset = load_pope(limit=4)
    prompt = reference.prompt(short_answer=True)
    alone = [ask(reference.model, reference.processor, row["image"], row["question"], prompt) for row in dataset]
    assert set(alone) == {"Yes", "No"}
    shuffled = dataset.shuffle(seed=1)
    expected = dict(zip(zip(dataset["image_source"], dataset["question"], strict=True), alone, strict=True))
    for batch_size in (1, 3, 50):
        answers = answer_questions(reference.model, reference.processor, shuffled, prompt, batch_size)
        assert answers.texts == [expected[row["image_source"], row["question"]] for row in shuffled]


def test_progress_and_preprocessing_once_a_picture(reference, monkeypatch):
    dataset = load_pope(limit=6)
    encoded, steps = [], []
    encode = runner._encode
    monkeypatch.setattr(runner, "_encode", lambda *a: encoded.append(1) or encode(*a))
    answers = answer_questions(
        reference.model, reference.processor, dataset, reference.prompt(True), 2, lambda *step: steps.append(step)
    )
    assert len(encoded) == len(set(dataset["image_source"]))
    assert steps[-1] == (answers.distinct, answers.distinct)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})


def test_finished_methods_survive_a_failure(reference, tmp_path, monkeypatch):
    answer = runner.answer_questions

    def fail_when_pruned(model, *args):
        if getattr(model.model, "sparsifier", None) is not None:
            raise RuntimeError("out of memory")
        return answer(model, *args)

    monkeypatch.setattr(runner, "answer_questions", fail_when_pruned)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_pope(reference, methods=METHODS, limit=2, output=tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    assert [entry["method"] for entry in written["methods"]] == ["dense"]
    assert len(written["methods"][0]["answers"]) == 6


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"methods": ["dense", "vizionzip"]}, ValueError, r"did you mean 'visionzip'\?\); allowed: dense, "),
        ({"methods": ["dense", "dense"]}, ValueError, "at most once"),
        ({"methods": []}, ValueError, "one at least"),
        ({"methods": ["visionzip"], "budget": 577}, ValueError, "sparse_budget=577: an integer from 1 to 576"),
        ({"output": "/no/such/folder/results.json"}, OSError, "a file in a folder that exists"),
        ({"dataset": "/no/such/folder"}, FileNotFoundError, "no such folder"),
    ],
)
def test_refused_before_anything_is_asked(reference, monkeypatch, settings, error, message):
    monkeypatch.setattr(runner, "answer_questions", lambda *a: pytest.fail("asked"))
    with pytest.raises(error, match=message):
        evaluate_pope(reference, **{"limit": 1, **settings})


def test_batch_size_below_one(reference):
    with pytest.raises(ValueError, match="batch_size=0: a positive number is allowed"):
        evaluate_pope(reference, limit=1, batch_size=0)


def test_undecodable_picture_names_the_question(reference):
    dataset = load_pope(limit=2)
    rows = dataset.remove_columns("image").to_list()
    broken = type(dataset).from_list(
        [{**row, "image": {"path": None, "bytes": b"?"}} for row in rows], dataset.features
    )
    with pytest.raises(ValueError, match=r"question \d+: image 'scene_000000.jpg' cannot be decoded"):
        answer_questions(reference.model, reference.processor, broken, reference.prompt(True))


def test_score_of_known_answers():
    dataset = load_pope(limit=4)
    always_yes = score(dataset, ["Yes"] * 12)["average"]
    assert always_yes == pytest.approx(dict(accuracy=0.5, precision=0.5, recall=1, f1=2 / 3, yes_ratio=1))
    right = score(dataset, [answer.capitalize() for answer in dataset["answer"]])
    assert right["average"] == pytest.approx(dict(accuracy=1, precision=1, recall=1, f1=1, yes_ratio=0.5))
    assert Counter(row["split"] for row in right["answers"]) == {"random": 4, "popular": 4, "adversarial": 4}


@pytest.mark.parametrize("case", [c for c in tiny.CASES if c.lengths], ids=lambda case: case.name)
def test_mean_visual_tokens(case, dense, processor):
    inputs = tiny.inputs(processor, tiny.QUESTIONS)
    assert mean_visual_tokens(dense, inputs) == tiny.PATCHES
    model = llava_sparse.sparsify(dense, case.method, **case.settings)
    after_each_layer = [*case.lengths[1:], case.lengths[-1]]
    if model.model.sparsifier.layers[-1] < tiny.LAYERS - 1:
        assert mean_visual_tokens(model, inputs) == pytest.approx(sum(after_each_layer) / tiny.LAYERS)


def test_prompt_for_models_that_know_the_words(reference):
    assert not reference.knows_short_answer
    llava = LoadedModel(reference.model, reference.processor, "llava", knows_short_answer=True)
    assert llava.prompt(short_answer=True) == (
        "USER: <image>\n{question}\nAnswer the question using a single word or phrase. ASSISTANT:"
    )
    assert llava.prompt(short_answer=False) == "USER: <image>\n{question} ASSISTANT:"


def test_dtype():
    model = load_model(dtype="auto").model
    assert model.dtype in (torch.bfloat16, torch.float32)
    assert not model.training


def test_pruned_checkpoint_is_evaluated_dense_too(tmp_path, reference):
    pruned = llava_sparse.sparsify(reference.model, "visionzip", budget=32)
    pruned.save_pretrained(tmp_path)
    llava_sparse.SparseLlavaProcessor.from_pretrained(
        CHECKPOINT, sparse_method="visionzip", sparse_budget=32
    ).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float32")
    ours, stock = (
        evaluate_pope(model, methods=["dense", "visionzip"], budget=64, limit=2) for model in (loaded, reference)
    )
    assert [e["visual_tokens"] for e in ours["methods"]] == [576, 64]
    for one, other in zip(ours["methods"], stock["methods"], strict=True):
        assert one["answers"] == other["answers"]


@pytest.fixture
def copy(tmp_path):
    """A checkpoint folder that may be spoiled."""
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_other_models_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llava_next"}))
    with pytest.raises(ValueError, match="model_type 'llava_next' is no LLaVA; allowed: llava, sparse_llava"):
        load_model(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(f"{copy}: config.json cannot be read")):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json in it"):
        load_model(copy)


def test_missing_weights_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    del weights[next(name for name in weights if "lm_head" in name)]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, lm_head\.weight among them"):
        load_model(copy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "no-such-folder"}, FileNotFoundError, "no such model folder, and no Hub id"),
        ({"name": "owner/name"}, OSError, r"cannot be loaded from the Hub: is there a network\?"),
        ({"dtype": "bf16"}, ValueError, r"did you mean 'bfloat16'\?"),
        ({"device": "tpu9"}, ValueError, "device 'tpu9' is not available"),
    ],
)
def test_refused_loading(arguments, error, message):
    with pytest.raises(error, match=message):
        load_model(**arguments)


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    picture = read_picture(tmp_path / "turned.jpg")
    assert (picture.size, picture.mode) == ((10, 20), "RGB")
