"""What LLaVA-NeXT has of its own: tiles, two ways of packing them, budgets over tiles, how tokens are numbered."""

from __future__ import annotations

import family_cases
import pytest
import tiny
import torch
from family_cases import LLAVA_NEXT, next_inputs, next_processor
from transformers import AutoModelForImageTextToText

import llava_sparse
from llava_sparse.modeling.modeling_sparse_llava_next import raster_order

ONE = ["USER: <image> What red car ? ASSISTANT:"]
PATCHES = tiny.PATCHES
PINNED = {"image_grid_pinpoints": [[112, 112]], "image_packing": "tiles"}


def test_tokens_stand_in_raster_order_over_the_picture():
    """Two rows of three tiles of 2 x 2 patches; of each tile CLS, all patches and a token made anew."""
    index = torch.tensor([-1, 0, 1, 2, 3, 4]).expand(7, -1)
    order = raster_order(index, (2, 3), 2).tolist()
    assert order[:6] == list(range(6))
    # Row by row: tiles 1, 2, 3 side by side, then 4, 5, 6; their tokens begin at 6 times their number.
    rows = [(tile, line) for tiles in ((1, 2, 3), (4, 5, 6)) for line in (0, 1) for tile in tiles]
    assert order[6:30] == [6 * tile + 1 + 2 * line + column for tile, line in rows for column in (0, 1)]
    assert order[30:36] == [6 * t for t in range(1, 7)]
    assert order[36:] == [6 * t + 5 for t in range(1, 7)]


@pytest.mark.parametrize("budget", [20, 33, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_of_the_picture_over_all_its_tiles(budget, seed):
    """In equal shares, rounded down; a ratio is of the tokens that the dense model has."""
    stock = next_inputs(next_processor(), ONE, seed)
    dense = int((stock["input_ids"] == 4).sum())
    model = llava_sparse.sparsify(LLAVA_NEXT.make(), "scope", budget)
    tiles = 1 + torch.tensor(model.model.tile_grids(stock["image_sizes"])[0]).prod().item()
    assert dense == model.model.dense_tokens(stock["image_sizes"][0], model.model.tile_grids(stock["image_sizes"])[0])
    whole = budget if isinstance(budget, int) else round(budget * dense)
    ours = next_inputs(next_processor(sparse_method="scope", sparse_budget=budget), ONE, seed)
    assert int((ours["input_ids"] == 4).sum()) == whole // tiles * tiles
    with torch.no_grad():
        (stage,) = model(**stock, output_selection=True).selection
    per_tile = torch.bincount(stage.kept[0] // PATCHES, minlength=tiles)
    assert per_tile.tolist() == [whole // tiles] * tiles and stage.scores.shape == (1, tiles * PATCHES)


def test_budgets_that_cannot_be():
    model = LLAVA_NEXT.make()
    with pytest.raises(ValueError, match=r"visionzip chooses tile by tile.*an int in \[5, 80\]"):
        llava_sparse.sparsify(model, "visionzip", 4)
    with pytest.raises(ValueError, match=r"int in \[1, 80\]"):
        llava_sparse.sparsify(model, "divprune", 81)
    with pytest.raises(ValueError, match=r"`sparse_budgets` must be a list of 1 ints in \[1, 16\]"):
        llava_sparse.sparsify(model, "scope", budgets=[17])
    batch = next_inputs(next_processor(), ONE)
    features = model.get_image_features(batch.pop("pixel_values"), batch["image_sizes"], return_dict=True)
    tiled = llava_sparse.sparsify(model, "cdpruner", 20)
    with pytest.raises(ValueError, match="cdpruner chooses tile by tile"):
        tiled(**batch, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("method", [None, "divprune", "fastv", "visionzip", "sparsevlm"])
def test_the_published_packing(method, tmp_path):
    """Pictures of 2 x 2 tiles, all patches of all tiles, no newlines: each has 5 x 16 tokens in the dense model."""
    LLAVA_NEXT.save(tmp_path)
    sparse = {"sparse_method": method or "divprune", "sparse_budget": 20}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, **sparse, **PINNED).eval()
    model.set_sparsity(method, None if method is None else 20)
    processor = next_processor(**{**sparse, "sparse_method": method or "fastv"}, image_packing="tiles")
    processor.image_processor.image_grid_pinpoints = PINNED["image_grid_pinpoints"]
    batch = next_inputs(processor, family_cases.TEXTS)
    encodes = method in ("divprune", "visionzip")
    assert (batch["input_ids"] == 4).sum(-1).tolist() == [2 * (20 if encodes else 80), 0, 20 if encodes else 80]
    with torch.no_grad():
        out = model(**batch, output_selection=True)
    assert out.logits.isfinite().all()
    if method == "fastv":
        assert out.selection[0].scores.shape[1] == 160
    if method is None:
        features = model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True).pooler_output
        tiles = model.model.projected_features(batch["pixel_values"][0])
        assert torch.equal(features[0][:PATCHES], tiles[0])
        # The first row of the picture: of tiles 1 and 2, side by side.
        assert torch.equal(features[0][PATCHES : PATCHES + 8], torch.cat([tiles[1][:4], tiles[2][:4]]))
    processor.save_pretrained(tmp_path)
    again = llava_sparse.SparseLlavaNextProcessor.from_pretrained(tmp_path)
    assert again.image_packing == "tiles"
    model.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).config.image_packing == "tiles"


def test_unknown_packings():
    message = "`image_packing` must be one of unpadded, tiles, got 'rows'"
    with pytest.raises(ValueError, match=message):
        llava_sparse.SparseLlavaNextConfig(image_packing="rows")
    with pytest.raises(ValueError, match=message):
        next_processor(sparse_method="visionzip", sparse_budget=20, image_packing="rows")


@pytest.mark.parametrize("backbone", ["mistral", "qwen2"])
@pytest.mark.parametrize("method", ["visionzip", "divprune", "sparsevlm"])
@torch.no_grad()
def test_other_decoders(backbone, method):
    model = llava_sparse.sparsify(family_cases.next_model(backbone), method, 20)
    both = model(**next_inputs(next_processor(), family_cases.TEXTS)).logits[-1, -1]
    alone = model(**next_inputs(next_processor(), family_cases.TEXTS[2:], 2)).logits[0, -1]
    torch.testing.assert_close(both, alone, rtol=0, atol=2e-4)
