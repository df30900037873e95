"""Losses computed outside the model, by transformers' Trainer: smoothed labels, a loss function, metrics."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import llava_sparse

ROWS = [
    ("USER: <image> Is there a dog in the image ? ASSISTANT:", "Yes </s>", [0]),
    ("USER: <image> What red car on the left ? ASSISTANT:", "No two big </s>", [1]),
    ("USER: What blue tree ? ASSISTANT:", "No </s>", []),
    ("USER: <image> two <image> big ? ASSISTANT:", "Yes cat </s>", [2, 3]),
]


def collate(rows, ends=False):
    """A usual collator: padding at the right, labels of the answers; with `ends`, where prompts end, too."""
    processor = tiny.processor()
    processor.tokenizer.padding_side = "right"
    texts = [f"{prompt} {answer}" for prompt, answer, _ in rows]
    pictures = [tiny.image(seed) for _, _, seeds in rows for seed in seeds]
    batch = dict(processor(images=pictures, text=texts, return_tensors="pt", padding=True))
    answers = torch.tensor([len(answer.split()) for _, answer, _ in rows])
    prompts = batch["attention_mask"].sum(-1) - answers
    columns = torch.arange(batch["input_ids"].shape[1])
    there = (columns >= prompts[:, None]) & batch["attention_mask"].bool()
    batch["labels"] = batch["input_ids"].masked_fill(~there, -100)
    return {**batch, "prompt_length": prompts} if ends else batch


def trainer(model, folder, smoothing=0.0, **kwargs):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2, use_cpu=True,
        report_to=[], remove_unused_columns=False, disable_tqdm=True, save_strategy="no", learning_rate=0.0,
        label_smoothing_factor=smoothing,
    )  # fmt: skip
    kwargs = {"data_collator": collate, **kwargs}
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS, **kwargs)


def standard(outputs, labels, num_items_in_batch=None):
    assert outputs.logits.shape[:2] == labels.shape
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def with_ends(rows):
    return collate(rows, ends=True)


def test_label_smoothing(model, tmp_path):
    """Trainer shifts labels for classes that are language models alone; of a LLaVA, stock or pruned, it does not."""
    batch = collate(ROWS)
    expected = float(LabelSmoother(0.1)(model(**batch), batch["labels"]).detach())
    run = trainer(model, tmp_path, smoothing=0.1, data_collator=with_ends)
    assert run.train().training_loss == pytest.approx(expected, abs=1e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_a_loss_of_the_callers(model, tmp_path):
    expected = float(model(**collate(ROWS)).loss.detach())
    run = trainer(model, tmp_path, compute_loss_func=standard, data_collator=with_ends)
    assert run.train().training_loss == pytest.approx(expected, abs=1e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_metrics_get_logits_alone(model, tmp_path):
    seen = {}

    def metrics(prediction):
        seen.update(logits=torch.tensor(prediction.predictions), labels=torch.tensor(prediction.label_ids))
        return {}

    loss = trainer(model, tmp_path, compute_metrics=metrics).evaluate()["eval_loss"]
    assert seen["logits"].shape[:2] == seen["labels"].shape
    got = cross_entropy(seen["logits"][:, :-1].flatten(0, 1), seen["labels"][:, 1:].flatten(), ignore_index=-100)
    assert float(got) == pytest.approx(loss, abs=1e-4)


def test_what_logits_to_keep_counts(model):
    """Tokens as passed, whatever was dropped or padded; the loss is over all labels all the same."""
    batch = collate(ROWS)
    whole = model(**batch)
    for kept in (3, torch.tensor([0, 5, -1])):
        part = model(**batch, logits_to_keep=kept)
        want = whole.logits[:, -kept:] if isinstance(kept, int) else whole.logits[:, kept]
        assert torch.equal(part.logits, want) and torch.equal(part.loss, whole.loss)
        scored = model(**{**collate(ROWS, ends=True), "labels": None}, logits_to_keep=kept)
        torch.testing.assert_close(scored.logits, want)
    assert whole.logits.shape[:2] == batch["labels"].shape
    assert scored.loss is None and whole.columns is None and whole.selection is None
    base = model.model(**{k: v for k, v in with_ends(ROWS).items() if k != "labels"})
    torch.testing.assert_close(model.lm_head(base.last_hidden_state), whole.logits)


@pytest.mark.parametrize("length", [0, 3, 60, torch.tensor([30.0] * 4), torch.tensor([30])])
def test_ends_that_cannot_be(dense, length):
    model = llava_sparse.sparsify(dense, "sparsevlm", budget=6)
    with pytest.raises(ValueError, match="prompt_length"):
        model(**{**collate(ROWS), "labels": None}, prompt_length=length)


def test_training_without_ends_is_told(dense, caplog):
    model = llava_sparse.sparsify(dense, "sparsevlm", budget=6).train()
    batch = {**collate(ROWS), "labels": None}
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model(**batch, prompt_length=41)
        assert not caplog.records
        model(**batch)
    assert "nothing says where prompts end" in caplog.text
