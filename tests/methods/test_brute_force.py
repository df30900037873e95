"""Every selection and merging function against plain loops in float64, ties included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sparse.modeling.method_cdpruner import conditional_dpp, normalised, text_relevance
from llava_sparse.modeling.method_divprune import max_min_tokens
from llava_sparse.modeling.method_fastv import last_token, last_token_scores
from llava_sparse.modeling.method_grid import bands, grid_cells, grid_patches, number_cells
from llava_sparse.modeling.method_scope import coverage_tokens
from llava_sparse.modeling.method_tome import bipartite_matching, merge, merge_schedule
from llava_sparse.modeling.method_vispruner import VisPruner, distinct_tokens
from llava_sparse.modeling.pruning_ops import cosines, greedy_coverage
from llava_sparse.modeling.pruning_types import Question, RaterAttention, VisionFeatures

QUICK = settings(max_examples=50, deadline=None)
SEEDS = st.integers(0, 9999)
# "exact": signs, whose norms, cosines and sums are exact in any order of summation, so that equal things are equal.
KINDS = st.sampled_from(["float64", "float32", "exact", "equal", "zeros"])
MARGIN = 1e-4
# The float32 that a float64 reference may differ from.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def draw(kind: str, seed: int, *shape: int) -> torch.Tensor:
    """Vectors: random, or of 16 signs with many duplicates, all equal, or with some that are zero."""
    random = torch.Generator().manual_seed(seed)
    if kind.startswith("float"):
        return torch.randn(*shape, 6, generator=random, dtype=getattr(torch, kind))
    few = torch.randint(0, 2, (4, 16), generator=random) * 2.0 - 1
    x = few[torch.randint(0, 4, shape, generator=random)]
    if kind == "equal":
        return x[..., :1, :].expand_as(x).contiguous()
    return x * torch.randint(0, 2, (*shape, 1), generator=random) if kind == "zeros" else x


def cosine(a: list[float], b: list[float]) -> float:
    norms = [math.sqrt(sum(v * v for v in x)) for x in (a, b)]
    return sum(v * w for v, w in zip(a, b, strict=True)) / (norms[0] * norms[1]) if all(norms) else 0.0


def first_best(values: dict[int, float], exact: bool) -> tuple[int, bool]:
    """The key of the largest value, the earlier of equals, and whether the choice is safe from rounding.

    Args:
        exact: whether values that are equal here are equal in the fast version too.
    """
    token = min(values, key=lambda t: (-values[t], t))
    others = [v for t, v in values.items() if t != token]
    gap = min((values[token] - v for v in others), default=math.inf)
    return token, (exact and gap == 0) or gap > MARGIN * max(abs(values[token]), MARGIN)


def agree(order: torch.Tensor, values: torch.Tensor, reference, exact: bool) -> None:
    """Compares greedy choices with a generator of values by token, to which the choice is sent.

    Where two tokens are so close that rounding decides, the reference goes on with what was chosen.
    """
    assert len(set(order.tolist())) == len(order)
    candidates = next(reference)
    for got, value in zip(order.tolist(), values.tolist(), strict=True):
        token, is_safe = first_best(candidates, exact)
        assert got == token or not is_safe
        assert candidates[got] == pytest.approx(candidates[token], rel=MARGIN, abs=MARGIN)
        assert value == pytest.approx(candidates[got], rel=MARGIN, abs=MARGIN)
        candidates = reference.send(got)


@QUICK
@given(kind=KINDS, seed=SEEDS, n=st.integers(1, 14))
def test_cosines(kind, seed, n):
    x = draw(kind, seed, 2, n)
    similarity = cosines(x)
    expected = [[[cosine(a, b) for b in image] for a in image] for image in x.double().tolist()]
    torch.testing.assert_close(similarity.double(), torch.tensor(expected, dtype=torch.float64), **CLOSE)
    assert torch.equal(similarity, similarity.transpose(1, 2)) and similarity.max() <= 1


def test_equal_vectors_have_equal_cosines():
    for n in (*range(2, 12), 64, 65, 100):
        for channels in (16, 33, 100):
            x = torch.randn(1, n, channels, generator=torch.Generator().manual_seed(n))
            x[:, n // 2 :] = x[:, :1]
            similarity = cosines(x)[0]
            assert (similarity[n // 2 :] == similarity[0]).all()


def max_min(similarity: list[list[float]]):
    tokens, chosen = range(len(similarity)), []
    while True:
        rest = [t for t in tokens if t not in chosen]
        others = chosen or tokens
        got = yield {t: min((1 - similarity[t][o] for o in others if o != t), default=math.inf) for t in rest}
        chosen.append(got)


@QUICK
@given(kind=KINDS, seed=SEEDS, n=st.integers(1, 16), share=st.floats(0, 1))
def test_max_min_tokens(kind, seed, n, share):
    x = draw(kind, seed, 3, n)
    order, distances = max_min_tokens(cosines(x), max(1, round(share * n)))
    for image in range(3):
        vectors = x[image].double().tolist()
        # Distances are symmetric, exactly: of two that are each other's nearest, the earlier comes first.
        agree(order[image], distances[image], max_min([[cosine(a, b) for b in vectors] for a in vectors]), exact=True)


def coverage(similarity: list[list[float]], saliency: list[float], alpha: float, combined: str):
    chosen: list[int] = []
    while True:
        covered = [max([0.0] + [similarity[c][i] for c in chosen]) for i in range(len(saliency))]
        values = {}
        for token in (t for t in range(len(saliency)) if t not in chosen):
            gain = sum(max(0.0, s - c) for s, c in zip(similarity[token], covered, strict=True))
            weight = saliency[token] ** alpha
            values[token] = gain * weight if combined == "multi" else gain + weight
        chosen.append((yield values))


@QUICK
@given(
    kind=KINDS,
    seed=SEEDS,
    n=st.integers(1, 14),
    share=st.floats(0, 1),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    combined=st.sampled_from(["multi", "add"]),
)
def test_coverage_tokens(kind, seed, n, share, alpha, combined):
    x = draw(kind, seed, 2, n)
    # Sixteenths, some of them 0: equal ones stay equal under any power.
    saliency = torch.randint(0, 9, (2, n), generator=torch.Generator().manual_seed(seed)).to(x.dtype) / 16
    order, gains = coverage_tokens(cosines(x), saliency, max(1, round(share * n)), alpha, combined)
    for image in range(2):
        vectors = x[image].double().tolist()
        similarity = [[cosine(a, b) for b in vectors] for a in vectors]
        reference = coverage(similarity, saliency[image].tolist(), alpha, combined)
        agree(order[image], gains[image], reference, exact=not kind.startswith("float"))


def volumes(kernel: torch.Tensor):
    """Conditional variances given those chosen in a round, a new one once the rank is used up."""

    def variances(tokens: list[int], basis: list[int]) -> dict[int, float]:
        known = torch.linalg.inv(kernel[basis][:, basis])
        return {t: (kernel[t, t] - kernel[t, basis] @ known @ kernel[basis, t]).item() for t in tokens}

    chosen: list[int] = []
    basis: list[int] = []
    while True:
        rest = [t for t in range(len(kernel)) if t not in chosen]
        values = variances(rest, basis)
        if all(v <= 1e-6 * kernel[t, t].item() for t, v in values.items()):
            basis = []
            values = variances(rest, basis)
        # Those that are spanned come behind all others, in their order.
        got = yield {t: v if v > 1e-6 * kernel[t, t].item() else -1.0 for t, v in values.items()}
        chosen.append(got)
        if kernel[got, got] > 0:
            basis.append(got)


@QUICK
@given(seed=SEEDS, n=st.integers(1, 12), rank=st.integers(1, 12), share=st.floats(0, 1), half=st.booleans())
def test_conditional_dpp(seed, n, rank, share, half):
    """Kernels of low rank, with several rounds; in float32, where rounding has a rank of its own, of full rank."""
    mix = torch.randn(2, n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    relevance = torch.rand(2, n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.5
    kernel = relevance[:, :, None] * cosines(mix @ draw("float64", seed, 2, rank)) * relevance[:, None]
    if half:
        kernel = (kernel + torch.eye(n) / 4).float()
    order, gains = conditional_dpp(kernel, max(1, round(share * n)))
    for image in range(2):
        agree(order[image], gains[image], volumes(kernel[image].double()), exact=False)


@QUICK
@given(data=st.data(), n=st.integers(1, 14), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_conditional_dpp_ties_and_new_rounds(data, n, dtype):
    """Groups of equal directions, weights that are powers of two: nothing rounds, all ties are exact, every round ends.

    In a round the best of each group, the earlier of equals; a weight of 0 has no volume and comes last.
    """
    groups = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=n, max_size=n))
    q, g = torch.tensor(weights, dtype=dtype), torch.tensor(groups)
    kernel = q[:, None] * (g[:, None] == g).to(dtype) * q
    rest, expected = list(range(n)), []
    while rest:
        best: dict[int, int] = {}
        for token in rest:
            if weights[token] and (groups[token] not in best or weights[token] > weights[best[groups[token]]]):
                best[groups[token]] = token
        expected += sorted(best.values(), key=lambda t: (-weights[t], t)) or rest
        rest = [t for t in rest if t not in expected]
    batch = torch.stack([kernel, torch.eye(n, dtype=dtype)])
    for count in range(1, n + 1):
        order, _ = conditional_dpp(batch, count)
        assert order.tolist() == [expected[:count], list(range(count))]


@QUICK
@given(seed=SEEDS, n=st.integers(2, 12), block=st.integers(2, 5), share=st.floats(0, 1))
def test_several_at_a_time(seed, n, block, share):
    """Each block is the best of what is left, given the blocks before it; nothing is chosen twice."""
    random = torch.Generator().manual_seed(seed)
    similarity = cosines(torch.randn(1, n, 6, generator=random, dtype=torch.float64))
    demand = torch.rand(1, n, generator=random, dtype=torch.float64)
    kernel = similarity + torch.eye(n) / 4
    count = max(1, round(share * n))
    found = greedy_coverage(similarity, demand, count, block), conditional_dpp(kernel, count, block)
    for (order, values), coverage in zip(found, (True, False), strict=True):
        chosen = order[0].tolist()
        assert len(set(chosen)) == count
        for start in range(0, count, block):
            before = chosen[:start]
            if coverage:
                covered = similarity[0][before].amax(0).clamp(min=0) if before else torch.zeros(n)
                value = ((similarity[0] - covered).clamp(min=0) * demand[0]).sum(-1)
            else:
                own, among = kernel[0][:, before], kernel[0][before][:, before]
                value = kernel[0].diagonal() - (own @ torch.linalg.inv(among) * own).sum(-1)
            value[before] = -torch.inf
            best = value.sort(descending=True).values[: min(block, count - start)]
            torch.testing.assert_close(values[0, start : start + block], best, rtol=1e-3, atol=1e-5)


@QUICK
@given(seed=SEEDS, n=st.integers(1, 12), scale=st.sampled_from([1e-3, 1.0, 100.0]), equal=st.booleans())
def test_normalised(seed, n, scale, equal):
    relevance = torch.randn(3, n, generator=torch.Generator().manual_seed(seed)) * scale
    if equal:
        relevance[1] = relevance[1, 0]
    got = normalised(relevance)
    for row, values in zip(got.tolist(), relevance.double().tolist(), strict=True):
        low, high = min(values), max(values)
        expected = [(v - low + 1e-6) / (high - low) if high > low else 1.0 for v in values]
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


@QUICK
@given(kind=KINDS, seed=SEEDS, n=st.integers(1, 10), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=2))
def test_text_relevance(kind, seed, n, lengths):
    """Padding does not count; a zero vector is relevant to nothing; where there is no text, nothing is."""
    visual, text = draw(kind, seed, len(lengths), n), draw(kind, seed + 1, len(lengths), 5)
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    text[~valid] = 1e3
    got = text_relevance(visual, Question(text, valid))
    for image, length in enumerate(lengths):
        words = text[image, :length].double().tolist()
        for p, patch in enumerate(visual[image].double().tolist()):
            expected = sum(cosine(patch, word) for word in words) / max(1, length)
            assert got[image, p].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_equal_patches_are_equally_relevant():
    """To the bit, at every place among however many: normalised, the smallest difference would be an order."""
    for seed in range(20):
        for n in (13, 27, 39):
            visual, text = draw("exact", seed, 1, n), draw("exact", seed + 1, 1, 5)
            (got,) = text_relevance(visual, Question(text, torch.arange(5)[None] < 3))
            same = (visual[0][:, None] == visual[0]).all(-1)
            assert (got[:, None] == got)[same].all()


def matched(vectors: list[list[float]], removed: int, protected: int) -> tuple[dict[int, int], list[int]]:
    """What goes into what, and the others in the order of the next layer."""
    n = len(vectors)
    a, b = list(range(protected > 0, n, 2)) if not protected else list(range(2, n, 2)), list(range(1, n, 2))
    target, likeness = {}, {}
    for token in a:
        rows = {other: cosine(vectors[token], vectors[other]) for other in (b[1:] if protected == 2 else b)}
        target[token] = min(rows, key=lambda o: (-rows[o], o), default=None)
        likeness[token] = max(rows.values(), default=-math.inf)
    ranked = sorted(a, key=lambda t: (-likeness[t], t))
    stays = sorted(ranked[removed:]) if protected else ranked[removed:]
    order = [[*stays, *b], [0, *stays, *b], [0, 1, *stays, *b[1:]]][protected]
    return {token: target[token] for token in ranked[:removed]}, order


@QUICK
@given(
    kind=st.sampled_from(["float64", "exact", "equal", "zeros"]),
    seed=SEEDS,
    n=st.integers(2, 17),
    share=st.floats(0, 1),
    protected=st.integers(0, 2),
)
def test_bipartite_matching_and_merge(kind, seed, n, share, protected):
    metric = draw(kind, seed, 2, n)
    removed = round(share * ((n - protected) // 2))
    places, count = bipartite_matching(metric, removed, protected)
    assert count == n - removed
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, 5, generator=random)
    size = torch.randint(1, 9, (2, n), generator=random).float()
    merged, total = merge(x, size, places, count)
    for image, vectors in enumerate(metric.double().tolist()):
        gone, order = matched(vectors, removed, protected)
        expected = [order.index(gone.get(token, token)) for token in range(n)]
        assert places[image].tolist() == expected
        for place in range(count):
            members = [t for t in range(n) if expected[t] == place]
            assert total[image, place] == sum(size[image, t] for t in members)
            mean = sum(size[image, t].double() * x[image, t].double() for t in members) / total[image, place]
            torch.testing.assert_close(merged[image, place].double(), mean, **CLOSE)


def test_merging_prefers_the_earlier_of_equals():
    """By hand: tokens 2 and 4 are as like to 1 as to 3; the earlier one goes, into the earlier one."""
    places, _ = bipartite_matching(torch.ones(1, 6, 3), 1)
    assert places.tolist() == [[0, 2, 2, 3, 1, 4]]


@QUICK
@given(tokens=st.integers(1, 80), share=st.floats(0, 1), layers=st.integers(1, 8))
def test_merge_schedule(tokens, share, layers):
    """As even as it can be: one number r everywhere, but for the ends, and no smaller one would do."""
    budget = max(1, round(share * tokens))

    def left(r: int) -> int:
        rest = tokens
        for _ in range(layers):
            rest -= min(r, rest // 2)
        return rest

    if left(tokens) > budget:
        with pytest.raises(ValueError, match=f"allowed: {left(tokens)} to {tokens}"):
            merge_schedule(tokens, budget, layers)
        return
    schedule = merge_schedule(tokens, budget, layers)
    assert len(schedule) == layers and sum(schedule) == tokens - budget
    r = max(schedule)
    assert left(r) <= budget and (r == 0 or left(r - 1) > budget)
    rest = tokens
    for merged in schedule:
        assert merged == min(r, rest // 2, rest - budget)
        rest -= merged


@QUICK
@given(rows=st.integers(1, 25), columns=st.integers(1, 25), share=st.floats(0, 1))
def test_grids(rows, columns, share):
    """Cells painted one by one, all of them alike; the patches that stay are nearest to the middles."""
    tokens = max(1, round(share * rows * columns))
    counts = bands(tokens, rows, columns)
    assert sum(counts) == tokens and min(counts) >= 1 and max(counts) <= columns and len(counts) <= rows
    assert max(counts) - min(counts) <= 1
    # Another number of bands would make cells less square, or does not fit.
    shape = abs(len(counts) - (tokens * rows / columns) ** 0.5)
    assert all(
        shape <= abs(n - (tokens * rows / columns) ** 0.5) + 1e-9
        for n in range(1, min(rows, tokens) + 1)
        if -(-tokens // n) <= columns
    )
    painted, cell = [[-1] * columns for _ in range(rows)], 0
    for band, cells in enumerate(counts):
        for i in range(cells):
            for row in range(band * rows // len(counts), (band + 1) * rows // len(counts)):
                for column in range(i * columns // cells, (i + 1) * columns // cells):
                    painted[row][column] = cell
            cell += 1
    cells = grid_cells(tokens, rows, columns)
    assert cells == [cell for row in painted for cell in row] and set(cells) == set(range(tokens))
    kept = grid_patches(tokens, rows, columns)
    assert kept == sorted(set(kept)) and len(kept) == tokens
    middles = [
        ((b + 0.5) * rows / len(counts), (i + 0.5) * columns / n) for b, n in enumerate(counts) for i in range(n)
    ]
    for patch, (y, x) in zip(kept, middles, strict=True):
        assert abs(patch // columns + 0.5 - y) <= 0.5 and abs(patch % columns + 0.5 - x) <= 0.5

    numbers, merged = number_cells(torch.tensor(cells), tokens)
    patches, made = rows * columns, 0
    for cell in range(tokens):
        members = [patch for patch in range(patches) if cells[patch] == cell]
        alone = len(members) == 1
        assert numbers[cell] == (members[0] if alone else patches + made)
        assert all(merged[patch] == (-1 if alone else made) for patch in members)
        made += not alone


@QUICK
@given(seed=SEEDS, rows=st.integers(1, 3), heads=st.integers(1, 4), raters=st.integers(1, 6), visual=st.integers(1, 7))
def test_last_token_scores(seed, rows, heads, raters, visual):
    """The last of the text that is there rates, wherever padding is; a row without text rates nothing."""
    random = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(rows, heads, raters, visual, generator=random)
    valid = torch.rand(rows, raters, generator=random) > 0.4
    chosen = last_token(valid)
    scores = last_token_scores(RaterAttention(probabilities, chosen, None, None, None))
    for row in range(rows):
        there = [r for r in range(raters) if valid[row, r]]
        assert chosen[row].tolist() == [bool(there) and r == there[-1] for r in range(raters)]
        for v in range(visual):
            expected = sum(probabilities[row, h, there[-1], v].item() for h in range(heads)) / heads if there else 0
            assert scores[row, v].item() == pytest.approx(expected, rel=1e-5)


@QUICK
@given(seed=SEEDS, patches=st.integers(1, 40), data=st.data())
def test_distinct_tokens_against_loops(seed, patches, data):
    count = data.draw(st.integers(0, patches))
    x = torch.randint(0, 2, (2, patches, 16), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    similarity = cosines(x)
    got = distinct_tokens(similarity, torch.arange(patches).expand(2, -1), count)
    for row in range(2):
        tokens, s = list(range(patches)), similarity[row].tolist()
        while len(tokens) > count:
            even, odd = tokens[::2], tokens[1::2]
            ranked = sorted(even, key=lambda i: -max((s[i][j] for j in odd), default=0))
            tokens = ranked[min(8, len(tokens) - count, len(even)) :] + odd
        assert got[row].tolist() == tokens


@QUICK
@given(
    seed=SEEDS,
    patches=st.integers(1, 40),
    share=st.floats(0, 1),
    important=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]) | st.floats(0, 1),
    ties=st.booleans(),
)
def test_vispruner_against_loops(seed, patches, share, important, ties):
    """The int(important k) patches that CLS attends to most; duplicates go from the others, by descending attention."""
    budget = max(1, round(share * patches))
    random = torch.Generator().manual_seed(seed)
    # Signs: their cosines are exact, and there are duplicates. Attention in 64ths: its mean over heads is exact too.
    features = torch.randint(0, 2, (2, patches, 16), generator=random) * 2.0 - 1
    saliency = torch.randint(1, 9 if ties else 10**6, (2, 2, patches), generator=random) / 64
    method = VisPruner((-2,), (budget,), important=important)
    got = method.reduce(VisionFeatures(features, (1, patches), saliency=saliency))
    for image in range(2):
        attention = saliency[image].double().mean(0).tolist()
        vectors = features[image].double().tolist()
        order = sorted(range(patches), key=lambda p: (-attention[p], p))
        kept, rest = order[: int(important * budget)], order[int(important * budget) :]
        while len(kept) + len(rest) > budget:
            even, odd = rest[::2], rest[1::2]
            nearest = {i: max((cosine(vectors[i], vectors[j]) for j in odd), default=0) for i in even}
            ranked = sorted(even, key=lambda i: -nearest[i])
            rest = ranked[min(8, len(kept) + len(rest) - budget, len(even)) :] + odd
        assert got.patch_index[image].tolist() == sorted(kept + rest)
        assert got.scores[image].tolist() == attention
        assert torch.equal(got.features[image], features[image, sorted(kept + rest)])
