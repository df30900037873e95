"""Gradients, over every method: checkpointing, autocast, accumulation, a frozen tower."""

from __future__ import annotations

import pytest
import tiny
import torch

PROJECTED = "model.multi_modal_projector.linear_1.weight"
ANSWERS = ["Yes", "No", "two dog", "red left car"]
PROMPTS = [
    f"{prompt} {answer} </s>" for prompt, answer in zip([*tiny.QUESTIONS, tiny.QUESTIONS[0]], ANSWERS, strict=True)
]


@pytest.fixture
def batch(processor):
    """Four questions with answers of one to three words, the labels on these and the end."""
    batch = tiny.inputs(processor, PROMPTS)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, answer in enumerate(ANSWERS):
        count = len(answer.split()) + 1
        labels[row, -count:] = batch["input_ids"][row, -count:]
    return {**batch, "labels": labels}


def gradients(model, *batches, **kwargs) -> dict[str, torch.Tensor]:
    """Sums over the batches, of all parameters that have one."""
    model.train().zero_grad()
    for batch in batches:
        model(**batch, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept(model, batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return [stage.kept for stage in model(**batch, output_selection=True).selection]


def assert_equal(got, expected, **kwargs):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **kwargs)


def test_gradient_checkpointing(model, batch):
    expected = gradients(model, batch)
    assert expected[PROJECTED].abs().sum() > 0
    model.gradient_checkpointing_enable()
    assert_equal(gradients(model, batch), expected)


def test_autocast(model, batch):
    """Weights in float32 under bfloat16: gradients are in float32, and close wherever the same tokens are kept."""
    exact, selection = gradients(model, batch), kept(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, chosen = gradients(model, batch), kept(model, batch)
    assert rounded.keys() == exact.keys()
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in rounded.values())
    if all(map(torch.equal, selection, chosen)):
        for name in ("lm_head.weight", PROJECTED):
            assert torch.cosine_similarity(rounded[name].flatten(), exact[name].flatten(), dim=0) > 0.9


def test_accumulation(model, batch):
    """Two halves, each divided by the labels of the whole, give the gradients of the batch."""
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    count = (batch["labels"] != -100).sum()
    assert (halves[0]["labels"] != -100).sum() != (halves[1]["labels"] != -100).sum()
    expected = gradients(model, batch)
    assert_equal(gradients(model, *halves, num_items_in_batch=count), expected, rtol=1e-4, atol=1e-5)


def test_frozen_tower(model, batch):
    expected = gradients(model, batch)
    assert any(name.startswith("model.vision_tower") for name in expected)
    model.model.vision_tower.requires_grad_(False)
    graphs = []
    model.model.vision_tower.register_forward_hook(
        lambda *given: graphs.append(given[-1].last_hidden_state.requires_grad)
    )
    got = gradients(model, batch)
    assert not any(graphs)
    assert_equal(got, {name: g for name, g in expected.items() if not name.startswith("model.vision_tower")})
    assert PROJECTED in got
