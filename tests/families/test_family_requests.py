"""What callers ask of a model, crossed over families: caches, turns, offloaded and quantised weights, pipelines."""

from __future__ import annotations

import pytest
import torch
from cost import Watch
from family_calls import LOGITS, NEW, batch_of, last, placeholders, pruned, settings, tokens
from family_cases import FAMILIES
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, pipeline

import llava_sparse
from llava_sparse.modeling.pruning_cache import CACHE
from llava_sparse.modeling.pruning_registry import METHODS

pytestmark = pytest.mark.slow
# One of each place: in the tower, behind the projector, between the decoder's layers.
PLACES = ("visionzip", "divprune", "sparsevlm")


def crossing(*methods: str):
    cells = [(family, method) for family in FAMILIES for method in methods if method in family.methods]
    return pytest.mark.parametrize(("family", "method"), cells, ids=str)


def in_a_row(batch: dict) -> dict:
    """The prompts of a batch, behind each other, as one, with the pictures of all."""
    there = batch["attention_mask"].bool()
    of_tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: x[there][None] if name in of_tokens else x for name, x in batch.items()}


# --- Caches ------------------------------------------------------------------------------------------------------


@crossing(*PLACES, "delegate", "tome", "visionzip+sparsevlm")
def test_a_static_cache(family, method):
    model, batch = pruned(family, method), batch_of(family)
    static = tokens(model, batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, tokens(model, batch))


@crossing(*PLACES, "cdpruner", "fastv")
@torch.no_grad()
def test_a_second_turn(family, method):
    """On the cache as in one pass in which the first turn chooses."""
    model, batch = pruned(family, method), batch_of(family)
    prompt = batch["input_ids"].shape[1]
    kwargs = {"do_sample": False, "eos_token_id": None, "suppress_tokens": placeholders(model)}
    first = model.generate(**batch, max_new_tokens=NEW, return_dict_in_generate=True, **kwargs)
    more = torch.tensor([[7, 8, 9]]).expand(len(first.sequences), -1)
    ids = torch.cat([first.sequences, more], dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, ids.shape[1] - prompt), value=1)
    second = model.generate(
        ids, attention_mask=mask, max_new_tokens=2, output_logits=True, **{CACHE: first.past_key_values},
        return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    whole = {**batch, "input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in batch:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, ids.shape[1] - prompt))
    at_once = model(**whole, prompt_length=prompt, as_passed=True).logits[:, -1]
    torch.testing.assert_close(second.logits[0], at_once, **LOGITS)


@crossing(*PLACES, "fastv", "random")
@torch.no_grad()
def test_another_picture_on_the_cache(family, method):
    """Encoder methods go on as if the pictures had come at once; decoder methods say that they cannot."""
    model = pruned(family, method)
    texts = ["USER: <image> Is there a dog ? ASSISTANT:", "USER: <image> What tree ? ASSISTANT:"]
    whole, first, second = (
        in_a_row(batch_of(family, texts)),
        batch_of(family, texts[:1]),
        batch_of(family, texts[1:], 1),
    )
    cache = model(**first, use_cache=True).past_key_values
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    behind = {**second, "attention_mask": mask, CACHE: cache}
    if model.model.sparsifier.decoder is not None:
        with pytest.raises(ValueError, match="cache that is not empty"):
            model(**behind)
        return
    torch.testing.assert_close(last(model, behind), last(model, whole), **LOGITS)


# --- Sampling ----------------------------------------------------------------------------------------------------


@crossing(*PLACES)
def test_sampling(family, method):
    """The same seed gives the same answers; several of a prompt differ, and come from the prompt's own logits."""
    model, batch = pruned(family, method), batch_of(family)
    kwargs = {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0, "top_k": 5}
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(tokens(model, batch, **kwargs))
    assert torch.equal(*found) and len({tuple(row) for row in found[0].tolist()}) > len(family.texts)
    logits = last(model, batch)
    logits[:, placeholders(model)] = -torch.inf
    best = logits.topk(5).indices.repeat_interleave(3, dim=0)
    assert bool((best == found[0][:, :1]).any(-1).all())


# --- Weights that are elsewhere, or in four bits -------------------------------------------------------------------


@crossing(*PLACES)
def test_offloaded_weights(family, method, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = tokens(pruned(family, method), batch_of(family))
    for offload, arguments in ((accelerate.cpu_offload, {}), (accelerate.disk_offload, {"offload_dir": tmp_path})):
        model = llava_sparse.sparsify(family.make(), method, family.budget)
        offload(model, execution_device=torch.device("cpu"), **arguments)
        assert any(p.device.type == "meta" for p in model.parameters())
        assert torch.equal(tokens(model, batch_of(family)), expected)


@crossing(*PLACES)
def test_four_bits(family, method, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder, config = family.save(tmp_path), BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    load = AutoModelForImageTextToText.from_pretrained
    model = load(folder, quantization_config=config, **settings(family, method)).eval()
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds
    said = tokens(model, batch_of(family))
    twin = llava_sparse.sparsify(load(folder, quantization_config=config).eval(), method, family.budget)
    assert torch.equal(tokens(twin, batch_of(family)), said)


# --- Pipelines ---------------------------------------------------------------------------------------------------


@crossing(*PLACES)
def test_a_pipeline(family, method):
    """With our processor; what it answers is what `generate` does."""
    model, processor = pruned(family, method), family.processor(**settings(family, method))
    text = next(text for text in family.texts if text.count("<image>") == 1 and "<video>" not in text)
    shown = {}

    def spy(**given):
        shown.update(given)
        return processor(**given)

    batch = family.inputs(spy, [text], 0)
    said = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, batch["input_ids"].shape[1] :]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    (answer,) = pipe(
        images=shown["images"][0], text=shown["text"][0], return_full_text=False,
        generate_kwargs={"max_new_tokens": NEW, "do_sample": False},
    )  # fmt: skip
    assert answer["generated_text"].split() == processor.decode(said[0], skip_special_tokens=True).split()


# --- Cost --------------------------------------------------------------------------------------------------------


@crossing("visionzip", "sparsevlm", "fastv", "pyramiddrop", "random_decoder")
@torch.no_grad()
def test_no_matrix_of_length_by_length(family, method):
    model = pruned(family, method)
    text = "USER: " + "<image> " * 16 + "Is there a dog ? ASSISTANT:"
    batch = batch_of(family, [text])
    length = batch["input_ids"].shape[1]
    assert length > 200
    with Watch() as watch:
        model(**batch, output_selection=True)
    assert "scaled_dot_product" in " ".join(watch.names) and watch.square(200) == []
    if METHODS[method].kind == "decoder":
        eager = llava_sparse.sparsify(family.make(), method, family.budget)
        eager.set_attn_implementation("eager")
        with Watch() as watch:
            eager(**batch)
        assert watch.square(200)
