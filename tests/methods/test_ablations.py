"""Parts of the methods switched off one by one, against plain loops."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionModel

import llava_sparse
from llava_sparse import SparseLlavaConfig
from llava_sparse.modeling import pruning_decoder
from llava_sparse.modeling.method_sparsevlm import text_raters
from llava_sparse.modeling.method_visionzip import VisionZip
from llava_sparse.modeling.pruning_settings import Sparsity
from llava_sparse.modeling.pruning_types import Geometry, VisionFeatures

LOGITS = dict(rtol=0, atol=2e-4)
STAGES = {"layers": [0, 2], "budgets": [6, 3]}
IMAGE = 4


def last_logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[:, -1]


def stages_of(model, batch):
    with torch.no_grad():
        return model(**batch, output_selection=True).selection


# --- SparseVLM: who rates ------------------------------------------------------------------------------------------


def words_that_rate(model, batch, row):
    """Columns of the raters of a row as the paper defines them, from its embeddings alone."""
    ids = batch["input_ids"][row]
    features = torch.stack(list(model.get_image_features(batch["pixel_values"]).pooler_output))[row]
    text = ids[(ids == IMAGE).nonzero().max() + 1 :]
    words = model.get_input_embeddings()(text)
    raters, _ = text_raters(features[None], words[None], torch.ones(1, len(text), dtype=torch.bool))
    return (raters[0].nonzero().flatten() + len(ids) - len(text)).tolist()


@pytest.mark.parametrize("raters", ["selected", "text"])
@pytest.mark.parametrize("version", ["1.0", "1.5", "2.0"])
@torch.no_grad()
def test_raters_are_returned_as_columns_of_the_caller(dense, processor, raters, version):
    given = {"layers": [0, 2]} if version == "1.0" else STAGES
    model = llava_sparse.sparsify(dense, "sparsevlm", **given, options={"raters": raters, "version": version})
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert (batch["attention_mask"] == 0).any()
    for stage in stages_of(model, batch):
        assert stage.raters.dtype == torch.int64 and stage.raters.shape[0] == 3
        for row, question in enumerate(tiny.QUESTIONS):
            columns = stage.raters[row][stage.raters[row] >= 0].tolist()
            after = question.split("<image> ")[1].split()
            length = batch["input_ids"].shape[1]
            if raters == "text":
                assert columns == list(range(length - len(after), length))
                assert processor.decode(batch["input_ids"][row, columns]).split() == after
            else:
                assert columns == words_that_rate(model, batch, row)
                assert 0 < len(columns) < len(after)


@torch.no_grad()
def test_raters_of_a_mixed_batch(dense, processor):
    """Rows with several images or none, padded anew after the first stage: the columns stay the caller's."""
    model = llava_sparse.sparsify(dense, "sparsevlm", **STAGES)
    texts = ["USER: <image> <image> Is there a dog ? ASSISTANT:", "USER: Is there a cat ?", "What red car ? <image>"]
    batch = tiny.inputs(processor, texts)
    first, second = stages_of(model, batch)
    assert torch.equal(first.raters, second.raters)
    assert (first.raters[1] == -1).all()
    ids, seed = batch["input_ids"], 0
    for row, text in enumerate(texts):
        words = processor.decode(ids[row, first.raters[row][first.raters[row] >= 0]]).split()
        allowed = text.split("<image>")[-1].split() or ["<s>", *text.split("<image>")[0].split()]
        assert set(words) <= set(allowed)
        if "<image>" in text:
            (alone, _) = stages_of(model, single := tiny.inputs(processor, text, seed=seed))
            assert processor.decode(single["input_ids"][0, alone.raters[0][alone.raters[0] >= 0]]).split() == words
        seed += text.count("<image>")
    model.set_sparsity("visionzip", budget=5)
    assert stages_of(model, batch)[0].raters is None


