"""A method inside the tower's layers before one behind the projector, and before one in the decoder."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llava_sparse
from llava_sparse.modeling import pruning_model
from llava_sparse.modeling.configuration_sparse_llava import SparseLlavaConfig, build_sparsifier
from llava_sparse.modeling.method_delegate import constituents
from llava_sparse.modeling.method_divprune import max_min_tokens
from llava_sparse.modeling.pruning_ops import cosines
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.modeling.pruning_types import VisualTokens

BEHIND = ("cdpruner", "delegate", "divprune")
FIVE = [14, 12, 10, 9, 8]
SHORT, LONG, SHORTEST = tiny.QUESTIONS


def drawn(random: torch.Generator, count: int, merges: bool) -> tuple[VisualTokens, list[list[int]]]:
    """Tokens made of `count` things: some stay, some are merged, some go; and of which each token is made."""
    owner = torch.randint(-1, max(1, count // 2), (count,), generator=random).tolist()
    groups = [[n for n in range(count) if owner[n] == g] for g in sorted(set(owner) - {-1})] or [[0]]
    groups = [group if merges else group[:1] for group in groups]
    order = torch.randperm(len(groups), generator=random).tolist()
    groups, index, merged, made = [groups[i] for i in order], [], [-1] * count, 0
    for group in groups:
        index.append(group[0] if len(group) == 1 else count + made)
        if len(group) > 1:
            for n in group:
                merged[n] = made
            made += 1
    scores = torch.rand(1, count, generator=random)
    tokens = VisualTokens(torch.zeros(1, len(groups), 1), torch.tensor([index]), scores, torch.tensor([merged]))
    return (tokens if merges else VisualTokens(tokens.features, tokens.patch_index, scores)), groups


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), count=st.integers(1, 14), merges=st.tuples(st.booleans(), st.booleans()))
def test_numbers_of_two_against_lists(seed, count, merges):
    """What became of each patch, by groups of groups: kept alone, part of a token made anew, or gone."""
    random = torch.Generator().manual_seed(seed)
    first, inner = drawn(random, count, merges[0])
    second, outer = drawn(random, len(inner), merges[1])
    tokens = second.behind(first)
    members = [sorted(n for token in group for n in inner[token]) for group in outer]
    assert tokens.patches == count and tokens.members[0].tolist() == list(map(len, members))
    numbers = tokens.patch_index[0].tolist()
    new = [n for n in numbers if n >= count]
    assert new == list(range(count, count + len(new)))
    for place, (number, group) in enumerate(zip(numbers, members, strict=True)):
        alone = len(group) == 1 and number < count
        assert number == group[0] if alone else all(tokens.merged[0, n] == number - count for n in group)
        assert all(tokens.owners[0, n] == place for n in group)
    gone = set(range(count)) - {n for group in members for n in group}
    assert all(tokens.merged[0, n] == -1 and tokens.owners[0, n] == -1 for n in gone)
    for token, group in enumerate(inner):
        assert all(tokens.scores[0, n] == second.scores[0, token] for n in group)


def test_the_second_chooses_from_what_the_first_leaves(dense, processor):
    """DivPrune on ToMe's tokens is a part of these; a chain that keeps all is the dense model."""
    batch = tiny.inputs(processor, LONG)
    chain = llava_sparse.sparsify(dense, "tome+divprune", budgets=[FIVE, [4]])
    tome = llava_sparse.sparsify(dense, "tome", budgets=FIVE)
    made, left = chain.get_image_features(batch["pixel_values"]), tome.get_image_features(batch["pixel_values"])
    order = max_min_tokens(cosines(left.features[0][None]), 4)[0].sort(dim=-1).values[0]
    assert torch.equal(made.features[0], left.features[0][order])
    output = chain(**batch, output_selection=True)
    (stage,), (alone,) = output.selection, tome(**batch, output_selection=True).selection
    for token, number in enumerate(made.tokens[0].patch_index[0].tolist()):
        own = left.tokens[0].patch_index[0, order[token]]
        if number < tiny.PATCHES:
            assert number == own and number in stage.kept
        else:
            assert torch.equal(stage.merge_map[0] == number, alone.merge_map[0] == own)
    whole = llava_sparse.sparsify(dense, "tome+divprune", budgets=[[16] * 5, [16]])
    torch.testing.assert_close(whole(**batch).logits, dense(**batch).logits, rtol=0, atol=2e-4)


def test_sizes_count_patches(dense, processor, monkeypatch):
    """Delegate's tokens stand for tokens of ToMe's, each for all its patches: together they are the picture."""
    seen = []
    weigh = pruning_model.weigh

    def watched(inputs, layout, sizes, *rest):
        seen.append(sizes)
        return weigh(inputs, layout, sizes, *rest)

    monkeypatch.setattr(pruning_model, "weigh", watched)
    model = llava_sparse.sparsify(dense, "tome+delegate", budgets=[FIVE, [4]])
    model(**tiny.inputs(processor, [LONG, SHORT]))
    assert seen[0].view(2, 4).sum(-1).tolist() == [16, 16] and len(set(seen[0].tolist())) > 1
    similarity = torch.eye(3)[None] + torch.tensor([[[0, 0.1, 0.5], [0.1, 0, 0.2], [0.5, 0.2, 0]]])
    assert constituents(similarity, torch.tensor([[0, 1]]), torch.tensor([[2.0, 3.0, 5.0]])).tolist() == [[7.0, 3.0]]


