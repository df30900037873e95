"""What every method keeps, whatever it is given: of drawn inputs, and in a tiny model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import llava_sparse
from llava_sparse.modeling.method_tome import bipartite_matching, merge
from llava_sparse.modeling.pruning_ops import image_fingerprints
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.modeling.pruning_settings import Sparsity, check_budget
from llava_sparse.modeling.pruning_types import Geometry, Question, VisionFeatures, VisualTokens

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 9999)
ENCODERS = [name for name in llava_sparse.list_methods() if METHODS[name].kind == "encoder"]
MERGING = {"pool", "tome", "visionzip"}
NESTED = ["delegate", "divprune", "random", "scope"]
DIVERSE = ["cdpruner", "delegate", "divprune", "scope"]
BEHIND = {name for name, method in METHODS.items() if method.place == "projector"}
TWO = "USER: <image> <image> What red car on the left ? ASSISTANT:"
MIXED = [tiny.QUESTIONS[0], TWO, "USER: Is there a dog ? ASSISTANT:", tiny.QUESTIONS[2]]


def drawn(
    seed: int, rows: int, columns: int, kind: str = "random", batch: int = 3, dtype: torch.dtype = torch.float32
) -> VisionFeatures:
    """Pictures of `rows` x `columns` patches, with all that a method may ask for.

    Args:
        kind: "random"; "signs", few directions, each many times, so that ties are exact; "equal"; or "flat", of rank 2.
    """
    random = torch.Generator().manual_seed(seed)
    patches = rows * columns

    def features(length: int, channels: int) -> torch.Tensor:
        if kind == "flat":
            return torch.randn(batch, length, 2, generator=random) @ torch.randn(2, channels, generator=random)
        if kind == "random":
            return torch.randn(batch, length, channels, generator=random)
        few = torch.randint(0, 2, (5, 16), generator=random) * 2.0 - 1
        x = few[torch.randint(0, 5, (batch, length), generator=random)]
        return x if kind == "signs" else x[:, :1].expand(-1, length, -1).contiguous()

    attention = torch.randint(1, 9, (batch, 2, patches), generator=random) / 64
    keys = torch.stack([features(1 + patches, 8)] * 2, dim=1)
    valid = torch.arange(4) < torch.randint(1, 5, (batch, 1), generator=random)
    pixels = torch.randn(batch, 3, 2 * rows, 2 * columns, generator=random)
    hidden, projected, text = features(1 + patches, 8), features(patches, 12), features(4, 12)
    hidden, projected, text = hidden.to(dtype), projected.to(dtype), text.to(dtype)
    return VisionFeatures(
        hidden[:, 1:],
        (rows, columns),
        hidden[:, 0],
        attention,
        keys[:, :, 1:].to(dtype),
        projected,
        fingerprints=image_fingerprints(pixels),
        question=Question(text, valid),
    )


def resolved(name: str, patches: int, budget: float):
    return METHODS[name].resolve(Geometry(patches, encoder_layers=6), Sparsity(name, budget))


def reduced(method, images: VisionFeatures) -> VisualTokens:
    """The method on images, for one that merges inside the layers with layers that do nothing else."""
    if method.name == "tome":
        hidden = torch.cat([images.cls[:, None], images.features], dim=1)
        size = torch.ones(hidden.shape[:2])
        places = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
        for layer in range(5):
            if removed := method.removed(layer, 6, hidden.shape[1] - 1):
                moved, count = bipartite_matching(hidden, removed)
                hidden, size = merge(hidden, size, moved, count)
                places = moved.gather(1, places)
        # CLS, which is never merged, is token 0 before and after.
        assert (places[:, 0] == 0).all() and (places[:, 1:] > 0).all()
        images = replace(images, features=hidden[:, 1:], cls=hidden[:, 0], sources=places[:, 1:] - 1)
    return method.reduce(images)


def alone(images: VisionFeatures, row: int) -> VisionFeatures:
    one = images.rows(torch.tensor([row]))
    assert one.question.embeds.shape[0] == 1 and one.grid == images.grid
    return one


def source(name: str, images: VisionFeatures) -> torch.Tensor:
    return images.projected if name in BEHIND else images.features


@pytest.mark.parametrize("name", ENCODERS)
@QUICK
@given(
    seed=SEEDS,
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    kind=st.sampled_from(["random", "signs", "equal", "flat"]),
    share=st.floats(0, 1, exclude_min=True),
    ratio=st.booleans(),
)
def test_what_is_kept(name, seed, rows, columns, kind, share, ratio):
    """The budget exactly, nothing twice, in order; of each image of a batch what it has alone; merges add up."""
    images, patches = drawn(seed, rows, columns, kind), rows * columns
    tokens = check_budget(share, patches)
    method = resolved(name, patches, share if ratio else tokens)
    got = reduced(method, images)
    assert method.tokens == tokens
    assert got.features.shape == (3, tokens, source(name, images).shape[2]) and got.features.isfinite().all()
    assert got.scores.shape == (3, patches) and got.scores.dtype == torch.float32 and not got.scores.isnan().any()
    stage = got.selection(4)
    for image, numbers in enumerate(got.patch_index.tolist()):
        assert len(set(numbers)) == tokens and max(numbers) < patches + method.new_tokens
        assert min(numbers) >= 0 or (name == "visionzip" and numbers.index(-1) == 0)
        own = [n for n in numbers if 0 <= n < patches]
        assert stage.kept[image].tolist() == sorted(own) + [-1] * (stage.kept.shape[1] - len(own))
        for place, number in enumerate(numbers):
            if 0 <= number < patches:
                assert torch.equal(got.features[image, place], source(name, images)[image, number])
        if name in ("scope", "visionzip"):
            assert torch.equal(got.scores, images.saliency.sum(1))
        if name not in MERGING:
            assert own == numbers == sorted(numbers) and got.merged is None
        single = reduced(method, alone(images, image))
        if name == "cdpruner" and kind in ("signs", "equal"):
            # Which of equal patches it is, rounding may decide once others are chosen.
            assert sorted(single.features[0].tolist()) == sorted(got.features[image].tolist())
        else:
            assert single.patch_index[0].tolist() == numbers
            torch.testing.assert_close(single.features[0], got.features[image])
        torch.testing.assert_close(single.scores[0], got.scores[image])
        if got.merged is None:
            continue
        assert torch.equal(single.merged[0], got.merged[image])
        members: dict[int, list[int]] = {}
        for patch, made in enumerate(got.merged[image].tolist()):
            assert (made < 0) == (patch in own)
            assert stage.merge_map[image, patch] == (patches + made if made >= 0 else -1)
            members.setdefault(made, []).append(patch)
        members.pop(-1, None)
        assert sorted(members) == sorted(n - patches for n in numbers if n >= patches)
        for made, patches_of in members.items() if name != "visionzip" else ():
            mean = source(name, images)[image, patches_of].mean(0)
            torch.testing.assert_close(got.features[image, numbers.index(patches + made)], mean)
            if name == "tome":
                assert got.scores[image, patches_of].tolist() == pytest.approx([1 / len(patches_of)] * len(patches_of))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ENCODERS)
@settings(QUICK, max_examples=10)
@given(seed=SEEDS, kind=st.sampled_from(["random", "signs", "flat"]), budget=st.integers(1, 12))
def test_half_precision(name, dtype, seed, kind, budget):
    """Of the same numbers the same choice: all that is decided is decided in float32."""
    images = drawn(seed, 3, 4, kind, dtype=dtype)
    method = resolved(name, 12, budget)
    got = reduced(method, images)
    assert got.features.dtype == dtype and got.features.isfinite().all() and got.scores.dtype == torch.float32
    if name == "tome":  # Its merged tokens are of the model's dtype from layer to layer.
        return
    expected = reduced(method, images.map(lambda x: x.float() if x.is_floating_point() else x))
    assert torch.equal(got.patch_index, expected.patch_index)
    assert torch.equal(got.features, expected.features.to(dtype)) and torch.equal(got.scores, expected.scores)


@pytest.mark.parametrize("name", [n for n in ENCODERS if n != "visionzip"])
@QUICK
@given(seed=SEEDS, rows=st.integers(1, 5), columns=st.integers(1, 5), kind=st.sampled_from(["random", "equal"]))
def test_all_patches_are_all_of_them_in_order(name, seed, rows, columns, kind):
    images, patches = drawn(seed, rows, columns, kind), rows * columns
    for budget in (patches, 1.0):
        got = reduced(resolved(name, patches, budget), images)
        assert got.patch_index.tolist() == [list(range(patches))] * 3
        assert torch.equal(got.features, source(name, images))
        assert got.merged is None or (got.merged == -1).all()


@pytest.mark.parametrize("name", NESTED)
@QUICK
@given(seed=SEEDS, kind=st.sampled_from(["random", "signs", "equal", "flat"]), columns=st.integers(1, 5))
def test_a_smaller_budget_is_a_part_of_a_larger_one(name, seed, kind, columns):
    images, before = drawn(seed, 4, columns, kind), [set()] * 3
    for budget in range(1, 4 * columns + 1):
        kept = [set(numbers) for numbers in reduced(resolved(name, 4 * columns, budget), images).patch_index.tolist()]
        assert all(less < more for less, more in zip(before, kept, strict=True))
        before = kept


@pytest.mark.parametrize("name", DIVERSE)
@QUICK
@given(seed=SEEDS, order=st.permutations(range(12)), budget=st.integers(1, 11))
def test_the_order_of_patches_does_not_matter(name, seed, order, budget):
    """Without ties: two patches that are each other's nearest are one for DivPrune's first choice."""
    images = drawn(seed, 3, 4, dtype=torch.float64, batch=1)
    attention = torch.rand(1, 2, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    images = replace(images, saliency=attention)
    method, index = resolved(name, 12, budget), torch.tensor(order)
    moved = replace(images, features=images.features[:, index], projected=images.projected[:, index])
    moved = replace(moved, saliency=images.saliency[:, :, index])
    got = reduced(method, images)
    if name == "divprune":
        unit = torch.nn.functional.normalize(images.projected[0], dim=-1)
        nearest = (unit @ unit.T - 2 * torch.eye(12)).amax(-1).sort().values
        assume(nearest[1] - nearest[0] > 1e-9)
    assert {order[n] for n in reduced(method, moved).patch_index[0].tolist()} == set(got.patch_index[0].tolist())


@pytest.mark.parametrize("name", sorted(BEHIND))
@QUICK
@given(seed=SEEDS, kind=st.sampled_from(["signs", "flat"]), budget=st.integers(1, 20))
def test_nothing_that_adds_nothing_is_kept_first(name, seed, kind, budget):
    """DivPrune takes every direction, CDPruner every dimension, before it takes one again."""
    images = drawn(seed, 4, 5, kind)
    kept = reduced(resolved(name, 20, budget), images).features
    for all_of, some in zip(images.projected, kept, strict=True):
        if name == "cdpruner":
            rank = torch.linalg.matrix_rank
            assert rank(some, rtol=1e-4) == min(budget, rank(all_of, rtol=1e-4))
        else:
            assert len(some.unique(dim=0)) == min(budget, len(all_of.unique(dim=0)))


@lru_cache(maxsize=1)
def dense_and_pruned():
    """The tiny model, and one with its weights whose method the tests switch; the weights are only read."""
    dense = tiny.dense_model()
    return dense, llava_sparse.sparsify(dense, None)


def run(method: str, batch: dict, **given):
    """The output of the tiny model with a method."""
    model = dense_and_pruned()[1]
    model.set_sparsity(method, **given)
    with torch.no_grad():
        return model(**batch, output_selection=True, use_cache=True)


def visual_tokens(output, batch: dict) -> list[int]:
    """How many each layer holds, of a prompt without padding."""
    text = int((batch["input_ids"] != 4).sum())
    return [layer.keys.shape[2] - text for layer in output.past_key_values.layers]


DECODERS = [
    ("fastv", {"layers": [0], "budgets": [5]}, [16, 5, 5, 5, 5, 5]),
    ("fastv", {"layers": [3], "budgets": [9]}, [16, 16, 16, 16, 9, 9]),
    ("fastv", {"budget": 4, "options": {"positions": "compact"}}, None),
    ("fastv", {"budget": 0.5}, None),
    ("pyramiddrop", {"layers": [1, 2, 5], "budgets": [9, 5, 2]}, [16, 9, 5, 5, 5, 2]),
    ("pyramiddrop", {"budget": 4, "options": {"positions": "original"}}, None),
    ("random_decoder", {"layers": [1, 4], "budgets": [7, 3]}, [16, 16, 7, 7, 7, 3]),
]


@pytest.mark.parametrize(("method", "given", "held"), DECODERS)
@pytest.mark.parametrize("images", [1, 3])
def test_a_decoder_method_holds_its_budgets(processor, method, given, held, images):
    """At every layer; several images compete, the best of all stay; a padded row has the scores of the single one."""
    texts = ["USER: " + "<image> " * images + rest for rest in ("No ? ASSISTANT:", "What red car on the ? ASSISTANT:")]
    single = [tiny.inputs(processor, text, seed=9 * row + images) for row, text in enumerate(texts)]
    outputs = [run(method, batch, **given) for batch in single]
    config = dense_and_pruned()[1].config
    if held is None:
        starts = [layer + (method != "pyramiddrop") for layer in config.sparse_layers]
        held = [[16, *config.sparse_budgets][sum(s <= layer for s in starts)] for layer in range(6)]
    both = tiny.inputs(processor, texts)
    both["pixel_values"] = torch.cat([batch["pixel_values"] for batch in single])
    padded = run(method, both, **given).selection
    splits = []
    for row, (batch, output) in enumerate(zip(single, outputs, strict=True)):
        assert visual_tokens(output, batch) == [images * count for count in held]
        known = list(range(16 * images))
        for stage, wide, budget in zip(output.selection, padded, config.sparse_budgets, strict=True):
            order = sorted(range(len(known)), key=lambda i: (-stage.scores[0, i].item(), i))
            kept = sorted(known[i] for i in order[: images * budget])
            assert stage.kept[0].tolist() == kept == wide.kept[row].tolist()
            torch.testing.assert_close(wide.scores[row], stage.scores[0], rtol=1e-4, atol=1e-6)
            known = kept
        splits.append([sum(n // 16 == image for n in known) for image in range(images)])
    assert images == 1 or len({count for split in splits for count in split}) > 1


@pytest.mark.parametrize(("method", "layer"), [("fastv", 0), ("fastv", 4), ("pyramiddrop", 1), ("pyramiddrop", 4)])
def test_scores_are_the_last_tokens_attention(processor, method, layer):
    """That of the dense model, which computes all of it; in front of it there is padding, between two images text."""
    dense, _ = dense_and_pruned()
    batch = tiny.inputs(processor, ["USER: <image> What <image> Is there a dog ? ASSISTANT:", TWO])
    (stage,) = run(method, batch, layers=[layer], budgets=[5]).selection
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        attention = dense(**batch, output_attentions=True).attentions[layer].mean(1)[:, -1]
    dense.set_attn_implementation("sdpa")
    for row in range(2):
        torch.testing.assert_close(stage.scores[row], attention[row, batch["input_ids"][row] == 4])


@pytest.mark.parametrize(
    ("method", "given"),
    [(name, {"budget": budget}) for name in ENCODERS if name != "visionzip" for budget in (16, 1.0)]
    + [("fastv", {"layers": [layer], "budgets": [16]}) for layer in (0, 3, 5)]
    + [("fastv", {"budget": 1.0}), ("pyramiddrop", {"budget": 16}), ("divprune+fastv", {"budget": 16})]
    + [("pyramiddrop", {"layers": [1, 2], "budgets": [16, 16]}), ("tome+pyramiddrop", {"budget": [16, 16]})],
)
def test_all_tokens_are_the_dense_model(processor, method, given):
    batch = tiny.inputs(processor, MIXED)
    with torch.no_grad():
        expected = dense_and_pruned()[0](**batch).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(run(method, batch, **given).logits[valid], expected[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("proportional", [True, False])
def test_tome_against_loops(processor, proportional):
    """The tower, layer by layer, token by token: attention by size, merges between attention and perceptron."""
    model = dense_and_pruned()[1]
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    tower, pixels = model.model.vision_tower, batch["pixel_values"]
    given = {"budgets": [13, 9, 7, 6, 5], "options": {"proportional": proportional}}
    (stage,) = run("tome", batch, **given).selection
    got = tower(pixels, sparsifier=model.model.sparsifier).last_hidden_state[0]
    with torch.no_grad():
        x = tower.pre_layrnorm(tower.embeddings(pixels))[0]
        groups = [[n] for n in range(17)]
        for layer, left in zip(tower.encoder.layers, given["budgets"], strict=False):
            part, normed = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (f(normed).unflatten(-1, (4, 16)) for f in (part.q_proj, part.k_proj, part.v_proj))
            mixed = []
            for token in range(len(x)):
                logits = torch.einsum("hd,nhd->hn", q[token], k) / 4
                if proportional:
                    logits = logits + torch.tensor([float(len(group)) for group in groups]).log()
                mixed.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), v).flatten())
            x = x + part.out_proj(torch.stack(mixed))
            a, b, key = list(range(2, len(x), 2)), list(range(1, len(x), 2)), k.mean(1)
            alike = torch.nn.functional.cosine_similarity(key[:, None], key[None], dim=-1)
            target = {t: max(b, key=lambda o: alike[t, o]) for t in a}
            gone = sorted(a, key=lambda t: -alike[t, target[t]])[: len(x) - 1 - left]
            rows, sets = [], []
            for token in [t for t in range(0, len(x), 2) if t not in gone] + b:
                members = [token, *(t for t in gone if target[t] == token)]
                weights = [len(groups[m]) for m in members]
                rows.append(sum(w * x[m] for w, m in zip(weights, members, strict=True)) / sum(weights))
                sets.append([n for m in members for n in groups[m]])
            x, groups = torch.stack(rows), sets
            x = x + layer.mlp(layer.layer_norm2(x))
    torch.testing.assert_close(got, x[1:], rtol=1e-4, atol=1e-4)
    made = {n - 1: len(group) for group in groups for n in group}
    assert stage.kept[0].tolist() == sorted(n for n, size in made.items() if size == 1 and n >= 0)
    assert stage.scores[0].tolist() == pytest.approx([1 / made[n] for n in range(16)])