@pytest.mark.parametrize("recycle", [True, False])
@pytest.mark.parametrize("raters", ["selected", "text", "all"])
@pytest.mark.parametrize("block", [4, 64])
def test_scores_are_means_of_the_attention_matrix(dense, processor, monkeypatch, raters, recycle, block):
    """At every stage, from the whole matrix that eager attention leaves: rows that rate, columns of visual tokens."""
    monkeypatch.setattr(pruning_decoder, "RATER_BLOCK", block)
    model = llava_sparse.sparsify(dense, "sparsevlm", **STAGES, options={"raters": raters, "recycle": recycle})
    model.set_attn_implementation("eager")
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        out = model(**batch, output_selection=True, output_attentions=True)
    for row in range(3):
        text = batch["input_ids"][row].tolist()[::-1].index(IMAGE)
        start = batch["input_ids"][row].tolist().index(IMAGE)
        for stage in out.selection:
            matrix = out.attentions[stage.layer][row].mean(0)
            visual = list(range(start, matrix.shape[0] - text))
            chosen = stage.raters[row][stage.raters[row] >= 0]
            words = [column - length + matrix.shape[0] for column in chosen.tolist() if column >= length - text]
            assert raters == "selected" or len(words) == text
            rows = visual + words if raters == "all" else words
            assert raters == "all" or len(words) == len(chosen)
            torch.testing.assert_close(stage.scores[row], matrix[rows][:, visual].mean(0))


@pytest.mark.parametrize("raters", ["text", "all"])
@pytest.mark.parametrize("texts", ["padded", "mixed"])
def test_raters_of_a_batch_equal_single_runs(dense, processor, raters, texts):
    """`tests/cases.py` crosses one such case with everything; here the others."""
    model = llava_sparse.sparsify(dense, "sparsevlm", **STAGES, options={"raters": raters})
    prompts = tiny.QUESTIONS
    if texts == "mixed":
        prompts = ["USER: <image> <image> Is there a dog ?", "USER: Is there a cat ?", "What red car ? <image>"]
    logits, seed = last_logits(model, tiny.inputs(processor, prompts)), 0
    for row, text in enumerate(prompts):
        torch.testing.assert_close(
            logits[row], last_logits(model, tiny.inputs(processor, text, seed=seed))[0], **LOGITS
        )
        seed += text.count("<image>")


@pytest.mark.parametrize("raters", ["text", "all"])
def test_raters_in_half_precision(dense, processor, raters):
    model = llava_sparse.sparsify(dense, "sparsevlm", **STAGES, options={"raters": raters}).to(torch.bfloat16)
    out = model(**tiny.inputs(processor, tiny.QUESTIONS), output_selection=True)
    assert out.logits.isfinite().all()
    assert all(stage.scores.dtype == torch.float32 for stage in out.selection)


# --- SparseVLM: recycling and budgets ------------------------------------------------------------------------------


def resolved(budget: int, **options) -> tuple[int, ...]:
    config = SparseLlavaConfig(sparse_method="sparsevlm", sparse_budget=budget, sparse_options=options)
    return tuple(config.sparse_budgets)


@pytest.mark.parametrize(
    ("budget", "totals"),
    [(64, (82, 32, 18)), (96, (249, 55, 27)), (128, (312, 117, 39)), (192, (309, 204, 113))],
)
def test_without_recycling_a_budget_is_the_same_number_of_tokens(budget, totals):
    """The totals that the published code was recorded with: kept and merged."""
    assert resolved(budget, recycle=False) == totals
    assert resolved(budget, recycle=True) == resolved(budget)
    assert resolved(budget, version="2.0", recycle=False) == resolved(budget, version="2.0")


@pytest.mark.parametrize("budget", [1, 4, 9, 16])
def test_layers_hold_as_many_tokens_with_recycling_as_without(dense, processor, budget):
    lengths = []
    for recycle in (True, False):
        model = llava_sparse.sparsify(dense, "sparsevlm", budget=budget, options={"recycle": recycle})
        with torch.no_grad():
            out = model(**tiny.inputs(processor, tiny.QUESTIONS), output_selection=True, use_cache=True)
        lengths.append([layer.keys.shape[2] for layer in out.past_key_values.layers])
        assert all((stage.merge_map is not None) == recycle for stage in out.selection)
    assert lengths[0] == lengths[1]


def test_explicit_budgets_are_what_stays(dense, processor):
    model = llava_sparse.sparsify(dense, "sparsevlm", **STAGES, options={"recycle": False})
    stages = stages_of(model, tiny.inputs(processor, tiny.QUESTIONS))
    assert [stage.kept.shape[1] for stage in stages] == [6, 3]
    assert [stage.scores.shape[1] for stage in stages] == [16, 6]


