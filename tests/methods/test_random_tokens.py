"""The random controls: their hash, their draws, and what they may not depend on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch

import llava_sparse
from llava_sparse.modeling.method_random import RandomTokens, random_scores
from llava_sparse.modeling.pruning_ops import image_fingerprints, scramble
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.modeling.pruning_settings import Sparsity
from llava_sparse.modeling.pruning_types import Geometry, VisionFeatures

IMAGE = 4


def stages_of(model, batch):
    with torch.no_grad():
        return model(**batch, output_selection=True).selection


def pixels(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def drawn(images: torch.Tensor, budget: int = 5, seed: int = 0, patches: int = 16) -> list[list[int]]:
    settings = Sparsity("random", budget, options={"seed": seed})
    method = RandomTokens.resolve(Geometry(patches=patches, encoder_layers=6), settings)
    features = torch.zeros(len(images), patches, 2)
    vision = VisionFeatures(features, (1, patches), fingerprints=image_fingerprints(images))
    return method.reduce(vision).patch_index.tolist()


def test_scramble_is_the_hash_that_its_formula_says():
    """In Python's own integers. It may not change: results of a seed are to be the same in every version."""
    for x in (0, 1, 2, 576, 2**31, 2**32 - 1):
        y = x
        for _ in range(2):
            y = ((y >> 16) ^ y) * 0x45D9F3B % 2**32
        assert scramble(torch.tensor(x)).item() == (y >> 16) ^ y
    images = torch.tensor([1.0, -1.0, 2.0, -3.0]).reshape(1, 1, 2, 2)
    fingerprint = sum(scramble(torch.tensor(n)).item() for n in (1, 3)) % 2**32
    assert image_fingerprints(images).tolist() == [fingerprint]
    rough = (torch.arange(3 * 56 * 56) * 7919 % 255 - 127.5).reshape(1, 3, 56, 56)
    assert drawn(rough) == [[4, 7, 11, 13, 15]]


def test_same_image_same_tokens_other_image_other_tokens():
    alone = [drawn(pixels(seed))[0] for seed in range(8)]
    assert drawn(pixels(*range(8))) == alone
    assert drawn(pixels(3, 3, 1)) == [alone[3], alone[3], alone[1]]
    assert len({tuple(kept) for kept in alone}) == 8
    assert drawn(pixels(0), seed=1)[0] != alone[0]
    assert drawn(pixels(0), budget=9)[0] != alone[0] and set(alone[0]) < set(drawn(pixels(0), budget=9)[0])
    for kept in alone:
        assert kept == sorted(set(kept)) and len(kept) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_does_not_change_the_draw(dtype):
    assert drawn(pixels(*range(20)).to(dtype), patches=576, budget=64) == drawn(
        pixels(*range(20)), patches=576, budget=64
    )


def test_draws_are_uniform_and_independent():
    """4,000 draws of 16 of 64: every token, and every pair of tokens, as often as it should be (5 sigma)."""
    fingerprints = image_fingerprints(pixels(*range(40)))
    scores = torch.cat([random_scores(fingerprints, torch.arange(64), seed) for seed in range(100)])
    assert scores.min() >= 0 and scores.max() < 1
    kept = torch.zeros_like(scores).scatter(1, scores.argsort(dim=1, descending=True)[:, :16], 1.0)
    share, pairs = 16 / 64, 16 * 15 / (64 * 63)
    spread = 5 * (share * (1 - share) / 4000) ** 0.5
    assert (kept.mean(0) - share).abs().max() < spread
    together = (kept.T @ kept / 4000)[~torch.eye(64, dtype=torch.bool)]
    assert (together - pairs).abs().max() < 5 * (pairs * (1 - pairs) / 4000) ** 0.5
    overlap = (kept[:40] * kept[40:80]).sum(1).mean() / 16  # two seeds, the same images
    assert abs(overlap - share) < 0.1


@pytest.mark.parametrize("method", ["random", "random_decoder"])
def test_all_tokens_are_the_dense_model(dense, processor, method):
    given = {"budget": 16} if method == "random" else {"layers": [1, 3], "budgets": [16, 16]}
    model = llava_sparse.sparsify(dense, method, **given)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    torch.testing.assert_close(model(**batch).logits, dense(**batch).logits)


@pytest.mark.parametrize("method", ["random", "random_decoder"])
def test_controls_see_the_picture_file_only(dense, processor, method):
    """Neither the question, nor the dtype of pixels and model, nor the neighbours in the batch."""
    given = {"budget": 5} if method == "random" else {"layers": [1, 3], "budgets": [6, 3]}
    model = llava_sparse.sparsify(dense, method, **given)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    batch["pixel_values"] = batch["pixel_values"][[0, 1, 0]]
    stages = stages_of(model, batch)
    kept = [stage.kept for stage in stages]
    for stage in kept:
        assert torch.equal(stage[0], stage[2]) and not torch.equal(stage[0], stage[1])
    for a, b in pairwise(stages):  # one score for a token, at all layers
        assert torch.equal(a.scores.gather(1, a.kept), b.scores)
    model.set_sparsity(method, **given, options={"seed": 1})
    assert not torch.equal(stages_of(model, batch)[0].kept, kept[0])
    model.set_sparsity(method, **given)
    half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    for stage, expected in zip(stages_of(model.to(torch.bfloat16), half), kept, strict=True):
        assert torch.equal(stage.kept, expected)
        assert stage.raters is None or (stage.raters == -1).all()


def test_random_pruning_of_embeddings(dense, processor):
    """No pixels there: all prompts get one draw, and it runs."""
    model = llava_sparse.sparsify(dense, "random_decoder", layers=[1, 3], budgets=[6, 3])
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    visual = batch["input_ids"] == IMAGE
    embeds = model.get_input_embeddings()(batch["input_ids"])
    out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], visual_mask=visual, output_selection=True)
    assert out.logits.isfinite().all()
    kept = out.selection[0].kept
    assert torch.equal(kept, kept[:1].expand(3, -1))


def test_decoder_control_takes_the_tokens_of_sparsevlm():
    geometry = Geometry(patches=576, encoder_layers=24, decoder_layers=32)
    for budget in (64, 96, 128, 192, 300):
        control = METHODS["random_decoder"].resolve(geometry, Sparsity("random_decoder", budget))
        model = METHODS["sparsevlm"].resolve(geometry, Sparsity("sparsevlm", budget, options={"version": "2.0"}))
        assert (control.layers, control.budgets, control.positions) == (model.layers, model.budgets, model.positions)
