"""Pruned models compile: one graph without breaks for every shape, whatever the prompts."""

from __future__ import annotations

import pytest
import tiny
import torch

import llava_sparse

METHODS = [
    pytest.param("sparsevlm", {"layers": [0, 2], "budgets": [6, 3]}, id="sparsevlm", marks=pytest.mark.slow),
    pytest.param("visionzip", {"budget": 5}, id="visionzip", marks=pytest.mark.slow),
    pytest.param("random", {"budget": 5}, id="random", marks=pytest.mark.slow),
    pytest.param("random_decoder", {"layers": [1, 3], "budgets": [6, 3]}, id="random_decoder", marks=pytest.mark.slow),
    pytest.param(
        "sparsevlm", {"layers": [0, 2], "budgets": [6, 3], "options": {"version": "2.0"}},
        id="sparsevlm-2.0", marks=pytest.mark.slow,
    ),
]  # fmt: skip
SHORT, LONG, SHORTEST = tiny.QUESTIONS


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_one_graph_for_prompts_of_one_shape(dense, processor, method, settings):
    """Rows change places, lengths and numbers of raters differ; tower and decoder are compiled once each."""
    model = llava_sparse.sparsify(dense, method, **settings)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    padded = [[SHORT, LONG, SHORTEST], [SHORTEST, LONG, SHORT], [LONG, SHORT, SHORT], [LONG, SHORTEST, SHORTEST]]
    batches = [tiny.inputs(processor, texts, seed=seed) for seed, texts in enumerate(padded)]
    whole = [tiny.inputs(processor, [LONG] * 3, seed=seed) for seed in (5, 8)]
    torch._dynamo.reset()
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches + whole]
        for part in (model.model.vision_tower, model.model.language_model):
            part.compile(backend=backend, fullgraph=True, dynamic=False)
        for batch, logits in zip(batches, expected, strict=False):
            torch.testing.assert_close(model(**batch).logits, logits)
        assert len(graphs) == 2
        # Without padding there are no masks: that is another graph of the decoder.
        for batch, logits in zip(whole, expected[len(batches) :], strict=True):
            torch.testing.assert_close(model(**batch).logits, logits)
        assert len(graphs) == 3


class Logits(torch.nn.Module):
    """What is exported: a forward pass of given tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return self.model(**inputs, use_cache=False).logits


@pytest.mark.slow
@torch.no_grad()
def test_export(case, dense, processor):
    """Methods that look at no question export as stock; the exported graph takes other prompts, padded alike or not."""
    model = llava_sparse.sparsify(dense, case.method, **case.settings)
    batch, other = (tiny.inputs(processor, [SHORT, LONG], seed=seed) for seed in (0, 7))
    wrapped = Logits(model)
    if model.model.sparsifier.looks_at_question or model.model.sparsifier.decoder is not None:
        with pytest.raises(ValueError, match=r"torch.export: what .* Export an encoder method"):
            torch.export.export(wrapped, tuple(batch.values()), strict=False)
        return
    exported = torch.export.export(wrapped, tuple(batch.values()), strict=False).module()
    for inputs in (batch, other):
        torch.testing.assert_close(exported(*inputs.values()), wrapped(*inputs.values()), rtol=0, atol=1e-5)


FIXED = [("visionzip", {"budget": 5}), ("divprune", {"budget": 5}), ("tome+divprune", {"budget": 4})]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), FIXED, ids=[method for method, _ in FIXED])
@torch.no_grad()
def test_a_whole_forward_is_one_graph(dense, processor, method, settings):
    """Without a cache, where the layout is said to be fixed; for all prompts of one shape, padded alike or not."""
    model = llava_sparse.sparsify(dense, method, **settings)
    batches = [tiny.inputs(processor, texts, seed=seed) for seed, texts in enumerate([[SHORT, LONG], [LONG, SHORTEST]])]
    expected = [model(**batch, use_cache=False).logits for batch in batches]
    model.model.fixed_layout = True
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for batch, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, logits)
    assert len(graphs) == 1


@torch.no_grad()
def test_a_fixed_layout_is_not_another_one(dense, processor):
    """Nothing is read, and prompts of other numbers of placeholders, or methods that look at prompts, are refused."""
    model = llava_sparse.sparsify(dense, "visionzip", budget=5)
    batch = tiny.inputs(processor, [SHORT, LONG])
    expected = model(**batch).logits
    model.model.fixed_layout = True
    torch.testing.assert_close(model(**batch).logits, expected)
    ours = tiny.processor(llava_sparse.SparseLlavaProcessor, sparse_method="visionzip", sparse_budget=5)
    with pytest.raises(RuntimeError, match=r"Prompts of \[16, 16\] image tokens"):
        model(**tiny.inputs(ours, [SHORT, LONG]))
    with pytest.raises(ValueError, match="fixed_layout: 3 pictures in 2 prompts"):
        model(**tiny.inputs(processor, [SHORT, LONG.replace("<image>", "<image> <image>")]))
    model.set_sparsity("sparsevlm", budget=4)
    with pytest.raises(ValueError, match="fixed_layout: what sparsevlm makes of a prompt"):
        model(**batch)
