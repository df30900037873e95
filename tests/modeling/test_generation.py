"""Generation: every feature, over every method."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from transformers import CompileConfig, DynamicCache, TextIteratorStreamer, pipeline

import llava_sparse
from llava_sparse.modeling.method_vispruner import VisPruner
from llava_sparse.modeling.pruning_types import VisualTokens

NEW = 5
LOGITS = dict(rtol=0, atol=2e-4)


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "suppress_tokens": [4], **kwargs}
    return model.generate(**inputs, **kwargs)


def new_tokens(model, inputs, **kwargs):
    return generate(model, inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


def last_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def follows_text(model) -> bool:
    """Whether what is pruned depends on the prompt's text."""
    method = model.model.sparsifier
    return method.decoder is not None or method.encoder.looks_at_question


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch_equals_single_runs(model, processor, attention):
    model.set_attn_implementation(attention)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert (batch["attention_mask"] == 0).any()
    tokens, logits = new_tokens(model, batch), last_logits(model, batch)
    for row, question in enumerate(tiny.QUESTIONS):
        single = tiny.inputs(processor, question, seed=row)
        torch.testing.assert_close(logits[row], last_logits(model, single)[0], **LOGITS)
        assert tokens[row].tolist() == new_tokens(model, single)[0].tolist()


MIXED = [
    "USER: <image> <image> Is there a dog in the image ? ASSISTANT:",
    "USER: Is there a cat ? ASSISTANT:",
    "USER: <image> What car ? ASSISTANT:",
    "USER: <image> Is there a tree <image> in the red image ? ASSISTANT:",
]


def test_mixed_numbers_of_images_equal_single_runs(model, processor):
    batch = tiny.inputs(processor, MIXED)
    tokens, logits = new_tokens(model, batch), last_logits(model, batch)
    seed = 0
    for row, question in enumerate(MIXED):
        single = tiny.inputs(processor, question, seed=seed)
        seed += question.count("<image>")
        torch.testing.assert_close(logits[row], last_logits(model, single)[0], **LOGITS)
        assert tokens[row].tolist() == new_tokens(model, single)[0].tolist()


def test_without_image_runs_as_dense(model, dense, processor):
    batch = tiny.inputs(processor, ["USER: Is there a cat ? ASSISTANT:", "USER: What ? ASSISTANT:"])
    assert torch.equal(model(**batch).logits, dense(**batch).logits)
    assert torch.equal(generate(model, batch), generate(dense, batch))


def test_mixed_batch_row_without_image_is_dense(model, dense, processor):
    batch = tiny.inputs(processor, MIXED)
    dense_row = last_logits(dense, tiny.inputs(processor, MIXED[1]))[0]
    torch.testing.assert_close(last_logits(model, batch)[1], dense_row, **LOGITS)


def test_right_padding_equals_single_runs(model, processor):
    processor.tokenizer.padding_side = "right"
    try:
        batch = tiny.inputs(processor, tiny.QUESTIONS)
    finally:
        processor.tokenizer.padding_side = "left"
    with torch.no_grad():
        got = model(**batch)
    for row, question in enumerate(tiny.QUESTIONS):
        last = int(batch["attention_mask"][row].sum()) - 1
        index = last if got.columns is None else int((got.columns[row] == last).nonzero())
        single = last_logits(model, tiny.inputs(processor, question, seed=row))[0]
        torch.testing.assert_close(got.logits[row, index], single, **LOGITS)


@pytest.mark.parametrize("texts", [tiny.QUESTIONS, MIXED, tiny.QUESTIONS[:1]], ids=["padded", "mixed", "single"])
def test_both_processors_give_the_same_tokens(model, case, processor, texts):
    stock = tiny.inputs(processor, texts)
    ours = tiny.processor(llava_sparse.SparseLlavaProcessor, **case.config)
    short = tiny.inputs(ours, texts)
    assert new_tokens(model, stock).tolist() == new_tokens(model, short).tolist()
    torch.testing.assert_close(last_logits(model, stock), last_logits(model, short), **LOGITS)
    if case.lengths and model.model.sparsifier.encoder is not None:
        image_tokens = (short["input_ids"] == 4).sum().item()
        assert image_tokens == sum(t.count("<image>") for t in texts) * case.lengths[0]


