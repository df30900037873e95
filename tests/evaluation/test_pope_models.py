"""Loading of the models that are evaluated, and what is refused there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import llava_sparse
from llava_sparse.evaluation import LoadedModel, evaluate_pope, load_model
from llava_sparse.pictures import read_picture
from llava_sparse.reference import CHECKPOINT


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model(dtype="float32")


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


def test_other_weights_are_refused(reference, tmp_path, copy):
    weights = load_file(copy / "model.safetensors")
    weights["language_model.lm_head.weight" if "language_model.lm_head.weight" in weights else "lm_head.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    settings = {"methods": ["dense"], "limit": 1, "output": tmp_path / "run.json"}
    evaluate_pope(LoadedModel(reference.model, reference.processor, "a", False), **settings)
    other = load_model(copy, dtype="float32")
    with pytest.raises(ValueError, match="was begun with weights_sha256="):
        evaluate_pope(LoadedModel(other.model, other.processor, "a", False), **settings)


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


def test_pictures_are_read_alike_wherever_they_come_from(tmp_path):
    """Turned as EXIF says, and refused without anything large being made: from a file, its content, or Pillow."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("I;16", (9, 9)).save(tmp_path / "deep.png")
    Image.new("RGB", (30_000, 1)).save(tmp_path / "long.png")
    for made in (Path, Path.read_bytes, Image.open):
        picture = read_picture(made(tmp_path / "turned.jpg"))
        assert (picture.size, picture.mode) == ((10, 20), "RGB")
        with pytest.raises(ValueError, match=r"has more than 8 bits a channel \(mode I;16\)"):
            read_picture(made(tmp_path / "deep.png"))
        with pytest.raises(ValueError, match="the picture is 30,000 × 1 pixels; sides of at most 200 times"):
            read_picture(made(tmp_path / "long.png"), "the picture")
    with pytest.raises(ValueError, match=r"deep\.png: has more"):
        read_picture(str(tmp_path / "deep.png"))
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such file"):
        read_picture(tmp_path / "none.png")
