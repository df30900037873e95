"""The maths of the methods against plain loops, and properties of what is kept."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llava_sparse
from llava_sparse.modeling.method_sparsevlm import density_clusters, text_raters
from llava_sparse.modeling.method_visionzip import contextual_tokens
from llava_sparse.modeling.pruning_attention import row_probabilities
from llava_sparse.modeling.pruning_cache import CACHE
from llava_sparse.modeling.pruning_ops import best, cluster_mean
from llava_sparse.modeling.pruning_sequence import PromptLayout, plan_compaction

QUICK = settings(max_examples=40, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@QUICK
@given(
    seed=st.integers(0, 999),
    patches=st.integers(2, 20),
    dominant=st.integers(1, 8),
    contextual=st.integers(1, 6),
    ties=st.booleans(),
)
def test_visionzip_against_loops(seed, patches, dominant, contextual, ties):
    """Patches alone: CLS, which counts as one of the dominant tokens, is neither chosen nor merged."""
    dominant = min(dominant, patches + 1)
    contextual = min(contextual, patches + 1 - dominant)
    if contextual < 1:
        return
    random = generator(seed)
    hidden = torch.randn(2, patches, 5, generator=random, dtype=torch.float64)
    metric = torch.randn(2, patches, 3, generator=random, dtype=torch.float64)
    scores = torch.rand(2, patches, generator=random, dtype=torch.float64)
    if ties:
        scores = (scores * 3).round()
    index = best(scores, dominant - 1)
    tokens, owner, places = contextual_tokens(hidden, metric, index, contextual)
    for image in range(2):
        chosen = sorted(sorted(range(patches), key=lambda p: (-scores[image, p].item(), p))[: dominant - 1])
        assert index[image].tolist() == chosen
        rest = [t for t in range(patches) if t not in chosen]
        step = max(1, len(rest) // contextual)
        targets = [rest[i] for i in range(0, len(rest), step)][:contextual]
        unit = metric[image] / metric[image].norm(dim=-1, keepdim=True)
        members: dict[int, list[int]] = {t: [] for t in targets}
        for token in rest:
            if token not in targets:
                similarity = [(unit[token] @ unit[t]).item() for t in targets]
                members[targets[similarity.index(max(similarity))]].append(token)
        for j, target in enumerate(targets):
            expected = hidden[image, target]
            if members[target]:
                expected = expected + hidden[image, members[target]].mean(0)
            torch.testing.assert_close(tokens[image, j], expected)
            assert {t for t in rest if owner[image, t] == j} == {target, *members[target]}
        assert all(owner[image, t] == -1 for t in chosen)
        assert places[image].tolist() == targets


@QUICK
@given(seed=st.integers(0, 999), n=st.integers(1, 20), share=st.floats(0, 1))
def test_clustering_against_loops(seed, n, share):
    clusters = max(1, min(n, int(share * n)))
    x = torch.randn(1, n, 4, generator=generator(seed), dtype=torch.float64)
    assignment, centres, density, score = density_clusters(x, clusters)
    distance = [[((a - b) ** 2).sum().sqrt().item() / 2 for b in x[0]] for a in x[0]]
    largest = max(map(max, distance))
    for i in range(n):
        near = sorted(d * d for d in distance[i])[:clusters]
        assert density[0, i].item() == pytest.approx(torch.tensor(-sum(near) / clusters).exp().item(), rel=1e-5)
        higher = [distance[i][j] for j in range(n) if density[0, j] > density[0, i]]
        assert score[0, i].item() == pytest.approx(density[0, i].item() * min(higher, default=largest), rel=1e-6)
    ranked = score[0].sort(descending=True).values
    assert torch.equal(score[0, centres[0]], ranked[:clusters])
    for i in range(n):
        to_centres = [distance[i][c] for c in centres[0].tolist()]
        if i in centres[0].tolist():
            assert assignment[0, i] == centres[0].tolist().index(i)
        else:
            assert to_centres[assignment[0, i]] == pytest.approx(min(to_centres))
    means = cluster_mean(x, assignment, clusters, epsilon=0.0)
    for c in range(clusters):
        torch.testing.assert_close(means[0, c], x[0, assignment[0] == c].mean(0))


@QUICK
@given(seed=st.integers(0, 999), visual=st.integers(1, 12), text=st.integers(1, 8), padding=st.integers(0, 3))
def test_raters_against_loops_and_padding(seed, visual, text, padding):
    random = generator(seed)
    v = torch.randn(1, visual, 6, generator=random, dtype=torch.float64)
    t = torch.randn(1, text, 6, generator=random, dtype=torch.float64)
    expected = torch.stack([(row @ t[0].T).softmax(0) for row in v[0]]).mean(0)
    chosen = [j for j in range(text) if expected[j] > expected.mean()] or list(range(text))
    padded = torch.cat([t, torch.randn(1, padding, 6, generator=random, dtype=torch.float64) * 9], dim=1)
    valid = torch.arange(text + padding)[None] < text
    raters, relevance = text_raters(v, padded, valid)
    torch.testing.assert_close(relevance[0, :text], expected)
    if text > 1:
        assert raters[0].nonzero().flatten().tolist() == chosen
    assert raters[0, :text].any()
    assert not raters[0, text:].any()


@QUICK
@given(seed=st.integers(0, 99), heads=st.sampled_from([2, 4]), groups=st.sampled_from([1, 2]))
def test_attention_rows_equal_the_rows_of_the_matrix(seed, heads, groups):
    random = generator(seed)
    length, size = 9, 4
    query = torch.randn(2, heads, length, size, generator=random)
    key = torch.randn(2, heads // groups, length, size, generator=random)
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    whole = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    rows = torch.tensor([[2, 7], [8, 4]])
    columns = torch.tensor([[0, 3, 5], [1, 2, 8]])
    index = rows[:, None, :, None].expand(-1, heads, -1, size)
    visible = torch.arange(length) <= rows[..., None]
    got = row_probabilities(query.gather(2, index), key, 0.5, columns, visible)
    for b in range(2):
        expected = whole[b][:, rows[b]][:, :, columns[b]]
        torch.testing.assert_close(got[b], expected)


@QUICK
@given(data=st.data())
def test_compaction_against_lists(data):
    """Rows with padding anywhere, tokens removed anywhere, tokens inserted: order is kept, nothing is lost."""
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 10))
    side = data.draw(st.sampled_from(["left", "right"]))
    rows, valid, keep, inserted, after = [], [], [], [], []
    for _ in range(batch):
        real = data.draw(st.integers(1, length))
        mask = [0] * (length - real) + [1] * real if side == "left" else [1] * real + [0] * (length - real)
        drop = data.draw(st.sets(st.sampled_from([i for i in range(length) if mask[i]]), max_size=real - 1))
        valid.append(mask)
        keep.append([i not in drop for i in range(length)])
        inserted.append(data.draw(st.integers(0, 2)))
        after.append(data.draw(st.sampled_from([i for i in range(length) if mask[i]])))
        rows.append(list(range(length)))
    lengths = [sum(mask) for mask in valid]
    removed = [row.count(False) for row in keep]
    mask = torch.tensor(valid, dtype=torch.bool)
    whole = None if mask.all() else mask
    plan = plan_compaction(
        torch.tensor(keep), removed, whole, ([n + 2 for n in lengths], [2] * batch), inserted, torch.tensor(after)
    )
    most = max(inserted)
    tokens = torch.arange(length).expand(batch, -1)
    new = 100 + torch.arange(most).expand(batch, -1) if most else None
    got = plan.apply(tokens, new)
    for row in range(batch):
        expected = []
        for i in range(length):
            if keep[row][i] and valid[row][i]:
                expected.append(i)
            if i == after[row]:
                expected += [100 + j for j in range(inserted[row])]
        there = got[row] if plan.valid is None else got[row][plan.valid[row]]
        assert there.tolist() == expected
        assert lengths[row] - plan.less[row] == len(expected)
        for i in range(length):
            if keep[row][i] and valid[row][i]:
                assert got[row, plan.destination[row, i]] == i


def test_layout_counts_text_after_the_last_image():
    visual = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1] * 6])
    layout = PromptLayout.of(visual, mask)
    assert layout.visual_counts == [2, 2, 2, 0]
    assert layout.text_counts == [2, 2, 3, 6]
    assert layout.lengths == [6, 5, 5, 6]
    assert layout.last.tolist() == [3, 3, 5, -1]
    assert layout.text[1].nonzero().flatten().tolist() == [4, 5]
    assert layout.text[2].nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("images", [1, 2])
def test_selection_describes_what_is_kept(model, case, processor, images):
    """Numbers are in range and unique, stages nest, merged tokens are numbered on, scores rank the kept."""
    texts = ["USER: " + "<image> " * images + q for q in ("Is there a dog ? ASSISTANT:", "What red car ? ASSISTANT:")]
    batch = tiny.inputs(processor, texts)
    with torch.no_grad():
        out = model(**batch, output_selection=True)
    total = images * tiny.PATCHES
    encoder = model.model.sparsifier.encoder
    for row in range(2):
        known, following = set(range(total)), total
        for stage in out.selection:
            kept = [n for n in stage.kept[row].tolist() if n >= 0]
            assert kept == sorted(set(kept))
            assert set(kept) <= known
            in_order = encoder is None or encoder.name == "divprune"
            if stage.raters is not None and in_order:
                entered = sorted(known)
                scores = stage.scores[row][: len(entered)]
                by_number = dict(zip(entered, scores.tolist(), strict=True))
                dropped = [by_number[n] for n in entered if n not in set(kept)]
                assert min((by_number[n] for n in kept), default=1) >= max(dropped, default=-1)
            merged: set[int] = set()
            if stage.merge_map is not None:
                into = stage.merge_map[row]
                members = (into >= 0).nonzero().flatten().tolist()
                assert not set(members) & set(kept)
                assert set(members) <= known
                merged = set(into[into >= 0].tolist())
                assert merged == set(range(following, following + len(merged)))
                following += len(merged)
            known = set(kept) | merged
            if stage.raters is None and encoder.tokens * images == len(known) + images:
                # CLS of each image, numbered behind all that its method may make.
                known |= {total + images * encoder.new_tokens + i for i in range(images)}
                following = total + images * (encoder.new_tokens + 1)


def test_visual_tokens_are_those_that_the_layers_hold(model, processor):
    """What a layer leaves, the next one holds; a batch counts as its prompts, and one without a picture as none."""
    texts = [tiny.QUESTIONS[0], "USER: Is there a cat ? ASSISTANT:", "USER: <image> <image> What car ? ASSISTANT:"]
    with torch.no_grad():
        batch = model(**tiny.inputs(processor, texts), output_selection=True, use_cache=True).visual_tokens
        seed = 0
        for row, text in enumerate(texts):
            inputs = tiny.inputs(processor, text, seed=seed)
            output = model(**inputs, output_selection=True, use_cache=True)
            seed += text.count("<image>")
            words = int((inputs["input_ids"] != 4).sum())
            held = [layer.keys.shape[2] - words for layer in getattr(output, CACHE).layers]
            assert output.visual_tokens[0, :-1].tolist() == held
            assert output.visual_tokens[0, -1] == output.logits.shape[1] - words
            assert batch[row].tolist() == output.visual_tokens[0].tolist()
    counts = llava_sparse.TokenCounts.of(batch)
    means = [sum(row[1:]) / tiny.LAYERS for row in batch.tolist()]
    assert counts == (batch[2, 0].item(), pytest.approx(max(means)), pytest.approx(sum(means) / 3))
    assert counts.layers > counts.samples


def test_visual_tokens_of_a_dense_model(dense, processor):
    ours = llava_sparse.sparsify(dense, None)
    with torch.no_grad():
        counted = ours(**tiny.inputs(processor, tiny.QUESTIONS), output_selection=True).visual_tokens
    assert counted.tolist() == [[tiny.PATCHES] * (tiny.LAYERS + 1)] * 3


def test_selection_of_a_mixed_batch_is_padded(model, case, processor):
    texts = [
        "USER: <image> <image> Is there a dog in the image ? ASSISTANT:",
        "USER: Is there a cat ? ASSISTANT:",
        "USER: <image> What car ? ASSISTANT:",
    ]
    with torch.no_grad():
        stages = model(**tiny.inputs(processor, texts), output_selection=True).selection
        seed = 0
        for row, text in enumerate(texts):
            alone = model(**tiny.inputs(processor, text, seed=seed), output_selection=True).selection
            seed += text.count("<image>")
            if not alone:
                assert all((stage.kept[row] == -1).all() for stage in stages)
                continue
            for stage, single in zip(stages, alone, strict=True):
                kept = stage.kept[row]
                assert kept[kept >= 0].tolist() == single.kept[0][single.kept[0] >= 0].tolist()
                torch.testing.assert_close(stage.scores[row][stage.scores[row] > -torch.inf], single.scores[0])


def test_everything_after_the_image_is_text_of_the_right_row(dense, processor):
    """Padding is neither rater nor key: its embedding may be anything."""
    model = llava_sparse.sparsify(dense, "sparsevlm", layers=[0, 2], budgets=[6, 3])
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    before = model(**batch, output_selection=True)
    batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 20, batch["input_ids"])
    after = model(**batch, output_selection=True)
    for one, two in zip(before.selection, after.selection, strict=True):
        assert torch.equal(one.kept, two.kept)
    torch.testing.assert_close(before.logits[:, -1], after.logits[:, -1])


@pytest.mark.parametrize("version", ["1.0", "1.5", "2.0"])
def test_no_text_after_the_image(dense, processor, version):
    """The text before it rates, and sees the image: scores are not all the same."""
    model = llava_sparse.sparsify(
        dense,
        "sparsevlm",
        layers=[0, 2],
        options={"version": version},
        **({} if version == "1.0" else {"budgets": [6, 3]}),
    )
    batch = tiny.inputs(processor, ["What red car is on the left ? <image>", "dog <image>"])
    out = model(**batch, output_selection=True)
    assert out.logits.isfinite().all()
    assert (out.selection[0].scores.std(dim=1) > 0).all()


def test_image_alone(dense, processor):
    model = llava_sparse.sparsify(dense, "sparsevlm", layers=[0, 2], budgets=[6, 3])
    ids = torch.full((1, tiny.PATCHES), 4)
    out = model(input_ids=ids, pixel_values=tiny.inputs(processor, "<image>")["pixel_values"], output_selection=True)
    assert out.logits.isfinite().all()
    assert out.selection[0].kept.shape == (1, 6)


def test_budget_of_one(dense, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    for method, options in (("visionzip", None), ("sparsevlm", None), ("sparsevlm", {"version": "2.0"})):
        model = llava_sparse.sparsify(dense, method, budget=1, options=options)
        assert model.generate(**batch, max_new_tokens=3).shape[0] == 3


def test_visual_mask_equals_pixels(dense, processor):
    """Embeddings that hold the image features already, with a mask over them, give what the pixels give."""
    model = llava_sparse.sparsify(dense, "sparsevlm", layers=[0, 2], budgets=[6, 3])
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    features = torch.cat(list(model.get_image_features(batch["pixel_values"]).pooler_output))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    visual = batch["input_ids"] == 4
    embeds = embeds.masked_scatter(visual[..., None].expand_as(embeds), features)
    expected = model(**batch).logits
    got = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], visual_mask=visual).logits
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match=r"pixel_values, .* visual_mask, .* exclude each other: pass one of them"):
        model(inputs_embeds=embeds, visual_mask=visual, pixel_values=batch["pixel_values"])
    model.set_sparsity("visionzip", budget=5)
    with pytest.raises(ValueError, match="prunes in the encoder"):
        model(inputs_embeds=embeds, visual_mask=visual)


@pytest.mark.parametrize("placeholders", [1, 7, 17])
def test_wrong_number_of_placeholders(model, processor, placeholders):
    ids = torch.tensor([[1, *[4] * placeholders, 7, 8]])
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=ids, pixel_values=tiny.inputs(processor, "<image>")["pixel_values"])


def test_more_tokens_than_placeholders(dense, processor):
    """All tokens and CLS: only the sparse processor writes as many placeholders."""
    model = llava_sparse.sparsify(dense, "visionzip", budgets=[12, 5])
    with pytest.raises(ValueError, match="Each image needs 17 tokens"):
        model(**tiny.inputs(processor, tiny.QUESTIONS))
    ours = tiny.processor(llava_sparse.SparseLlavaProcessor, sparse_method="visionzip", sparse_budgets=[12, 5])
    assert model(**tiny.inputs(ours, tiny.QUESTIONS)).logits.isfinite().all()


def test_selection_counts_patches_with_the_full_strategy():
    dense = tiny.dense_model(vision_feature_select_strategy="full")
    model = llava_sparse.sparsify(dense, "visionzip", budgets=[4, 2])
    ids = torch.tensor([[1, *[4] * 34, 7, 8]])
    pixels = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    (stage,) = model(input_ids=ids, pixel_values=pixels, output_selection=True).selection
    (alone,) = model.model.vision_tower(pixels, sparsifier=model.model.sparsifier, output_selection=True).selection
    assert stage.kept[0].tolist() == [*alone.kept[0].tolist(), *(alone.kept[1] + 16).tolist()]
    assert set(stage.merge_map[0].tolist()) == {-1, 32, 33, 34, 35}


def test_scores_are_float32_under_autocast(model, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stages = model(**batch, output_selection=True).selection
    assert all(stage.scores.dtype == torch.float32 for stage in stages)
    if model.model.sparsifier.name in ("uniform", "pool"):
        pytest.skip("its scores are all the same")
    assert all((stage.scores.bfloat16().float() != stage.scores).any() for stage in stages)
