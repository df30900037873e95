"""Mini-Gemini: what it has of its own, besides the table of families, in which it is in tiles."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from family_cases import TEXTS, gemini_model, gemini_processor, next_inputs, next_picture
from hub_folder import load_without_the_package
from PIL import Image
from transformers import AutoConfig

import llava_sparse
from llava_sparse.modeling.modeling_sparse_mini_gemini import tiles_of
from llava_sparse.modeling.pruning_ops import rows_at

BASE = {"image_size_aux": 64, "image_grid": 1, "image_global": False}
LOGITS = dict(rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def base():
    return gemini_model(**BASE)


@pytest.mark.parametrize("method", ["visionzip", "tome", "cdpruner", "divprune", "sparsevlm", "visionzip+sparsevlm"])
@torch.no_grad()
def test_without_tiles(base, method):
    model = llava_sparse.sparsify(base, method, 6)
    stock = next_inputs(gemini_processor(**BASE), TEXTS)
    assert stock["pixel_values"].shape[1:] == (3, 56, 56) and stock["pixel_values_aux"].shape[1:] == (3, 64, 64)
    ours = next_inputs(gemini_processor(**BASE, sparse_method=method, sparse_budget=6), TEXTS)
    logits = model(**stock).logits[:, -1]
    torch.testing.assert_close(model(**ours).logits[:, -1], logits, **LOGITS)
    search = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    assert torch.equal(model.generate(**stock, **search)[:, -3:], model.generate(**ours, **search)[:, -3:])
    seen = 0
    for row, text in enumerate(TEXTS):
        single = next_inputs(gemini_processor(**BASE), [text], seen)
        seen += text.count("<image>")
        torch.testing.assert_close(model(**single).logits[0, -1], logits[row], **LOGITS)


@torch.no_grad()
def test_the_dense_model_in_every_cache(base):
    batch = next_inputs(gemini_processor(**BASE), TEXTS)
    said = [
        base.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, **more)
        for more in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 7})
    ]
    assert all(torch.equal(said[0], other) for other in said[1:])
    assert base(**batch, output_selection=True).selection == ()


@torch.no_grad()
def test_the_placeholder_need_not_be_in_the_vocabulary(base):
    batch = next_inputs(gemini_processor(**BASE), TEXTS)
    expected = base(**batch).logits
    other = llava_sparse.sparsify(base, None)
    other.config.image_token_index = 64
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 4, 64)
    assert torch.equal(other(**{**batch, "input_ids": ids}).logits, expected)


@torch.no_grad()
def test_mining_by_hand(base):
    """Every token attends to the vectors of its own square alone."""
    model = base.model
    tokens, high = torch.randn(2, 16, 64), torch.randn(2, 56, 16, 16)
    found = model.mine(tokens, high)
    for picture in range(2):
        for p in range(16):
            row, column = divmod(p, 4)
            square = high[picture, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1).T
            query = model.vlm_uni_query_projector(tokens[picture, p])
            weights = (model.vlm_uni_aux_projector(square) @ query / 64**0.5).softmax(0)
            torch.testing.assert_close(found[picture, p], weights @ model.vlm_uni_val_projector(square))
    assert torch.equal(tiles_of(high, 2)[:, 1], high[:, :, :8, 8:])


@torch.no_grad()
def test_a_token_made_inside_the_tower_gets_what_its_patches_find(base):
    model = llava_sparse.sparsify(base, "tome", 6).model
    batch = next_inputs(gemini_processor(**BASE), TEXTS[2:])
    high, seen = model.aux_features(batch["pixel_values_aux"]), {}
    miner = model._miner(high)

    def watched(vision):
        seen["before"], seen["after"] = vision, miner(vision)
        return seen["after"]

    model.vision_tower(batch["pixel_values"], sparsifier=model.sparsifier, refine=watched)
    before, added = seen["before"], seen["after"].features - seen["before"].features
    found = model.mine(rows_at(before.features, before.sources), high)
    for token in range(6):
        members = (before.sources[0] == token).nonzero().flatten()
        torch.testing.assert_close(added[0, token], found[0, members].mean(0), rtol=0, atol=1e-5)


@torch.no_grad()
def test_tiles_stand_one_behind_the_other():
    """The whole picture first; a method by tile keeps as many of each, and numbers go on from tile to tile."""
    dense = gemini_model()
    model = llava_sparse.sparsify(dense, "uniform", 20)
    batch = next_inputs(gemini_processor(), TEXTS[2:])
    kept = model(**batch, output_selection=True).selection[0].kept[0]
    assert [int((kept // 16 == tile).sum()) for tile in range(5)] == [4] * 5
    features = dense.get_image_features(batch["pixel_values"], batch["pixel_values_aux"]).features[0]
    torch.testing.assert_close(
        model.get_image_features(batch["pixel_values"], batch["pixel_values_aux"]).features[0], features[kept], **LOGITS
    )
    tiles, whole = batch["pixel_values"][0, :4], batch["pixel_values"][0, 4]
    grid = torch.cat([torch.cat([tiles[0], tiles[1]], dim=2), torch.cat([tiles[2], tiles[3]], dim=2)], dim=1)
    shrunk = torch.nn.functional.interpolate(grid[None], size=(56, 56), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(whole, shrunk)


@pytest.mark.slow
def test_a_hub_folder_loads_without_the_package(tmp_path):
    settings = {"sparse_method": "visionzip", "sparse_budget": 20}
    model = llava_sparse.sparsify(gemini_model(), "visionzip", 20)
    processor = gemini_processor(**settings)
    llava_sparse.hub.save_to_hub_folder(model, processor, tmp_path)
    batch = next_inputs(processor, TEXTS)
    got = load_without_the_package(tmp_path, batch)
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False).tolist()
    assert got == {"method": "visionzip", "processor": "SparseMiniGeminiProcessor", "tokens": [expected, expected]}


def test_a_picture_is_padded_to_a_square():
    processor = gemini_processor(**BASE)
    picture = Image.fromarray(np.full((20, 60, 3), 255, dtype=np.uint8))
    high = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values_aux"][0]
    assert high[:, :20].abs().max() < 0.05 and high[:, -20:].abs().max() < 0.05  # The mean colour.
    assert high[:, 28:36].min() > 1


def test_a_picture_becomes_what_the_authors_code_feeds():
    """Of the large picture: shrunk, cut by rows, and once more shrunk to the size of a tile, the last."""
    processor = gemini_processor()
    seen = processor(images=next_picture(0), text="<image>", return_tensors="pt")
    shrink = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=False)
    low = shrink(seen["pixel_values_aux"], size=(112, 112))
    tiles = [low[0, :, y : y + 56, x : x + 56] for y in (0, 56) for x in (0, 56)]
    torch.testing.assert_close(seen["pixel_values"][0], torch.stack([*tiles, shrink(low, size=(56, 56))[0]]))
    square = Image.new("RGB", (100, 100), tuple(int(255 * mean) for mean in processor.image_processor.image_mean))
    square.paste(next_picture(0).convert("RGB"), (0, (100 - next_picture(0).height) // 2))
    size = {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}}
    high = processor.image_processor(square, **size, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(high), seen["pixel_values_aux"])


def test_errors(base):
    batch = next_inputs(gemini_processor(**BASE), TEXTS[2:])
    with pytest.raises(ValueError, match=r"pixel_values_aux \(images, 3, S', S'\), got .* and None"):
        base(**{name: x for name, x in batch.items() if name != "pixel_values_aux"})
    with pytest.raises(ValueError, match=r"pixel_values \(images, 5, 3, S, S\)"):
        gemini_model()(**batch)
    with pytest.raises(ValueError, match="vision_feature_layer: Mini-Gemini takes its features"):
        base(**batch, vision_feature_layer=-3)
    with pytest.raises(ValueError, match="`image_grid` must be 2 or more"):
        llava_sparse.SparseMiniGeminiConfig(image_global=True)
    with pytest.raises(ValueError, match=r"an int in \[5, 80\]"):
        llava_sparse.sparsify(gemini_model(), "visionzip", 4)


@pytest.mark.parametrize(("grid", "tokens"), [(1, 576), (2, 2880)])
def test_a_published_configuration(tmp_path, grid, tokens):
    """MGM-7B's and MGM-7B-HD's: the fields of a LLaMA, and the names of towers."""
    published = {
        "architectures": ["MGMLlamaForCausalLM"],
        "hidden_size": 4096,
        "image_global": grid > 1,
        "image_grid": grid,
        "image_size_aux": 768 * grid,
        "intermediate_size": 11008,
        "mm_hidden_size": 1024,
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
        "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
        "model_type": "mgm",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(tmp_path, sparse_method="divprune", sparse_budget=160)
    assert config.model_type == "sparse_mini_gemini" and config.image_token_index == 32000
    assert config.text_config.num_hidden_layers == 32 and config.text_config.intermediate_size == 11008
    with torch.device("meta"):
        model = llava_sparse.SparseMiniGeminiForConditionalGeneration(config)
    assert model.model.dense_tokens_per_image == tokens
    assert model.model.vlm_uni_val_projector[1].weight.shape == (1024, 2880)
    assert model.model.sparsifier.tokens == 160
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    for name in ("sparse_method", "sparse_budget", "image_grid", "image_global", "image_size_aux", "aux_depths"):
        assert getattr(again, name) == getattr(config, name)
