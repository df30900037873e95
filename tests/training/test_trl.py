"""TRL's trainers on pruned models: two steps each, and what they score is what the model's own loss scores."""

from __future__ import annotations

import pytest
import tiny
import torch

import llava_sparse

pytest.importorskip("trl", reason="pip install llava-sparse[trl]")

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

pytestmark = [pytest.mark.slow, pytest.mark.trl]
BUDGETS = {
    "visionzip": {"budget": 6},
    "sparsevlm": {"layers": [1, 2, 4], "budgets": [8, 5, 3]},
    "delegate": {"budget": 6},
}
each = pytest.mark.parametrize("method", BUDGETS)
QUESTIONS = ["Is there a dog ?", "What red car on the left ?"]


def said(role, *parts):
    return [{"role": role, "content": [{"type": "image"} if x is None else {"type": "text", "text": x} for x in parts]}]


def rows(*answers):
    """Conversations about a picture each; `answers` are columns with their texts."""
    data = [
        {
            "images": [tiny.image(i)],
            "prompt": said("user", None, question),
            **{k: said("assistant", v) for k, v in answers},
        }
        for i, question in enumerate(QUESTIONS)
    ]
    return Dataset.from_list(data)


def settings(folder, **kwargs):
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, "logging_steps": 1,
        "learning_rate": 0.0, **kwargs,
    }  # fmt: skip


def log_likelihoods(model, inputs, completion):
    """`(rows,)` of the completions, by the model's own loss of each row alone."""
    out = []
    for row in range(len(inputs["input_ids"])):
        there = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row][there][None], "pixel_values": inputs["pixel_values"][row][None]}
        kept = completion[row][there]
        labels = alone["input_ids"].masked_fill(~kept.bool()[None], -100)
        with torch.no_grad():
            out.append(-model(**alone, labels=labels).loss * kept.sum())
    return torch.stack(out)


def watched(trainer, name, seen):
    """Keeps what a method of the trainer is given and gives."""
    inner = getattr(trainer, name)

    def outer(*args, **kwargs):
        result = inner(*args, **kwargs)
        seen.append((args, kwargs, result))
        return result

    setattr(trainer, name, outer)


@each
@pytest.mark.parametrize("lora", [False, True])
def test_sft(dense, method, lora, tmp_path):
    adapters = {"peft_config": LoraConfig(r=2, target_modules=r".*language_model.*q_proj")} if lora else {}
    model = llava_sparse.sparsify(dense, method, **BUDGETS[method])
    config = SFTConfig(**settings(tmp_path), max_length=None)
    trainer = SFTTrainer(
        model, config, train_dataset=rows(("completion", "Yes")), processing_class=tiny.processor(), **adapters
    )
    seen = []
    watched(trainer, "compute_loss", seen)
    trainer.train()
    (_, inputs, *_), _, loss = seen[0]
    completion = inputs["labels"] != -100
    expected = -log_likelihoods(model, inputs, completion).sum() / completion.sum()
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=2e-4)
    assert len(seen) == 2


@each
def test_dpo(dense, method, tmp_path):
    """-log sigmoid(beta (what the model has gained on the reference for the chosen answer, less for the rejected))."""
    model, reference = (
        llava_sparse.sparsify(one, method, **BUDGETS[method]) for one in (dense, tiny.dense_model(seed=1))
    )
    config = DPOConfig(**settings(tmp_path), max_length=None, beta=0.3)
    trainer = DPOTrainer(
        model, reference, config, train_dataset=rows(("chosen", "Yes dog"), ("rejected", "No")),
        processing_class=tiny.processor(),
    )  # fmt: skip
    seen = []
    watched(trainer, "compute_loss", seen)
    trainer.train()
    (_, inputs, *_), _, loss = seen[0]
    gained = [log_likelihoods(one, inputs, inputs["completion_mask"]) for one in (model, reference)]
    chosen, rejected = (gained[0] - gained[1]).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=2e-4)
    assert len(seen) == 2


@each
def test_grpo(dense, method, tmp_path):
    """What it has said is scored as its own loss scores it."""
    model = llava_sparse.sparsify(dense, method, **BUDGETS[method])
    config = GRPOConfig(**settings(tmp_path), num_generations=2, max_completion_length=4, beta=0.0)

    def reward(completions, **kwargs):
        return [float(len(str(completion))) for completion in completions]

    trainer = GRPOTrainer(model, reward, config, train_dataset=rows(), processing_class=tiny.processor())
    scored, losses = [], []
    watched(trainer, "_get_per_token_logps_and_entropies", scored)
    watched(trainer, "compute_loss", losses)
    trainer.train()
    assert len(losses) == 2 and scored
    for args, kwargs, (logps, *_) in scored:
        _, ids, mask, kept = args[:4]
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": kwargs["pixel_values"]}
        completion = torch.zeros_like(mask)
        completion[:, -kept:] = mask[:, -kept:]
        own = (logps.detach() * mask[:, -kept:]).sum(-1)
        torch.testing.assert_close(own, log_likelihoods(model, inputs, completion), rtol=0, atol=1e-3)
