"""What only a CUDA device can show: `make test-gpu`."""

from __future__ import annotations

import pytest
import tiny
import torch

import llava_sparse
from llava_sparse.benchmark import bench
from llava_sparse.modeling.modeling_sparse_text import PrunedDecoderMixin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEW = 5


def on_gpu(inputs, dtype=torch.float32):
    return {k: v.cuda().to(dtype) if v.is_floating_point() else v.cuda() for k, v in inputs.items()}


def generate(model, inputs, **kwargs):
    arguments = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, suppress_tokens=[4], pad_token_id=0)
    return model.generate(**inputs, **arguments, **kwargs)


def test_gpu_equals_cpu(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    expected = model(**batch, output_selection=True)
    tokens = generate(model, batch)
    model.cuda()
    got = model(**on_gpu(batch), output_selection=True)
    for one, two in zip(expected.selection, got.selection, strict=True):
        assert torch.equal(one.kept, two.kept.cpu())
    torch.testing.assert_close(got.logits[:, -1].cpu(), expected.logits[:, -1], rtol=0, atol=2e-3)
    assert torch.equal(generate(model, on_gpu(batch)).cpu(), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, processor, dtype):
    model.cuda().to(dtype)
    out = generate(model, on_gpu(tiny.inputs(processor, tiny.QUESTIONS), dtype))
    assert out.shape[0] == 3


def test_static_cache_and_what_generate_compiles(model, processor):
    model.cuda()
    batch = on_gpu(tiny.inputs(processor, tiny.QUESTIONS))
    assert torch.equal(generate(model, batch, cache_implementation="static"), generate(model, batch))


def test_beams(model, processor):
    model.cuda()
    batch = on_gpu(tiny.inputs(processor, tiny.QUESTIONS))
    assert generate(model, batch, num_beams=3).shape[0] == 3


def test_selection_never_synchronises(dense, processor, monkeypatch):
    prune = PrunedDecoderMixin._prune

    def strict(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return prune(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(PrunedDecoderMixin, "_prune", strict)
    model = llava_sparse.sparsify(dense, "sparsevlm", layers=[0, 2], budgets=[6, 3]).cuda()
    batch = on_gpu(tiny.inputs(processor, tiny.QUESTIONS))
    for options in (None, {"version": "2.0"}):
        model.set_sparsity("sparsevlm", layers=[0, 2], budgets=[6, 3], options=options)
        with torch.no_grad():
            model(**batch)
    model.set_sparsity("visionzip", budget=5)
    pixels = batch["pixel_values"]
    with torch.no_grad():
        model.get_image_features(pixels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.get_image_features(pixels)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_backends(model, processor, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model.cuda().to(torch.bfloat16)
    batch = on_gpu(tiny.inputs(processor, tiny.QUESTIONS), torch.bfloat16)
    expected = model(**batch).logits[:, -1]
    model.set_attn_implementation(attention)
    got = model(**batch).logits[:, -1]
    assert torch.nn.functional.cosine_similarity(got.float(), expected.float()).min() > 0.9


@pytest.mark.parametrize("compiled", [False, True])
def test_benchmark(dense, compiled):
    found = bench(
        dense.cuda(), methods=["visionzip", "sparsevlm:layers=[0,2]:budgets=[6,3]"], budgets=[5], batch_sizes=[1, 2],
        text_tokens=[9], rounds=2, new_tokens=3, compiled=compiled,
    )  # fmt: skip
    assert found["environment"]["device_name"]
    for entry in found["results"]:
        assert "error" not in entry
        assert entry["peak_bytes"] > 0
        assert entry["seconds"]["prefill"]["median"] > 0
