"""Pruned models compile: one graph without breaks for every shape, whatever the prompts."""

from __future__ import annotations

import pytest
import tiny
import torch

import llava_sparse

METHODS = [
    pytest.param("sparsevlm", {"layers": [0, 2], "budgets": [6, 3]}, id="sparsevlm"),
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