@pytest.mark.parametrize("name", [*(f"tome+{name}" for name in BEHIND), "tome+divprune+sparsevlm"])
def test_a_batch_is_its_rows(dense, processor, name):
    """Left padding, answers behind the prompt, and what else is in the batch choose nothing."""
    model = llava_sparse.sparsify(dense, name, budget=4 if name.count("+") == 1 else 3)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    together = model(**batch, output_selection=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    answered = model(**batch, labels=labels, output_selection=True)
    for row, text in enumerate(tiny.QUESTIONS):
        alone = model(**tiny.inputs(processor, text, seed=row), output_selection=True)
        torch.testing.assert_close(together.logits[row, -1], alone.logits[0, -1], rtol=0, atol=2e-4)
        changed = batch["input_ids"].clone()
        changed[:, -2:] = 7
        other = model(**{**batch, "input_ids": changed}, labels=labels, output_selection=True)
        for stages in zip(together.selection, alone.selection, answered.selection, other.selection, strict=True):
            kept = [stage.kept[index] for stage, index in zip(stages, (row, 0, row, row), strict=True)]
            kept = [one[one >= 0].tolist() for one in kept]
            assert kept[0] == kept[1] and kept[2] == kept[3]


# --- Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "budgets"),
    [
        ("tome+divprune", {"budget": 4}, [8, 4]),
        ("tome+divprune", {"budget": 10}, [16, 10]),
        ("tome+divprune", {"budget": 0.25}, [8, 4]),
        ("tome+divprune", {"budget": [0.75, 0.5]}, [12, 6]),
        ("tome+cdpruner", {"budget": {"tome": 9, "cdpruner": 4}, "options": {"cdpruner": {"block": 2}}}, [9, 4]),
        ("tome+divprune+random_decoder", {"budget": 3}, [12, 6]),
        ("tome+divprune+fastv", {"budget": [10, 6, None], "budgets": [None, None, [3]]}, [10, 6, 3]),
        ("tome+delegate+fastv", {"budget": 2, "options": {"delegate": {"proportional": False}}}, [8, 4]),
    ],
    ids=lambda x: str(x)[:50],
)
def test_settings_and_processor(dense, given, method, budgets):
    model = llava_sparse.sparsify(dense, method, **given)
    found = [entry[-1] for entry in model.config.sparse_budgets]
    assert found[: len(budgets)] == budgets and len(model.config.sparse_layers) == method.count("+") + 1
    fields = {name: getattr(model.config, name) for name in ("sparse_method", "sparse_budget", "sparse_options")}
    fields["sparse_budgets"] = given.get("budgets")
    ours = tiny.processor(llava_sparse.SparseLlavaProcessor, **fields)
    batch = tiny.inputs(ours, [SHORT, LONG])
    assert (batch["input_ids"] == 4).sum(1).tolist() == [budgets[1]] * 2
    torch.testing.assert_close(
        model(**batch).logits[:, -1], model(**tiny.inputs(tiny.processor(), [SHORT, LONG])).logits[:, -1]
    )
    again = SparseLlavaConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert build_sparsifier(again) == model.model.sparsifier


REFUSED = [
    *((f"{name}+tome", {}, ["an encoder method, then a decoder method", "cdpruner, delegate, divprune."])
      for name in (*BEHIND, "visionzip", "tome", "fastv")),
    *((f"tome+{name}", {}, ["no grid of patches and no attention: cdpruner, delegate, divprune."])
      for name, method in METHODS.items() if method.kind == "encoder" and name not in BEHIND),
    *((name, {}, [repr(name), "is allowed"]) for name in (
        "divprune+cdpruner", "visionzip+divprune", "tome+divprune+cdpruner", "tome+sparsevlm+divprune",
        "tome+divprune+fastv+sparsevlm", "tome+visionzip+fastv")),
    ("tome+divprune", {"layers": [None, [1]]}, ["`sparse_layers`: divprune takes what tome leaves", "got [1]."]),
    ("tome+divprune", {"budget": [8, 9]}, ["`sparse_budget` must be an int in [1, 8]", "got 9."]),
    ("tome+divprune", {"budget": [8]}, ["two numbers, [tome's, divprune's]", "got [8]."]),
    ("tome+divprune+fastv", {"budget": [8, 4]}, ["three numbers, [tome's, divprune's, fastv's]", "got [8, 4]."]),
    ("tome+divprune", {"options": {"proportional": True}}, ["a dict by name, 'tome' and 'divprune'"]),
    ("tome+delegate+fastv", {}, ["delegate weighs its tokens", "{'delegate': {'proportional': False}} is allowed"]),
]  # fmt: skip


@pytest.mark.parametrize(("method", "given", "words"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_go_together(dense, method, given, words):
    with pytest.raises(ValueError, match=r"allowed|must|takes") as error:
        SparseLlavaConfig(**{f"sparse_{key}": value for key, value in {"method": method, "budget": 4, **given}.items()},
                          vision_config=dense.config.vision_config, text_config=dense.config.text_config)  # fmt: skip
    assert all(word in str(error.value) for word in words), error.value


def test_features_of_a_dense_model_come_too_late(dense, processor):
    batch = tiny.inputs(processor, LONG)
    model = llava_sparse.sparsify(dense, "tome+divprune", budget=4)
    images = dense.get_image_features(batch.pop("pixel_values"))
    with pytest.raises(ValueError, match=r"tome\+divprune works in the vision tower"):
        model(**batch, mm_encoder_outputs={"image": images})