def test_an_option_expands_a_saved_budget_anew(tmp_path):
    from transformers import AutoConfig

    SparseLlavaConfig(sparse_method="sparsevlm", sparse_budget=64).save_pretrained(tmp_path)
    ablated = AutoConfig.from_pretrained(tmp_path, sparse_options={"recycle": False})
    assert ablated.sparse_budgets == [82, 32, 18]
    ablated.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).sparse_budgets == [82, 32, 18]
    assert AutoConfig.from_pretrained(tmp_path, sparse_options={}).sparse_budgets == [66, 30, 17]


def test_the_first_version_differs_in_its_budgets_alone(dense, processor):
    """Rank-adaptive against fixed budgets is version 1.0 against 1.5: with a rank rule that is constant, they agree."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    fixed = llava_sparse.sparsify(dense, "sparsevlm", layers=[0, 2], budgets=[5, 5])
    ranked = llava_sparse.sparsify(
        dense, "sparsevlm", layers=[0, 2], options={"version": "1.0", "scale": 0.0, "bias": 5.0}
    )
    assert torch.equal(fixed(**batch).logits, ranked(**batch).logits)


SPARSE = {"sparse_method": "sparsevlm", "sparse_budget": 64}
RANDOM = {"sparse_method": "random", "sparse_budget": 64}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**SPARSE, "sparse_options": {"raters": "txt"}}, r"'raters' must be .* got 'txt' \(did you mean 'text'\?\)"),
        ({**SPARSE, "sparse_options": {"raters": None}}, "'raters' must be one of 'selected', 'text', 'all', got None"),
        ({**SPARSE, "sparse_options": {"raters": "all", "version": "2.0"}}, "belongs to version '1.5'"),
        ({**SPARSE, "sparse_options": {"raters": "all", "version": "1.0"}}, "belongs to version '1.5'"),
        ({**SPARSE, "sparse_options": {"recycle": "no"}}, "'recycle' must be true or false, got 'no'"),
        ({**SPARSE, "sparse_options": {"recycle": 0}}, "'recycle' must be true or false, got 0"),
        ({**SPARSE, "sparse_options": {"recycle": True, "version": "2.0"}}, "recycles nothing"),
        ({**RANDOM, "sparse_options": {"seed": -1}}, r"'seed' must be an int in \[0, 4294967295\], got -1"),
        ({**RANDOM, "sparse_options": {"seed": True}}, r"'seed' must be an int in \[0, 4294967295\], got True"),
        ({**RANDOM, "sparse_options": {"seed": 1.0}}, r"'seed' must be an int in \[0, 4294967295\], got 1.0"),
        ({**RANDOM, "sparse_options": {"sed": 1}}, "did you mean 'seed'"),
        ({**RANDOM, "sparse_budgets": [54, 10]}, r"`sparse_budgets` must be a list of 1 ints .* got \[54, 10\]"),
        ({**RANDOM, "sparse_budgets": [577]}, r"`sparse_budgets` must be .* ints in \[1, 576\], got \[577\]"),
        ({**RANDOM, "sparse_layers": [24]}, r"`sparse_layers` must be .* ints in \[-24, 23\], got \[24\]"),
        ({"sparse_method": "random"}, "'random' needs `sparse_budget`"),
        ({"sparse_method": "random_decoder"}, "'random_decoder' needs `sparse_budget`"),
        (
            {"sparse_method": "random_decoder", "sparse_layers": [3, 2], "sparse_budgets": [9, 9]},
            r"ascending .* got \[3, 2\]",
        ),
        (
            {"sparse_method": "random_decoder", "sparse_budget": 64, "sparse_options": {"positions": "x"}},
            "'positions' must be one of 'compact', 'original', got 'x'",
        ),
    ],
)
def test_invalid_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseLlavaConfig(**fields)


# --- VisionZip: dominant, contextual, and the split between them ----------------------------------------------------


def zipped_by_hand(hidden, scores, metric, dominant, contextual):
    """One image in plain loops: CLS and the best patches, then every other token at the target of most similar key."""
    patches = len(scores)
    order = sorted(range(patches), key=lambda p: (-scores[p].item(), p))[: dominant - 1]
    chosen = [0, *sorted(p + 1 for p in order)]
    rest = [t for t in range(patches + 1) if t not in chosen]
    rows = [hidden[t] for t in chosen]
    if contextual:
        targets = rest[:: max(1, len(rest) // contextual)][:contextual]
        members: dict[int, list[int]] = {t: [] for t in targets}
        for token in rest:
            if token not in targets:
                cosine = [torch.cosine_similarity(metric[token], metric[t], dim=0).item() for t in targets]
                members[targets[cosine.index(max(cosine))]].append(token)
        rows += [hidden[t] + (hidden[m].mean(0) if (m := members[t]) else 0) for t in targets]
    return torch.stack(rows), [p - 1 for p in chosen[1:]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), total=st.integers(1, 17), share=st.floats(0, 1))
def test_every_split_of_a_total_against_loops(seed, total, share):
    contextual = int(share * (total - 1) + 0.5)
    settings = Sparsity("visionzip", budgets=[total - contextual, contextual])
    method = VisionZip.resolve(Geometry(patches=16, encoder_layers=6), settings)
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 17, 5, generator=random, dtype=torch.float64)
    attention = torch.rand(2, 3, 16, generator=random, dtype=torch.float64)
    keys = torch.randn(2, 3, 17, 4, generator=random, dtype=torch.float64)
    vision = VisionFeatures(hidden[:, 1:], (4, 4), hidden[:, 0], attention, keys[:, :, 1:])
    reduced = method.reduce(vision)
    features, kept, merged = reduced.features, reduced.selection(4).kept, reduced.merged
    assert features.shape == (2, total, 5) and method.tokens == total
    for image in range(2):
        expected, chosen = zipped_by_hand(
            hidden[image], attention[image].sum(0), keys[image].mean(0), total - contextual, contextual
        )
        torch.testing.assert_close(features[image], expected)
        assert kept[image].tolist() == chosen
    if contextual:
        assert (merged >= 0).sum() == 2 * (17 - (total - contextual))
    else:
        assert merged is None


@pytest.mark.parametrize("budgets", [[6, 0], [1, 5], [1, 16], [17, 0]], ids=str)
@torch.no_grad()
def test_one_kind_of_token_alone_in_the_model(dense, processor, budgets):
    """Dominant only and contextual only, from the stock tower's own attention matrices, keys and outputs."""
    model = llava_sparse.sparsify(dense, "visionzip", budgets=budgets)
    total = sum(budgets)
    ours = tiny.processor(llava_sparse.SparseLlavaProcessor, sparse_method="visionzip", sparse_budgets=budgets)
    batch = tiny.inputs(ours, tiny.QUESTIONS)
    assert (batch["input_ids"] == IMAGE).sum() == 3 * total

    tower = CLIPVisionModel._from_config(dense.config.vision_config, attn_implementation="eager")
    tower.load_state_dict(dense.model.vision_tower.state_dict())
    keys = []
    hook = tower.encoder.layers[-2].self_attn.k_proj.register_forward_hook(lambda *args: keys.append(args[-1]))
    stock = tower.eval()(batch["pixel_values"], output_attentions=True, output_hidden_states=True)
    hook.remove()
    attention, hidden = stock.attentions[-2], stock.hidden_states[-2]
    metric = keys[0].unflatten(-1, (attention.shape[1], -1)).mean(2)
    reduced = model.model.vision_tower(batch["pixel_values"], sparsifier=model.model.sparsifier)
    for image in range(3):
        scores = attention[image, :, 0, 1:].sum(0)
        expected, chosen = zipped_by_hand(hidden[image], scores, metric[image], *budgets)
        torch.testing.assert_close(reduced.last_hidden_state[image], expected, rtol=1e-4, atol=1e-4)
        (stage,) = stages_of(model, batch)
        assert stage.kept[image].tolist() == chosen
        assert (stage.merge_map is None) == (budgets[1] == 0)
    if budgets[1]:
        assert (stage.merge_map >= 0).all() and stage.kept.shape == (3, 0)
    logits = last_logits(model, batch)
    for row, question in enumerate(tiny.QUESTIONS):
        torch.testing.assert_close(logits[row], last_logits(model, tiny.inputs(ours, question, seed=row))[0], **LOGITS)
    assert model.to(torch.bfloat16).generate(**batch, max_new_tokens=2).shape[0] == 3
