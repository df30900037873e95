"""The training of the reference model, on drawn-up scenes: layouts, decoys, resuming, the checkpoint it writes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_sparse.reference import CHECKPOINT, SCENES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

import train_reference  # noqa: E402
from reference import decoder, evaluation, model, training  # noqa: E402
from reference.data import IGNORED, QUESTION_TOKENS, Scenes, render_scenes  # noqa: E402
from reference.scenes import CATEGORIES, GRID, PARTLY, PATCH, SIDE, Assets, _patch_labels  # noqa: E402

COUNT = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes of two rectangles each, in place of rendered ones."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    pictures = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
    labels = np.zeros((COUNT, GRID, GRID), np.uint8)
    for number in range(COUNT):
        for corner, category in zip((2, 14), rng.choice(len(CATEGORIES), 2, replace=False), strict=True):
            place = slice(corner, corner + 6)
            labels[number, place, place] = category + 1
            pixels = slice(PATCH * corner, PATCH * (corner + 6))
            pictures[number, pixels, pixels] = rng.integers(0, 255, 3)
    np.save(folder / "pictures.npy", pictures)
    np.save(folder / "labels.npy", labels)
    (folder / "scenes.done").write_text(f"0 {COUNT}")
    return folder


def text_of(ids: torch.Tensor) -> list[str]:
    return [model.WORDS[i] for i in ids.tolist()]


def test_questions_are_answered_by_what_is_present(folder):
    scenes = Scenes(folder)
    batch = scenes.batch(np.random.default_rng(1), 4, GRID)
    ids, answers, captions = scenes.questions(np.random.default_rng(2), batch.present, 6)
    for row in range(4):
        present = {CATEGORIES[c] for c in np.flatnonzero(batch.present[row] == 1)}
        assert len(present) == 2
        for slot in range(6):
            words = text_of(ids[row, slot * QUESTION_TOKENS : (slot + 1) * QUESTION_TOKENS])
            assert words[:2] == ["Is", "there"] and words[8] == "ASSISTANT:"
            assert words[2] == model.article(words[3])
            assert (words[3] in present) == bool(answers[row, slot]) == (words[9] == "Yes")
        named = [word for word in text_of(captions[row][captions[row] != IGNORED]) if word in CATEGORIES]
        assert named == sorted(present, key=CATEGORIES.index)


def test_crops_know_what_they_show(folder):
    scenes = Scenes(folder)
    batch = scenes.batch(np.random.default_rng(1), 16, 8)
    assert batch.pixels.shape == (16, 3, 8 * PATCH, 8 * PATCH)
    for labels, present in zip(batch.labels.numpy(), batch.present, strict=True):
        seen = {c for c in range(len(CATEGORIES)) if (labels == c + 1).sum() >= 4}
        assert set(np.flatnonzero(present == 1)) == seen
        assert not any((labels == c + 1).any() for c in np.flatnonzero(present == 0))


def test_patches_of_small_and_covered_objects_are_labelled():
    owner = np.full((SIDE, SIDE), -1, np.int16)
    owner[0:20, 0:20] = 0  # A whole patch and slivers of three others.
    owner[100:103, 100:103] = 1  # Less than a quarter of any patch.
    labels = _patch_labels(owner, ["dog", "cat"])
    dog, cat = CATEGORIES.index("dog") + 1, CATEGORIES.index("cat") + 1
    assert labels[0, 0] == labels[0, 1] == dog and labels[1, 1] == PARTLY
    assert (labels == cat).sum() == 1


def test_every_row_gets_its_own_picture_back():
    for seed in range(20):
        shown, back = decoder.decoy_orders(np.random.default_rng(seed), 12)
        assert sorted(shown.tolist()) == list(range(12))
        assert shown.tolist() != list(range(12))
        for layer in range(8):
            if layer in back:
                shown = shown[back[layer]]
        assert shown.tolist() == list(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("decoys", [False, True])
def test_slots_are_answered_as_prompts_are(folder, decoys):
    """What training computes for a slot is what the model computes for that prompt alone."""
    torch.manual_seed(0)
    llava = model.build_model().eval()
    for parameter in llava.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    processor = model.build_processor()
    scenes = Scenes(folder)
    batch = scenes.batch(np.random.default_rng(1), 3, GRID)
    ids, *_ = scenes.questions(np.random.default_rng(2), batch.present, 2)
    layout = decoder.Layout(GRID * GRID, 2, CPU)
    layout.mask = layout.mask.float()
    orders = (torch.arange(3), {})
    if decoys:  # With a depth of 0 layers nothing may change.
        orders = (torch.tensor([1, 2, 0]), {0: torch.tensor([2, 0, 1])})
    with torch.no_grad():
        vision = training.Vision(llava.model.vision_tower)
        features = llava.model.multi_modal_projector(vision(batch.pixels, batch.corners)[0][:, 1:])
        hidden = decoder.decode(llava, features, ids, layout, orders)
        logits = llava.lm_head(hidden[:, layout.answer])
        for row in range(3):
            for slot in range(2):
                words = text_of(ids[row, slot * QUESTION_TOKENS : slot * QUESTION_TOKENS + QUESTION_TOKENS - 1])
                question = " ".join(words[:-1]).replace(" ?", "?")
                prompt = processor.tokenizer(f"USER: {'<image>' * GRID**2}\n{question} ASSISTANT:", return_tensors="pt")
                alone = llava(**prompt, pixel_values=batch.pixels[row : row + 1]).logits[0, -1]
                torch.testing.assert_close(logits[row, slot], alone, rtol=1e-3, atol=1e-3)


def stage(name: str, **changes) -> training.Stage:
    return training.Stage(**{**dict(name=name, steps=4, batch=2, side=4, rate=1e-3, questions=2), **changes})


@pytest.mark.parametrize(
    ("train", "settings"),
    [
        pytest.param(training.vision_stage, stage("vision"), marks=pytest.mark.slow),
        (training.projector_stage, stage("projector")),
        pytest.param(training.decoder_stage, stage("decoder", first_layer=model.FIRST_LAYER), marks=pytest.mark.slow),
        pytest.param(training.decoder_stage, stage("windows", vision_rate=1e-3), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_interrupted_stage_ends_with_the_same_weights(folder, tmp_path, monkeypatch, train, settings):
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    monkeypatch.setattr(training, "Scenes", lambda _: Scenes(folder))

    def run(into: Path) -> training.Run:
        into.mkdir(exist_ok=True)
        torch.manual_seed(0)
        return training.Run(into, model.build_model(), CPU, 0)

    whole = run(tmp_path / "whole")
    before = {name: value.clone() for name, value in whole.tensors().items()}
    train(whole, settings)
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def stop_in_the_third_step(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop_in_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            train(run(tmp_path / "cut"), settings)
    cut = run(tmp_path / "cut")
    train(cut, settings)
    after = cut.tensors()
    assert all(torch.equal(value, after[name]) for name, value in whole.tensors().items())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(ValueError, match="is of another run"):
        train(run(tmp_path / "cut"), replace(settings, steps=5))


@pytest.mark.slow
def test_the_checkpoint_has_the_form_of_the_embedded_one(folder, tmp_path, monkeypatch, capsys):
    for name in ("pictures.npy", "labels.npy", "scenes.done"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tiny = {name: (train, stage(name, steps=1)) for name, (train, _) in train_reference.STAGES.items()}
    monkeypatch.setattr(train_reference, "STAGES", tiny)
    monkeypatch.setattr(Assets, "check", lambda self: None)
    monkeypatch.setattr(
        sys, "argv", ["train_reference.py", "--folder", str(tmp_path), "--scenes", str(COUNT), "--test-scenes", "0"]
    )
    train_reference.main()
    assert "checkpoint" in capsys.readouterr().out
    ours, shipped = (AutoModelForImageTextToText.from_pretrained(p) for p in (tmp_path / "checkpoint", CHECKPOINT))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    assert ours.config.text_config.rope_parameters == shipped.config.text_config.rope_parameters
    processors = [AutoProcessor.from_pretrained(path) for path in (tmp_path / "checkpoint", CHECKPOINT)]
    text = "USER: <image>\nIs there an apple in the image? ASSISTANT: Yes, dog."
    assert len({tuple(p.tokenizer(text)["input_ids"]) for p in processors}) == 1
    assert ours.num_parameters() * 2 < 12e6


def test_missing_glyphs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt install fonts-noto-color-emoji"):
        render_scenes(tmp_path, 0, 1, Assets(tmp_path / "no.ttf", tmp_path), 1)
    (tmp_path / "some.ttf").touch()
    with pytest.raises(FileNotFoundError, match="npm install emoji-datasource-twitter"):
        render_scenes(tmp_path, 0, 1, Assets(tmp_path / "some.ttf", tmp_path / "none"), 1)


@pytest.mark.slow
def test_evaluation_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    names = [f"scene_{number:06d}.jpg" for number in range(6)]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / name).write_bytes((SCENES / "images" / name).read_bytes())
    lines = (SCENES / "objects.jsonl").read_text().splitlines()[: len(names)]
    (tmp_path / "objects.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(evaluation, "SEEDS", (1, 2))
    monkeypatch.setattr(evaluation, "METHODS", ["dense", evaluation.DEPTHS[1]])
    evaluation.evaluate(CHECKPOINT, tmp_path, len(names), Assets())
    out = capsys.readouterr().out
    assert "seed 1" in out and "random_decoder:layers=[3]" in out
    assert "captions that repeat a word 0." in out