def test_sampling_is_seeded(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(new_tokens(model, batch, do_sample=True, max_new_tokens=12).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_num_return_sequences(model, processor):
    batch = tiny.inputs(processor, MIXED)
    out = new_tokens(model, batch, do_sample=True, num_return_sequences=3, top_k=1)
    greedy = new_tokens(model, batch)
    assert torch.equal(out, greedy.repeat_interleave(3, dim=0))


def test_beams_equal_single_runs(model, processor):
    batch = tiny.inputs(processor, MIXED)
    beams = new_tokens(model, batch, num_beams=3)
    seed = 0
    for row, question in enumerate(MIXED):
        single = new_tokens(model, tiny.inputs(processor, question, seed=seed), num_beams=3)
        seed += question.count("<image>")
        assert beams[row].tolist() == single[0].tolist()


def test_beam_scores_match_a_forward_pass(model, case, processor):
    """Beam search must reorder masks and positions along with keys: rescore its result without a cache."""
    batch = tiny.inputs(processor, tiny.QUESTIONS[:2])
    out = generate(model, batch, num_beams=3, return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    whole = {
        **batch,
        "input_ids": out.sequences,
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1),
        "prompt_length": batch["input_ids"].shape[1],
    }
    with torch.no_grad():
        logp = model(**whole).logits.log_softmax(-1)[:, -NEW - 1 : -1]
    answer = out.sequences[:, -NEW:]
    torch.testing.assert_close(logp.gather(2, answer[..., None]).sum((1, 2)), out.sequences_scores, rtol=0, atol=1e-3)


def test_beams_from_embeddings_and_pixels(model, processor):
    batch = tiny.inputs(processor, MIXED[:1] + MIXED[2:])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    expected = new_tokens(model, batch, num_beams=2)
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "pixel_values": batch["pixel_values"]}
    assert torch.equal(generate(model, given, num_beams=2), expected)


@pytest.mark.parametrize("text", ["USER: dog", "USER: <image> <image> <image> dog"])
def test_beams_with_the_wrong_number_of_images(model, processor, text):
    ids = tiny.inputs(processor, text)
    ids["pixel_values"] = tiny.inputs(processor, "<image> <image>")["pixel_values"]
    with pytest.raises(ValueError, match="do not match"):
        generate(model, ids, num_beams=2)


def test_streamer(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    tokens = new_tokens(model, batch, streamer=streamer)
    assert "".join(streamer).split() == processor.decode(tokens[0]).split()


def test_return_dict_in_generate(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    out = generate(
        model, batch, return_dict_in_generate=True, output_logits=True, output_scores=True, output_hidden_states=True
    )
    assert torch.equal(out.sequences, generate(model, batch))
    assert len(out.logits) == len(out.hidden_states) == NEW
    assert torch.equal(torch.stack(out.logits, 1).argmax(-1), out.sequences[:, -NEW:])


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_cached_equals_uncached(model, processor, kwargs):
    """Images, also of a prompt that ends with one, are chosen from by the prompt, whatever has been answered so far."""
    batch = tiny.inputs(processor, [*tiny.QUESTIONS, *MIXED, "USER: red car <image>"])
    assert torch.equal(generate(model, batch, **kwargs), generate(model, batch, use_cache=False, **kwargs))


def test_cached_steps_equal_generate(model, processor):
    """A loop written by hand over `forward` gives what `generate` gives."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    expected = new_tokens(model, batch)
    mask = batch["attention_mask"]
    with torch.no_grad():
        out = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        tokens = [out.logits[:, -1].argmax(-1)]
        for _ in range(NEW - 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            position_ids = mask.cumsum(1)[:, -1:] - 1
            out = model(
                input_ids=tokens[-1][:, None],
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            tokens.append(out.logits[:, -1].argmax(-1))
    assert torch.stack(tokens, 1).tolist() == expected.tolist()


@pytest.mark.parametrize("text", [" Is there a red car ? ASSISTANT:", " Yes"], ids=["question", "token"])
def test_second_turn_on_the_returned_cache(model, processor, text):
    """The second turn's logits equal those of feeding its tokens one by one."""
    batch = tiny.inputs(processor, tiny.QUESTIONS[:2])
    out = generate(model, batch, return_dict_in_generate=True)
    more = processor.tokenizer([text] * 2, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([out.sequences, more], dim=1)
    mask = torch.nn.functional.pad(
        batch["attention_mask"], (0, ids.shape[1] - batch["attention_mask"].shape[1]), value=1
    )
    fed = more.shape[1] + 1  # generate leaves its last token out of the cache

    second = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=3, do_sample=False,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip

    again = generate(model, batch, return_dict_in_generate=True)
    cache = again.past_key_values
    with torch.no_grad():
        for step in range(fed):
            end = ids.shape[1] - fed + step + 1
            position_ids = mask[:, :end].cumsum(1)[:, -1:] - 1
            one = model(
                input_ids=ids[:, end - 1 : end],
                attention_mask=mask[:, :end],
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
    torch.testing.assert_close(second.logits[0], one.logits[:, -1], **LOGITS)


def test_second_turn_with_another_image(model, processor):
    """Encoder methods go on with the cache; decoder methods say that they cannot."""
    first = tiny.inputs(processor, tiny.QUESTIONS[:2])
    out = generate(model, first, return_dict_in_generate=True)
    turn = processor(
        images=[tiny.image(7), tiny.image(8)],
        text=["<image> What ?", "<image> No ?"],
        return_tensors="pt",
        padding=True,
    )
    more = turn["input_ids"][:, 1:]
    ids = torch.cat([out.sequences, more], dim=1)
    mask = torch.nn.functional.pad(
        first["attention_mask"], (0, ids.shape[1] - first["attention_mask"].shape[1]), value=1
    )
    arguments = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, attention_mask=mask)
    if model.model.sparsifier.decoder is not None:
        with pytest.raises(ValueError, match="cache that is not empty"):
            model.generate(ids, pixel_values=turn["pixel_values"], past_key_values=out.past_key_values, **arguments)
        return
    got = model.generate(ids, pixel_values=turn["pixel_values"], past_key_values=out.past_key_values, **arguments)
    if follows_text(model):
        assert got.shape == (2, ids.shape[1] + 3)
        return
    pixels = torch.stack([x for pair in zip(first["pixel_values"], turn["pixel_values"], strict=True) for x in pair])
    assert torch.equal(got, model.generate(ids, pixel_values=pixels, **arguments))


def test_kv_lengths(model, case, processor):
    if case.lengths is None:
        pytest.skip("the lengths follow from the budget's rule or from the data")
    for images in (1, 2):
        prompt = "USER: " + "<image> " * images + "Is there a dog ? ASSISTANT:"
        batch = tiny.inputs(processor, [prompt, prompt])
        text = batch["input_ids"].shape[1] - images * tiny.PATCHES
        with torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
        held = [layer.keys.shape[2] for layer in cache.layers]
        if images == 1:
            assert held == [text + visual for visual in case.lengths]
        assert held == [cache.get_seq_length(i) for i in range(len(held))]
        method = model.model.sparsifier
        if method.decoder is None:
            assert held == [text + images * visual for visual in case.lengths]
        else:
            entering = tiny.PATCHES if method.encoder is None else method.encoder.tokens
            assert held[0] == text + images * entering


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(model, case, processor, dtype, monkeypatch):
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    if case.method == "vispruner":
        # It compares in an order that rounding changes, and then keeps other patches (see its docstring): the choice is
        # that of the exact model here, and the arithmetic behind it is compared.
        (chosen,) = model.get_image_features(batch["pixel_values"]).tokens
        kept = (chosen.patch_index, chosen.scores)
        monkeypatch.setattr(VisPruner, "reduce", lambda self, vision: VisualTokens.kept(vision.features, *kept))
    exact = last_logits(model, batch)
    half = last_logits(model.to(dtype), batch)
    assert half.dtype == dtype and half.isfinite().all()
    cosine = torch.nn.functional.cosine_similarity(half.float(), exact)
    assert cosine.min() > 0.8
    assert new_tokens(model, batch).shape == (1, NEW)


def test_labels_with_stock_placeholders(model, dense, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    out = model(**batch, labels=labels)
    expected = []
    for row in range(len(labels)):
        logits = out.logits[row, -3:-1].log_softmax(-1)
        expected.append(-logits.gather(1, labels[row, -2:, None]))
    torch.testing.assert_close(out.loss, torch.stack(expected).mean())
    out.loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_labels_before_the_image_follow_their_tokens(model, processor):
    """Labels on all text: the loss over what is left equals a loss computed from the map of columns."""
    batch = tiny.inputs(processor, MIXED)
    labels = (
        batch["input_ids"].masked_fill(batch["input_ids"] == 4, -100).masked_fill(batch["attention_mask"] == 0, -100)
    )
    out = model(**batch, labels=labels)
    if out.columns is None:
        return
    kept = labels.gather(1, out.columns.clamp(min=0)).masked_fill(out.columns < 0, -100)
    assert (kept != -100).sum() == (labels != -100).sum()
    kept[:, 1:].masked_fill_(out.columns[:, :-1] == -2, -100)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), kept[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_a_ragged_batch_is_that_of_its_rows(model, processor, side):
    """Rows that shrink differently are padded anew: no row of padding may predict a label."""
    texts = ["USER: <image> <image> dog", "USER: <image> What red car ?", "USER: Is there a cat ?"]
    processor.tokenizer.padding_side = side
    try:
        batch = tiny.inputs(processor, texts)
    finally:
        processor.tokenizer.padding_side = "left"
    hidden = (batch["input_ids"] == 4) | (batch["attention_mask"] == 0)
    labels = batch["input_ids"].masked_fill(hidden, -100)
    total, count, seed = 0.0, 0, 0
    for text in texts:
        single = tiny.inputs(processor, text, seed=seed)
        seed += text.count("<image>")
        own = single["input_ids"].masked_fill(single["input_ids"] == 4, -100)
        predicted = int((own[:, 1:] != -100).sum())
        total += model(**single, labels=own).loss.item() * predicted
        count += predicted
    # A dense batch lets padding predict the first token of a row; where nothing moved, so does this one.
    got = model(**batch, labels=labels)
    if got.columns is None:
        pytest.skip("nothing was dropped")
    assert got.loss.item() == pytest.approx(total / count, abs=2e-4)


@pytest.mark.parametrize("kind", ["static", "offloaded_static"])
def test_static_cache(model, processor, kind):
    if kind == "offloaded_static" and not torch.cuda.is_available():
        pytest.skip("offloading needs a GPU")
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert torch.equal(generate(model, batch, cache_implementation=kind), generate(model, batch))


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_static_cache_compiled(model, processor, padded):
    """What `generate` does on a GPU: decoding steps compiled around a static cache, in one graph for all of them."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(backend=backend, mode=None, fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    batch = tiny.inputs(processor, tiny.QUESTIONS if padded else tiny.QUESTIONS[:1])
    torch._dynamo.reset()
    settings = {"cache_implementation": "static", "max_new_tokens": 8, "min_new_tokens": 8}
    compiled = generate(model, batch, **settings, compile_config=compile_config)
    assert torch.equal(compiled, generate(model, batch, max_new_tokens=8, min_new_tokens=8))
    assert len(graphs) == 1


def test_cache_made_by_the_caller(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    expected = generate(model, batch)
    for cache in (DynamicCache(), DynamicCache(config=model.config.get_text_config())):
        assert torch.equal(generate(model, batch, past_key_values=cache), expected)


REPEATING = "USER: <image> dog cat car tree dog cat car tree dog cat"


@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("helper", ["prompt_lookup", "assistant"])
def test_assisted_generation(model, processor, helper, seed):
    """Candidates are not pruned with the prompt, and rollbacks after rejected ones leave the tokens as they are."""
    batch = tiny.inputs(processor, REPEATING, seed=seed)
    expected = generate(model, batch, max_new_tokens=10)
    helpers = {"prompt_lookup": {"prompt_lookup_num_tokens": 2}, "assistant": {"assistant_model": tiny.dense_model()}}
    assert torch.equal(generate(model, batch, max_new_tokens=10, **helpers[helper]), expected)


def test_crop_into_the_prompt_is_refused(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    out = generate(model, batch, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="pruned prompt"):
        out.past_key_values.crop(-NEW - 1)


def test_cache_batch_operations(model, processor):
    """Selecting and repeating rows of the cache moves masks and positions along."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    with torch.no_grad():
        out = model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), use_cache=True)
        cache = out.past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)[rows]
        token = torch.full((4, 1), 7)
        got = model(
            input_ids=token, attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1, past_key_values=cache
        )
        for row, question in ((0, 2), (2, 0)):
            single = tiny.inputs(processor, tiny.QUESTIONS[question], seed=question)
            past = model(**single, use_cache=True).past_key_values
            length = single["input_ids"].shape[1]
            one = model(input_ids=token[:1], position_ids=torch.tensor([[length]]), past_key_values=past)
            torch.testing.assert_close(got.logits[row], one.logits[0], **LOGITS)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_cache_can_be_copied(model, processor, duplicate):
    """A prefix computed once and continued twice gives the same both times."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.full((3, 1), 7), "attention_mask": mask}
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        copied = duplicate(cache)
        first = model(**step, past_key_values=cache).logits
        assert torch.equal(model(**step, past_key_values=copied).logits, first)


def test_wrong_mask_length_on_a_shortened_cache(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        short = torch.ones(3, batch["input_ids"].shape[1] - 3)
        short[0, 0] = 0
        with pytest.raises(ValueError, match="whole conversation"):
            model(input_ids=torch.full((3, 1), 7), attention_mask=short, past_key_values=out.past_key_values)


def test_pipeline(model, processor):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    prompt = tiny.QUESTIONS[0]
    (answer,) = pipe(
        images=tiny.image(0),
        text=prompt,
        generate_kwargs=dict(max_new_tokens=NEW, do_sample=False),
        return_full_text=False,
    )
    batch = tiny.inputs(processor, prompt)
    expected = processor.decode(
        generate(model, batch, eos_token_id=2)[0, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answer["generated_text"].split() == expected.split()


@pytest.mark.slow
@pytest.mark.parametrize("case", [tiny.CASES[0], tiny.CASES[2]], ids=lambda c: c.name)
def test_compiled_forward(model, processor):
    """`torch.compile` gives the same; its eager backend traces without generating code."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **LOGITS)


def test_threads_do_not_mix_requests(model, processor):
    from concurrent.futures import ThreadPoolExecutor

    batches = [tiny.inputs(processor, question, seed=row) for row, question in enumerate(tiny.QUESTIONS)]
    expected = [generate(model, batch) for batch in batches] * 4
    batches *= 4
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda batch: generate(model, batch), batches), expected, strict=True):
            assert torch.equal(got, want)
