"""Delegate: relevance, coverage, and tokens that count for those they stand for."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

import llava_sparse
from llava_sparse.modeling.method_delegate import constituents, word_relevance
from llava_sparse.modeling.pruning_inputs import DecoderInputs, weigh
from llava_sparse.modeling.pruning_ops import cosines, greedy_coverage
from llava_sparse.modeling.pruning_sequence import PromptLayout
from llava_sparse.modeling.pruning_types import Question

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture
def model():
    return llava_sparse.sparsify(tiny.dense_model(), "delegate", budget=5)


@QUICK
@given(seed=st.integers(0, 9999), patches=st.integers(1, 20), budget=st.integers(1, 20), ties=st.booleans())
def test_choice_and_constituents_against_loops(seed, patches, budget, ties):
    random, count = torch.Generator().manual_seed(seed), min(patches, budget)
    x = torch.randn(2, patches, 8, generator=random)
    demand = torch.rand(2, patches, generator=random)
    if ties:
        # Signs and powers of two: nothing rounds.
        x = torch.randint(0, 2, (2, patches, 16), generator=random) * 2.0 - 1
        demand = torch.randint(0, 3, (2, patches), generator=random) / 2
    similarity = cosines(x)
    order = greedy_coverage(similarity, demand, count)[0]
    sizes = constituents(similarity, order.sort(dim=-1).values)
    for row in range(2):
        s, chosen = similarity[row].double().tolist(), []
        covered = [0.0] * patches
        for token in order[row].tolist():
            gain = {
                j: sum(w * max(0.0, s[j][i] - covered[i]) for i, w in enumerate(demand[row].tolist()))
                for j in range(patches)
                if j not in chosen
            }
            most = max(gain.values())
            assert gain[token] == pytest.approx(most, rel=1e-4, abs=1e-5)
            if ties:
                assert token == min(j for j in gain if gain[j] == most)
            chosen.append(token)
            covered = [max(a, b) for a, b in zip(covered, s[token], strict=True)]
        kept = sorted(chosen)
        owners = [
            kept.index(i) if i in kept else max(range(count), key=lambda j: s[kept[j]][i]) for i in range(patches)
        ]
        assert sizes[row].tolist() == [owners.count(j) for j in range(count)]


def test_relevance_is_that_of_the_nearest_word():
    visual, text = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    got = word_relevance(visual, Question(text, valid))
    for patch in range(5):
        near = [torch.cosine_similarity(visual[0, patch], word, dim=0) for word in text[0, :2]]
        assert got[0, patch] == pytest.approx(max(near).item(), abs=1e-5)
    assert got[1].tolist() == [0] * 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_token_counts_for_as_many_as_it_stands_for(attention):
    """In one layer, weights 3, 1, 2 are three, one and two equal tokens at one position."""
    dense = tiny.dense_model()
    dense.config.text_config.num_hidden_layers = 1
    dense.set_attn_implementation(attention)
    decoder = dense.model.language_model
    decoder.config.num_hidden_layers = 1
    embeds, weights = torch.randn(1, 5, 64), torch.tensor([[3, 1, 2]])
    visual = torch.tensor([[False, True, True, True, False]])
    inputs = weigh(
        DecoderInputs(embeds, None, None), PromptLayout.of(visual, None), weights, None, dense.config.text_config
    )
    index = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4])
    with torch.no_grad():
        got = decoder(inputs_embeds=embeds, attention_mask=inputs.attention_mask, use_cache=False).last_hidden_state
        wanted = decoder(
            inputs_embeds=embeds[:, index],
            position_ids=index[None],
            attention_mask=_causal(len(index)),
            use_cache=False,
        ).last_hidden_state
    torch.testing.assert_close(got[:, -1], wanted[:, -1], rtol=0, atol=1e-5)


def _causal(length: int) -> torch.Tensor:
    """As positions repeat, a mask has to be given, or they would be read as packed sequences."""
    seen = torch.ones(length, length).tril().bool()
    return torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)


def test_weights_stay_in_the_cache(model, processor):
    """A step behind the prompt sees what a whole pass over both sees, padded rows and dropped placeholders too."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        plain = llava_sparse.sparsify(tiny.dense_model(), "delegate", budget=5, options={"proportional": False})
        assert not torch.allclose(out.logits[:, -1], plain(**batch).logits[:, -1], atol=1e-3)
        word = torch.full((3, 1), 21)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        step = model(input_ids=word, attention_mask=mask, past_key_values=out.past_key_values).logits[:, -1]
        features = model.get_image_features(batch["pixel_values"])
        for row in range(3):
            own = batch["attention_mask"][row].bool()
            ids = torch.cat([batch["input_ids"][row][own], word[0]])[None]
            first = ids[0].tolist().index(4)
            # What was asked when the tokens were chosen: without the word behind it.
            asked = model.get_input_embeddings()(ids[:, first + tiny.PATCHES : -1])
            question = Question(asked, torch.ones(asked.shape[:2], dtype=torch.bool))
            reduced = model.model.reduced(model.model.sparsifier, features.take([row]), question)
            (tokens,) = reduced.tokens
            assert tokens.token_sizes.sum() == tiny.PATCHES and tokens.token_sizes.shape == (1, 5)
            for written in (tiny.PATCHES, 5):
                kept = torch.cat([ids[:, : first + written], ids[:, first + tiny.PATCHES :]], dim=1)
                whole = model(input_ids=kept, mm_encoder_outputs={"image": reduced}).logits[:, -1]
                torch.testing.assert_close(step[row], whole[0], rtol=0, atol=2e-4)


