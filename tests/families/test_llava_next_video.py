"""LLaVA-NeXT-Video: pictures in tiles and videos in a batch; both processors; videos pruned as a whole."""

from __future__ import annotations

import pytest
import torch
from family_cases import next_inputs, next_video_model, next_video_processor
from transformers import AutoModelForImageTextToText

import llava_sparse

TEXTS = [
    "USER: <video> What <image> dog ? ASSISTANT:",
    "USER: Is there a cat ? ASSISTANT:",
    "USER: <image> What red car on the left ? ASSISTANT:",
    "USER: <video> two big blue tree ? ASSISTANT:",
]
LOGITS = dict(rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", [None, "divprune", "cdpruner", "delegate", "sparsevlm", "divprune+fastv"])
@torch.no_grad()
def test_videos_and_pictures_in_a_batch(method):
    dense = next_video_model()
    model = llava_sparse.sparsify(dense, method, None if method is None else 9)
    batch = next_inputs(next_video_processor(), TEXTS)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    logits, said = model(**batch).logits[:, -1], model.generate(**batch, **arguments)[:, -4:]
    if method is None:
        assert torch.equal(logits, dense(**batch).logits[:, -1])
        assert torch.equal(said, dense.generate(**batch, **arguments)[:, -4:])
        return
    seed = 0
    for row, text in enumerate(TEXTS):
        alone = next_inputs(next_video_processor(), [text], seed)
        seed += text.count("<image>") + text.count("<video>")
        torch.testing.assert_close(logits[row], model(**alone).logits[0, -1], **LOGITS)
        assert model.generate(**alone, **arguments)[0, -4:].tolist() == said[row].tolist()
    short = next_inputs(next_video_processor(sparse_method=method, sparse_budget=9), TEXTS)
    assert (short["input_ids"].shape[1] < batch["input_ids"].shape[1]) == (method != "sparsevlm")
    torch.testing.assert_close(model(**short).logits[:, -1], logits, **LOGITS)
    assert torch.equal(model.generate(**short, **arguments)[:, -4:], said)


@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramiddrop"])
@torch.no_grad()
def test_a_ratio_of_one_is_dense(method):
    dense, batch = next_video_model(), next_inputs(next_video_processor(), TEXTS)
    model = llava_sparse.sparsify(dense, method, 1.0)
    torch.testing.assert_close(model(**batch).logits[:, -1], dense(**batch).logits[:, -1], **LOGITS)


def test_methods_in_the_tower_refuse_videos():
    model = llava_sparse.sparsify(next_video_model(), "visionzip", 20)
    batch = next_inputs(next_video_processor(), TEXTS[3:])
    with pytest.raises(ValueError, match="visionzip works in the vision tower, and this model pools the frames"):
        model(**batch)


def test_labels(tmp_path):
    dense = next_video_model()
    dense.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, sparse_method="divprune", sparse_budget=9)
    batch = next_inputs(next_video_processor(), TEXTS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for name in model.model.modalities:
        labels[model.model.placeholders(batch["input_ids"], None, name)] = -100
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
