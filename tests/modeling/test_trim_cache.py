"""Pruned tokens leave the cache of the earlier layers too: what answers then see, and what they still count."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache

import llava_sparse

SETTINGS = [
    ("sparsevlm", {"layers": [0, 2], "budgets": [6, 3]}, {}),
    ("sparsevlm", {"layers": [1, 3], "budgets": [9, 4]}, {"version": "2.0"}),
    ("sparsevlm", {"layers": [0, 2]}, {"version": "1.0", "scale": 0.6}),
    ("random_decoder", {"layers": [1, 3], "budgets": [6, 3]}, {}),
    ("random_decoder", {"layers": [1, 5], "budgets": [6, 3]}, {"positions": "compact"}),
]
each = pytest.mark.parametrize(("method", "settings", "options"), SETTINGS)


def pruned(dense, method, settings, options, trim=True):
    return llava_sparse.sparsify(dense, method, **settings, options={**options, "trim_cache": trim})


def generate(model, batch, **settings):
    with torch.no_grad():
        return model.generate(**batch, do_sample=False, **{"max_new_tokens": 6, "min_new_tokens": 6, **settings})


@each
def test_first_token_is_the_same_and_the_cache_smaller(dense, processor, method, settings, options):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    whole, trimmed = (
        pruned(dense, method, settings, options, trim)(**batch, as_passed=False) for trim in (False, True)
    )
    assert torch.equal(whole.logits, trimmed.logits)
    lengths = [layer.keys.shape[2] for layer in trimmed.past_key_values.layers]
    last = whole.logits.shape[1]
    assert lengths == [last] * len(lengths)
    assert last < whole.past_key_values.layers[0].keys.shape[2]


def test_steps_are_those_of_a_stock_decoder_on_the_tokens_that_are_left(dense, processor):
    """One stage, original positions, nothing merged: every layer holds the same tokens, as if there were no others."""
    model = pruned(dense, "random_decoder", {"layers": [2], "budgets": [5]}, {})
    batch = tiny.inputs(processor, tiny.QUESTIONS[:1])
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        out = model(**batch, output_selection=True)
        left = sorted(set(range(length)) - set((batch["input_ids"][0] == 4).nonzero().flatten().tolist()))
        start = (batch["input_ids"][0] == 4).nonzero()[0].item()
        left = sorted(left + [start + n for n in out.selection[0].kept[0].tolist()])
        # The stock decoder's own keys of the whole prompt, of which layers 0 to 2 have to hold just these.
        features = dense.model.get_image_features(batch["pixel_values"]).pooler_output
        embeds = dense.get_input_embeddings()(batch["input_ids"])
        embeds = embeds.masked_scatter((batch["input_ids"] == 4)[..., None], torch.cat(list(features)))
        stock = dense.model.language_model(inputs_embeds=embeds, use_cache=True).past_key_values
        cache = DynamicCache()
        for index, layer in enumerate(out.past_key_values.layers):
            if index <= 2:
                torch.testing.assert_close(layer.keys, stock.layers[index].keys[:, :, left])
                torch.testing.assert_close(layer.values, stock.layers[index].values[:, :, left])
            cache.update(layer.keys.clone(), layer.values.clone(), index)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = batch["attention_mask"]
        for step in range(4):
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            position = torch.tensor([[length + step]])
            ours = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
            theirs = dense.model.language_model(input_ids=token, position_ids=position, past_key_values=cache)
            expected = dense.lm_head(theirs.last_hidden_state)
            torch.testing.assert_close(ours.logits, expected, rtol=0, atol=1e-4)
            token = ours.logits[:, -1].argmax(-1, keepdim=True)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_nothing_pruned_is_the_dense_model(dense, processor, positions):
    model = pruned(dense, "random_decoder", {"layers": [1, 3], "budgets": [16, 16]}, {"positions": positions})
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert torch.equal(generate(model, batch), generate(dense, batch))


@each
def test_batch_equals_single_and_beams_run(dense, processor, method, settings, options):
    model = pruned(dense, method, settings, options)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    together = generate(model, batch)[:, batch["input_ids"].shape[1] :]
    for row, question in enumerate(tiny.QUESTIONS):
        single = tiny.inputs(processor, question, seed=row)
        assert torch.equal(generate(model, single)[0, single["input_ids"].shape[1] :], together[row])
        beams = generate(model, single, num_beams=3)
        assert beams.shape == (1, single["input_ids"].shape[1] + 6)
    assert torch.equal(generate(model, batch, use_cache=True), generate(model, batch))


def test_beam_of_one_choice_is_greedy(dense, processor):
    """Rows that change places take mask and positions along: three equal prompts under any order."""
    model = pruned(dense, *SETTINGS[0])
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    with torch.no_grad():
        out = model(**batch)
        cache = out.past_key_values
        order = torch.tensor([2, 0, 1])
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        moved = copy.deepcopy(cache)
        moved.reorder_cache(order)
        straight = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
        turned = model(input_ids=token[order], attention_mask=mask[order], past_key_values=moved).logits
    torch.testing.assert_close(turned, straight[order])


def test_answers_see_less(dense, processor):
    """The option does something: from the second token on, logits differ."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    scores = [
        torch.stack(generate(pruned(dense, *SETTINGS[0], trim), batch, output_logits=True,
                             return_dict_in_generate=True).logits)
        for trim in (False, True)
    ]  # fmt: skip
    torch.testing.assert_close(scores[0][0], scores[1][0])
    assert (scores[0][1] - scores[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["static", "sliding"])
def test_other_caches_are_refused(dense, processor, kind):
    model = pruned(tiny.dense_model("mistral") if kind == "sliding" else dense, *SETTINGS[0])
    batch = tiny.inputs(processor, tiny.QUESTIONS[:1])
    config = model.config.text_config
    if kind == "sliding":
        cache = DynamicCache(config=config)
        if type(cache.layers[0]).__name__ == "DynamicLayer":
            pytest.skip("this model's window is not kept by its cache")
    else:
        cache = StaticCache(config=config, max_cache_len=64)
    with pytest.raises(ValueError, match="trim_cache=True works on a dynamic cache"):
        model(**batch, past_key_values=cache, use_cache=True)


def test_without_a_cache_nothing_changes(dense, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    model = pruned(dense, *SETTINGS[0])
    assert torch.equal(model(**batch, use_cache=False).logits, model(**batch).logits)


def test_bad_value(dense):
    with pytest.raises(ValueError, match="'trim_cache' must be true or false, got 'yes'"):
        llava_sparse.sparsify(dense, "sparsevlm", budget=8, options={"trim_cache": "yes"})


def test_next_turn_of_a_conversation(dense, processor):
    """More text behind a trimmed prompt, several tokens at once, is the same as one by one."""
    model = pruned(dense, *SETTINGS[0])
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    more = torch.tensor([[9, 10, 11]])
    logits = []
    for parts in ([more], [more[:, :1], more[:, 1:]]):
        with torch.no_grad():
            cache = model(**batch).past_key_values
            mask = batch["attention_mask"]
            for part in parts:
                mask = torch.cat([mask, torch.ones_like(part)], dim=1)
                out = model(input_ids=part, attention_mask=mask, past_key_values=cache)
        logits.append(out.logits[:, -1])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
