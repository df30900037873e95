"""What a pruned prefill must not do: build attention matrices, wait for the host, or run layers for nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from cost import Watch

import llava_sparse
from llava_sparse.modeling.pruning_decoder import DecoderRun

# Calls that make the host wait for the device, or shapes that depend on values.
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "unique", "_unique2"}


@pytest.fixture(scope="module")
def large():
    """144 visual tokens, all other dimensions smaller: a dimension of 140 or more is a sequence."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=168, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny.text_config(), image_token_index=4)
    return LlavaForConditionalGeneration(config).eval()


SETTINGS = [
    ("visionzip", {"budget": 20}),
    ("sparsevlm", {"layers": [0, 1, 3], "budgets": [60, 30, 10]}),
    ("sparsevlm", {"layers": [0, 1, 3], "budgets": [60, 30, 10], "options": {"version": "2.0"}}),
    ("sparsevlm", {"layers": [0, 2], "options": {"version": "1.0"}}),
    ("sparsevlm", {"layers": [0, 1, 3], "budgets": [60, 30, 10], "options": {"raters": "all"}}),
    ("random", {"budget": 20}),
    ("random_decoder", {"layers": [0, 1], "budgets": [60, 30]}),
]


def prompt(batch: int = 2, patches: int = 144) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 5] + [4] * patches + [7, 8, 9, 10, 6]]).repeat(batch, 1)
    ids[1:, -3] = 11
    pixels = torch.randn(batch, 3, 168, 168, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_the_watch_sees_attention_matrices(large):
    """The next test can fail: eager attention builds what it looks for."""
    large.set_attn_implementation("eager")
    inputs = prompt()
    with torch.no_grad(), Watch() as watch:
        large(**inputs)
    large.set_attn_implementation("sdpa")
    assert watch.square(140)


@pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=lambda x: str(x)[:60])
@pytest.mark.parametrize("use_cache", [True, False])
def test_no_attention_matrix_under_sdpa(large, method, settings, use_cache):
    model = llava_sparse.sparsify(large, method, **settings)
    inputs = prompt()
    with torch.no_grad(), Watch() as watch:
        model(**inputs, use_cache=use_cache, output_selection=True)
    assert "scaled_dot_product" in " ".join(watch.names)
    assert watch.square(140) == []


@pytest.mark.parametrize(("method", "settings"), SETTINGS[:3], ids=lambda x: str(x)[:60])
@pytest.mark.parametrize("padded", [False, True])
def test_fixed_budgets_never_wait_for_the_host(large, monkeypatch, method, settings, padded):
    model = llava_sparse.sparsify(large, method, **settings)
    inputs = prompt()
    if padded:
        inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (3, 0))
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (3, 0))
        inputs["input_ids"][1, :3] = 7
        inputs["attention_mask"][1, :3] = 1
    names: list[str] = []
    if method == "visionzip":
        with torch.no_grad(), Watch() as watch:
            model.get_image_features(inputs["pixel_values"])
        names = watch.names
    else:
        prune = DecoderRun._prune

        def watched(self, *args):
            with Watch() as watch:
                out = prune(self, *args)
            names.extend(watch.names)
            return out

        monkeypatch.setattr(DecoderRun, "_prune", watched)
        with torch.no_grad():
            model(**inputs)
    assert "topk" in names or "sort" in names
    assert not SYNCHRONISING & set(names)


@pytest.mark.parametrize(("method", "settings"), SETTINGS[:3], ids=lambda x: str(x)[:60])
def test_a_whole_prefill_waits_no_more_than_a_dense_one(large, method, settings):
    counts = []
    for model in (large, llava_sparse.sparsify(large, method, **settings)):
        with torch.no_grad(), Watch() as watch:
            model(**prompt())
        counts.append(sum(name in SYNCHRONISING for name in watch.names))
    assert counts[1] <= counts[0]


@pytest.mark.parametrize(("method", "settings"), SETTINGS[:2], ids=lambda x: str(x)[:60])
@pytest.mark.parametrize("feature_layer", [-2, -3, 1])
def test_tower_stops_after_the_layer_that_is_used(method, settings, feature_layer):
    dense = tiny.dense_model(vision_feature_layer=feature_layer)
    settings = {"budget": 4}
    model = llava_sparse.sparsify(dense, method, **settings)
    run: list[int] = []
    layers = model.model.vision_tower.encoder.layers
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, out, index=index: run.append(index))
    model.get_image_features(torch.randn(1, 3, tiny.SIDE, tiny.SIDE))
    depth = feature_layer if feature_layer > 0 else len(layers) + 1 + feature_layer
    assert run == list(range(depth))


def test_selection_costs_nothing_when_off(model, processor):
    """Without `output_selection` nothing is recorded, and no operation runs for it."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    counts = []
    for record in (False, True):
        with torch.no_grad(), Watch() as watch:
            out = model(**batch, output_selection=record)
        counts.append(len(watch.names))
        assert (out.selection is not None) == record
    assert counts[0] < counts[1]


@pytest.mark.parametrize("padded", [False, True])
def test_a_prefill_waits_for_the_host_no_more_often_than_stock(case, dense, processor, padded):
    """But for the method whose number of tokens follows from the data, and tokens whose number it reads."""
    inputs = tiny.inputs(processor, tiny.QUESTIONS if padded else tiny.QUESTIONS[:1])
    model = llava_sparse.sparsify(dense, case.method, **case.settings)
    reads = []
    for one in (dense, model):
        with torch.no_grad(), Watch() as watch:
            one(**inputs)
        reads.append(sum(name in SYNCHRONISING for name in watch.names))
    # `PromptLayout.of` reads once, by `tolist`, which no operation shows.
    ranks = 0 if case.settings.get("options", {}).get("version") != "1.0" else 10
    assert reads[1] + 1 <= reads[0] + ranks, reads