def test_what_cannot_be_weighed_says_so(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa' or 'eager' is allowed, or sparse_options"):
        model(**batch)
    with pytest.raises(ValueError, match="'proportional': False"):
        llava_sparse.sparsify(tiny.dense_model(), "delegate+fastv", budget=4)
    options = {"delegate": {"proportional": False}}
    composed = llava_sparse.sparsify(tiny.dense_model(), "delegate+fastv", budget=4, options=options)
    assert composed(**batch).logits.isfinite().all()


def test_a_decoder_of_two_kinds_of_attention_says_so(processor):
    """One mask for all its layers would be wrong for some of them."""
    config = tiny.config("qwen2")
    half = tiny.LAYERS // 2
    config.text_config.layer_types = ["full_attention"] * half + ["sliding_attention"] * half
    config.text_config.sliding_window = 4
    dense = LlavaForConditionalGeneration(config).eval()
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    with pytest.raises(ValueError, match="full_attention, sliding_attention attention in one decoder"):
        llava_sparse.sparsify(dense, "delegate", budget=5)(**batch)
    plain = llava_sparse.sparsify(dense, "delegate", budget=5, options={"proportional": False})
    assert plain(**batch).logits.isfinite().all()


def test_a_window_hides_what_is_outside_of_it(processor):
    """With a window, weights of one are what stock attention makes of it: all patches are kept."""
    config = tiny.config("mistral")
    config.text_config.sliding_window = 6
    torch.manual_seed(0)
    dense = LlavaForConditionalGeneration(config).eval()
    batch = tiny.inputs(processor, tiny.QUESTIONS[:1])
    with torch.no_grad():
        wanted = dense(**batch).logits
        got = llava_sparse.sparsify(dense, "delegate", budget=tiny.PATCHES)(**batch).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)
    config.text_config.sliding_window = None
    with torch.no_grad():
        assert not torch.allclose(dense(**batch).logits, wanted, atol=1e-3)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_on_every_cache(model, processor, cache):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    arguments = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    wanted = model.generate(**batch, **arguments)
    assert model.generate(**batch, **arguments, cache_implementation=cache).tolist() == wanted.tolist()


@pytest.mark.parametrize("backbone", ["mistral", "qwen2"])
def test_on_other_backbones(backbone, processor):
    model = llava_sparse.sparsify(tiny.dense_model(backbone), "delegate", budget=5)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    together = model(**batch).logits[:, -1]
    for row, question in enumerate(tiny.QUESTIONS):
        alone = model(**tiny.inputs(processor, question, seed=row)).logits[0, -1]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=2e-4)
