"""The benchmark's shapes: sizes as published, arithmetic by formula as torch counts it, memory by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_cases import FAMILIES
from torch import nn

import llava_sparse
from llava_sparse.benchmark import SHAPES, analytic, analytic_table, bench, build_model, make_inputs, memory
from llava_sparse.benchmark import inputs as inputs_of_prompts
from llava_sparse.benchmark.analytic import memory_rows, weight_bytes
from llava_sparse.benchmark.flops import measured_flops, prefill_flops
from llava_sparse.benchmark.inputs import recorded_prefill
from llava_sparse.benchmark.shapes import parts_of
from llava_sparse.published import resized

BILLIONS = {  # parameters, in thousand millions
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "llava-next-7b": 7.06,
    "llava-next-mistral-7b": 7.57,
    "llava-next-video-7b": 7.06,
    "llava-onevision-qwen2-7b": 8.03,
    "video-llava-7b": 7.37,
    "mgm-7b": 7.27,
    "mgm-7b-hd": 7.27,
    "qwen2-vl-7b": 8.29,
    "qwen2.5-vl-7b": 8.29,
    "qwen3-vl-8b": 8.77,
}
TOKENS = {  # of the picture, or the video, that the benchmark shows
    "llava-1.5-7b": 576,
    "llava-1.5-13b": 576,
    "llava-next-7b": 2880,
    "llava-next-mistral-7b": 2880,
    "llava-next-video-7b": 8 * 144,
    "llava-onevision-qwen2-7b": 729 + 54 * 55,
    "video-llava-7b": 2056,
    "mgm-7b": 576,
    "mgm-7b-hd": 2880,
    "qwen2-vl-7b": 1296,
    "qwen2.5-vl-7b": 1296,
    "qwen3-vl-8b": 1296,
}


# Of the others, `test_models_have_the_published_sizes` counts the decoders.
FEW = ("llava-next-7b", "qwen2.5-vl-7b")


@pytest.mark.parametrize("shape", [pytest.param(x, marks=[] if x in FEW else pytest.mark.slow) for x in BILLIONS])
def test_shapes_have_the_published_sizes(shape):
    """On no device."""
    model = build_model(SHAPES[shape], torch.bfloat16, "meta")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[shape], abs=0.011)
    assert model.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32


# --- Arithmetic ----------------------------------------------------------------------------------------------------

TEXT = dict(
    hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}
CLIP = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=56)
TOWER = dict(depth=3, hidden_size=128, intermediate_size=512, num_heads=2, out_hidden_size=256)
IDS = {"image_token_index": 90, "video_token_index": 91, "pad_token_id": 0}
QWEN_IDS = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
AUX = {"aux_hidden_sizes": [16, 32, 64, 128], "aux_depths": [1, 1, 2, 1]}
SMALLER = {
    "llava-1.5-7b": (TEXT, CLIP | {"image_size": 140}, IDS),
    "llava-next-7b": (TEXT, CLIP, IDS | {"image_grid_pinpoints": [[112, 112]], "image_packing": "tiles"}),
    "llava-next-mistral-7b": (TEXT, CLIP, IDS | {"image_grid_pinpoints": [[56, 112], [112, 112]]}),
    "llava-next-video-7b": (TEXT, CLIP | {"image_size": 84}, IDS),
    "llava-onevision-qwen2-7b": (TEXT, CLIP, IDS | {"image_grid_pinpoints": [[112, 112]]}),
    "video-llava-7b": (TEXT, CLIP, IDS),
    "mgm-7b": (TEXT, CLIP | {"image_size": 112}, IDS | AUX | {"image_size_aux": 256}),
    "mgm-7b-hd": (TEXT, CLIP, IDS | AUX | {"image_size_aux": 256}),
    "qwen2-vl-7b": (TEXT | MROPE, dict(depth=3, embed_dim=128, hidden_size=256, num_heads=2), QWEN_IDS),
    "qwen2.5-vl-7b": (TEXT | MROPE, TOWER | {"fullatt_block_indexes": [1, 2]}, QWEN_IDS),
    "qwen3-vl-8b": (TEXT | MROPE | {"head_dim": 64}, TOWER | {"deepstack_visual_indexes": [0, 1, 2]}, QWEN_IDS),
}
RUNS = {
    "visionzip": {"budget": 0.2},
    "divprune": {"budget": 0.2},
    "delegate": {"budget": 0.2},
    "sparsevlm": {"layers": [1], "budgets": [0.3]},
    "divprune+fastv": {"budget": 0.2},
}
NO_VISIONZIP = ("llava-next-video-7b",)


@pytest.mark.parametrize(
    ("shape", "method"),
    [
        pytest.param(shape, method, marks=[] if fast else pytest.mark.slow)
        for shape in SMALLER
        for method in (None, *RUNS)
        for fast in [method == "visionzip" or (method is None and shape in NO_VISIONZIP)]
        if not (method == "visionzip" and shape in NO_VISIONZIP)
    ],
)
def test_formula_and_count_agree_in_every_family(shape, method):
    text, vision, more = SMALLER[shape]
    model = build_model(resized(shape, text, vision, **more).config, torch.float32, "cpu")
    if method is not None:
        # SigLIP has no CLS.
        options = {"saliency": "received"} if (method, shape) == ("visionzip", "llava-onevision-qwen2-7b") else None
        model = llava_sparse.sparsify(model, method, **RUNS[method], options=options)
    inputs = make_inputs(model, 2, 20, grid=20)
    one = make_inputs(model, 1, 20, grid=20)
    lengths, _, tokens = recorded_prefill(model, inputs)
    assert tokens.samples == tokens.layers
    assert lengths[0] == 20 + tokens.entering
    with torch.inference_mode():
        counted = measured_flops(lambda: model(**one, logits_to_keep=1))
    formula = sum(prefill_flops(model, inputs, lengths).values())
    assert formula == pytest.approx(counted, rel=1e-6 if method is None else 0.02)


@pytest.mark.parametrize(
    ("shape", "run", "tokens"),
    [
        ("small", "sparsevlm@64", None),
        pytest.param("small-llava-next", "visionzip@160", 160, marks=pytest.mark.slow),
        pytest.param("small-video-llava", "visionzip@194", 194, marks=pytest.mark.slow),
        pytest.param("small-qwen2.5-vl", "visionzip@0.5", 648, marks=pytest.mark.slow),
    ],
)
def test_a_shape_is_computed_without_its_weights(shape, run, tokens):
    method, budget = run.split("@")
    dense, pruned = analytic(shape, [method], [float(budget) if "." in budget else int(budget)])
    layers, text = 8, SHAPES[shape]["text_config"]
    count = {"small": 576, "small-llava-next": 2880, "small-video-llava": 2056, "small-qwen2.5-vl": 1296}[shape]
    assert (dense["run"], pruned["run"]) == ("dense", run)
    assert dense["visual_tokens"] == {"entering": count, "layers": count, "samples": count}
    assert dense["lengths"] == [count + 40] * layers
    assert dense["kv_bytes"] == layers * (count + 40) * 2 * text["hidden_size"] * 2
    if tokens is not None:
        assert pruned["lengths"] == [tokens + 40] * layers and pruned["visual_tokens"]["layers"] == tokens
    else:
        assert pruned["visual_tokens"]["entering"] == count > pruned["visual_tokens"]["layers"]
        assert pruned["lengths"][0] == count + 40 > pruned["lengths"][-1]
    d, m = text["hidden_size"], text["intermediate_size"]
    decoder = sum(8 * n * d * d + 4 * n * n * d + 6 * n * d * m for n in pruned["lengths"]) + 2 * d * text["vocab_size"]
    assert pruned["flops_by_formula"]["decoder"] == decoder
    assert pruned["flops_by_formula"]["vision tower"] <= dense["flops_by_formula"]["vision tower"]
    assert len(analytic_table(shape, [dense, pruned]).rows) == 2


@pytest.mark.parametrize("shape", [pytest.param(shape, marks=pytest.mark.slow) for shape in TOKENS])
def test_what_the_shapes_show(shape):
    """Placeholders of a prompt of the published sizes, and a narrow model that takes them."""
    (dense, *_) = analytic(shape, ["dense"], [64])
    assert dense["visual_tokens"]["entering"] == TOKENS[shape]


# --- Memory --------------------------------------------------------------------------------------------------------


def test_memory_by_hand():
    """LLaVA-1.5-13B: every weight counted, and the cache of a prompt of 616 tokens."""
    d, m, vocabulary = 5120, 13824, 32064
    linear = 40 * (4 * d * d + 3 * d * m) + 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 1024 * d + d * d
    rows = 40 * (5 * d + 2 * m) + 24 * (5 * 1024 + 4096) + 2 * d  # of these matrices: each has a scale in 8 bits
    embeddings = 2 * vocabulary * d + 1024 * 3 * 14**2 + 577 * 1024 + 1024
    norms = 81 * d + (2 * 24 + 2) * 2 * 1024
    biases = 24 * (5 * 1024 + 4096) + 2 * d
    rest = 2 * (embeddings + norms + biases)
    assert memory("llava-1.5-13b") == {
        16: rest + 2 * linear, 8: rest + linear + 4 * rows, 4: rest + linear // 2 + linear // 16,
    }  # fmt: skip
    cache = 40 * 616 * 2 * d * 2
    entries = [{"run": "dense", "kv_bytes": cache}, {"run": "visionzip@64", "kv_bytes": cache * 104 // 616}]
    first, second = memory_rows("llava-1.5-13b", entries)
    gib = [f"{value / 2**30:.2f}" for value in (rest + 2 * linear, rest + linear + 4 * rows, rest + linear * 9 // 16)]
    caches = [f"{batch * cache / 2**30:.2f}" for batch in (1, 8, 32)]
    assert first == ["llava-1.5-13b", *gib, "dense", *caches]
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    assert f"| {' | '.join(first[:5])} | 576 / 576 / 576 | {' | '.join(caches)} |" in page
    assert second[:5] == ["", "", "", "", "visionzip@64"] and second[5] == f"{cache * 104 / 616 / 2**30:.2f}"


def test_the_head_is_not_quantised():
    model = nn.Module()
    model.inner, model.lm_head = nn.Linear(64, 8), nn.Linear(64, 10, bias=False)
    assert [weight_bytes(model, bits) for bits in (16, 8, 4)] == [
        2 * (64 * 8 + 8 + 640), 64 * 8 + 4 * 8 + 16 + 1280, 64 * 8 // 2 + 4 * 8 + 16 + 1280,
    ]  # fmt: skip


# --- Measured ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_can_be_measured(family, monkeypatch):
    monkeypatch.setattr(inputs_of_prompts, "GRID", 16)
    methods = [name for name in ("visionzip", "divprune", "sparsevlm") if name in family.methods]
    methods = methods[1:] if family.name == "llava_next_video" else methods
    found = bench(family.make(), methods=methods, budgets=[0.2], rounds=1, warm_up=0, new_tokens=2, text_tokens=[9])
    dense, *pruned = found["results"]
    assert len(pruned) == len(methods)
    for entry in found["results"]:
        assert set(entry["seconds"]) == {"prefill", "decode", "generate"}
        assert sum(entry["flops_by_formula"].values()) == pytest.approx(entry["flops"], rel=0.1)
        assert 0 < sum(entry["stages"].values()) < 20 * entry["seconds"]["prefill"]["high"]
        assert (entry["stages"]["selection"] > 0) == (entry is not dense)
        assert entry["visual_tokens"]["layers"] <= dense["visual_tokens"]["layers"]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_parts_hold_all_that_a_prompt_goes_through(family):
    """But for the head, a newline vector, and, of Video-LLaVA, the tower of pictures."""
    model = family.make()
    held = {id(p) for modules in parts_of(model).values() for module in modules for p in module.parameters()}
    left = {name for name, p in model.named_parameters() if id(p) not in held}
    assert {name for name in left if "image_tower" not in name} <= {"lm_head.weight", "model.image_newline"}
