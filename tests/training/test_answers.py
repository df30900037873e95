"""The answer does not choose the tokens that predict it: by labels, logits and losses are those of a generation."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_sparse
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.reference import CHECKPOINT, SCENES

CLOSE = {"rtol": 0, "atol": 2e-4}
PAIRS = [
    ("USER: <image> Is there a dog in the image ? ASSISTANT:", "Yes red car"),
    ("USER: <image> and <image> What on the left ? ASSISTANT:", "No"),
    ("USER: What car ? ASSISTANT:", "two three dog big"),
    ("USER: Is there a tree ? <image>", "No small dog"),
    ("USER: No ? Is there <image> a cat ? ASSISTANT:", "Yes Yes"),
]


def labelled(processor, pairs, side, images=None):
    """Prompts with their answers, padded, and labels of the answers."""
    processor.tokenizer.padding_side = side
    batch = tiny.inputs(processor, [f"{prompt} {answer}" for prompt, answer in pairs])
    processor.tokenizer.padding_side = "left"
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (_, answer) in enumerate(pairs):
        columns = batch["attention_mask"][row].nonzero().flatten()[-len(answer.split()) :]
        labels[row, columns] = batch["input_ids"][row, columns]
    return {**batch, "labels": labels}


@torch.no_grad()
def stepwise(model, processor, pairs):
    """Of each pair alone the logits that a cached generation has for the answer, which it is made to give."""
    said, image = [], 0
    for prompt, answer in pairs:
        batch = tiny.inputs(processor, prompt, seed=image)
        image += prompt.count("<image>")
        answer = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model(**batch, use_cache=True)
        rows, mask = [out.logits[0, -1]], batch["attention_mask"]
        for token in answer[0, :-1]:
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            out = model(input_ids=token.view(1, 1), attention_mask=mask, past_key_values=out.past_key_values)
            rows.append(out.logits[0, -1])
        said.append(torch.stack(rows))
    return said


def answers_of(logits, labels):
    """The rows of logits that a loss computed outside takes for the labels."""
    return [row[:-1][own[1:] != -100] for row, own in zip(logits, labels, strict=True)]


def outside(logits, labels, **kwargs):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, **kwargs)


def check(model, processor, pairs=PAIRS, ours=None):
    expected = stepwise(model, processor, pairs)
    for side in ("left", "right"):
        batch = labelled(ours or processor, pairs, side)
        out = model(**batch)
        assert out.logits.shape[:2] == batch["labels"].shape and out.columns is None
        for got, want in zip(answers_of(out.logits, batch["labels"]), expected, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
        torch.testing.assert_close(outside(out.logits, batch["labels"]), out.loss)
        assert float(model(**batch, as_passed=False).loss) == float(out.loss)


def test_answers_as_in_generation(model, case, processor):
    check(model, processor)


def test_answers_as_in_generation_with_shortened_placeholders(model, case, processor):
    check(model, processor, ours=tiny.processor(llava_sparse.SparseLlavaProcessor, **case.config))


def test_the_first_answer_about_the_image_ends_the_prompt(model, processor):
    """Later turns do not rate, whether they are labelled or not; nor do labels in front of the image end anything."""
    first, answer = "USER: What car ? ASSISTANT: No dog USER: <image> Is there a tree ? ASSISTANT:", "Yes red"
    (expected,) = stepwise(model, processor, [(first, answer)])
    batch = tiny.inputs(processor, f"{first} {answer} USER: What two cat ? ASSISTANT: small")
    end = tiny.inputs(processor, first)["input_ids"].shape[1]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, end : end + 2] = batch["input_ids"][:, end : end + 2]
    for columns in ([], [5, 6], [-1], [6, -1]):
        own = labels.clone()
        own[:, columns] = batch["input_ids"][:, columns]
        out = model(**batch, labels=own)
        torch.testing.assert_close(out.logits[0, end - 1 : end + 1], expected, **CLOSE)
        torch.testing.assert_close(outside(out.logits, own), out.loss)
    for told in (end, torch.tensor([end])):
        assert torch.equal(model(**batch, prompt_length=told).logits, out.logits)


def goes_on(model, processor, **kwargs):
    """An answer that has begun, told from its prompt, goes on as it did in the generation that began it."""
    batch = tiny.inputs(processor, [prompt for prompt, _ in PAIRS])
    end = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "suppress_tokens": [4], **kwargs}
    said = model.generate(**batch, **settings)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
    begun = {**batch, "input_ids": said[:, : end + 2], "attention_mask": mask, "prompt_length": end}
    for own in ({}, {"prompt_length": torch.full((len(said),), end)}):
        assert torch.equal(model.generate(**begun | own, **{**settings, "max_new_tokens": 3}), said)


def test_an_answer_goes_on(model, processor):
    goes_on(model, processor)


TRIMMED = [
    pytest.param(case, marks=[pytest.mark.slow] if case.slow else [], id=case.name)
    for case in tiny.CASES
    if case.method.split("+")[-1] in ("fastv", "pyramiddrop", "sparsevlm")
]


def trimmed(dense, case):
    """The case with trimmed caches, whatever its options are."""
    options = dict(case.settings.get("options", {}))
    second = case.method.split("+")[-1]
    options |= {second: {"trim_cache": True}} if "+" in case.method else {"trim_cache": True}
    return llava_sparse.sparsify(dense, case.method, **{**case.settings, "options": options})


@pytest.mark.parametrize("case", TRIMMED)
def test_answers_on_trimmed_caches(dense, processor, case):
    model = trimmed(dense, case)
    check(model, processor)
    # The first token is that of the whole cache, the others are not.
    whole = llava_sparse.sparsify(dense, case.method, **case.settings)
    batch = labelled(processor, PAIRS[:1], "left")
    (own,), (other,) = (answers_of(one(**batch).logits, batch["labels"]) for one in (model, whole))
    torch.testing.assert_close(own[0], other[0], **CLOSE)
    assert (own[1:] - other[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("case", TRIMMED)
def test_trimmed_caches_go_on(dense, processor, case):
    """Without a cache, and behind a pass that had answers in it too, steps see what they see in a generation."""
    model = trimmed(dense, case)
    goes_on(model, processor)
    batch = tiny.inputs(processor, [prompt for prompt, _ in PAIRS])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [4]}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))
    batch = labelled(processor, PAIRS, "left")
    labels = batch.pop("labels")
    ends = torch.where(labels != -100, torch.arange(labels.shape[1]), labels.shape[1]).amin(-1)
    with torch.no_grad():
        out = model(**batch, prompt_length=ends, use_cache=True)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        step = model(
            input_ids=torch.full((len(PAIRS), 1), processor.tokenizer.convert_tokens_to_ids("big")),
            attention_mask=mask,
            past_key_values=out.past_key_values,
        )
    expected = stepwise(model, processor, [(prompt, f"{answer} big dog") for prompt, answer in PAIRS])
    torch.testing.assert_close(step.logits[:, 0], torch.stack([rows[-1] for rows in expected]), **CLOSE)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


# One behind the projector, two kinds of raters in the decoder.
ASKING = ("delegate", "fastv", "sparsevlm")
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (None, "divprune+sparsevlm", *sorted(METHODS))
    if name not in ASKING
]


@pytest.mark.parametrize("method", [*ASKING, *OTHERS])
def test_yes_and_no_share_one_probability(reference, method):
    """On questions of the reference evaluation, by losses as by the prompt's own logits."""
    own = AutoProcessor.from_pretrained(CHECKPOINT)
    model = llava_sparse.sparsify(reference, method, None if method is None else 64)
    rows = json.loads("[" + ",".join((SCENES / "scenes_pope_adversarial.json").read_text().splitlines()) + "]")
    rows = [row for row in rows if row["question_id"] in (7, 19, 20, 31)]
    pictures = [Image.open(SCENES / "images" / row["image"]) for row in rows]
    prompts = [f"USER: <image>\n{row['text']} ASSISTANT:" for row in rows]
    shares = []
    with torch.no_grad():
        own.tokenizer.padding_side = "left"
        said = model(**own(images=pictures, text=prompts, return_tensors="pt", padding=True)).logits[:, -1].softmax(-1)
        own.tokenizer.padding_side = "right"
        for answer in ("Yes", "No"):
            texts = [f"{prompt} {answer}" for prompt in prompts]
            batch = own(images=pictures, text=texts, return_tensors="pt", padding=True)
            last = batch["attention_mask"].sum(-1, keepdim=True) - 1
            labels = torch.full_like(batch["input_ids"], -100).scatter(1, last, batch["input_ids"].gather(1, last))
            out = model(**batch, labels=labels)
            logp = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            shares.append((-logp.view(len(rows), -1).sum(-1)).exp())
            told = said.gather(1, batch["input_ids"].gather(1, last))[:, 0]
            torch.testing.assert_close(shares[-1], told, rtol=0, atol=1e-4)
    assert float(torch.stack(shares).sum(0).max()) <= 1 + 1e-4


def test_trimmed_caches_need_a_cache(dense, processor):
    model = llava_sparse.sparsify(dense, "fastv", layers=[1], budgets=[6], options={"trim_cache": True}).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="train with trim_cache=False, or without gradient checkpointing"):
        model(**labelled(processor, PAIRS[:1], "right"))
