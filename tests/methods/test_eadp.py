"""EADP against loops, and what defines it."""

from __future__ import annotations

import math

import pytest
import torch

from llava_sparse.modeling.method_eadp import EADP, smoothed
from llava_sparse.modeling.pruning_types import Question, VisionFeatures


def cosine(a, b):
    return (
        sum(x * y for x, y in zip(a, b, strict=True))
        / math.sqrt(sum(x * x for x in a))
        / math.sqrt(sum(y * y for y in b))
    )


def softmax(values):
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def reference(patches, words, grid, count, alpha, beta):
    """Of one image and its words, as lists: the kept patches, and their relevance."""
    (height, width), n = grid, len(patches)
    maps = [[cosine(p, w) for p in patches] for w in words]
    entropy = [-sum(p * math.log(p + 1e-12) for p in softmax([m / 0.01 for m in row])) for row in maps]
    kept = sorted(range(len(words)), key=lambda k: (entropy[k], k))[: max(1, int(0.2 * len(words)))]
    weights = softmax([-entropy[k] / (0.01 + 1e-6) for k in kept])
    mean = [sum(w[c] for w in words) / len(words) for c in range(len(words[0]))]
    local = [sum(w * maps[k][i] for w, k in zip(weights, kept, strict=True)) for i in range(n)]
    relevance = [alpha * cosine(p, mean) + (1 - alpha) * x for p, x in zip(patches, local, strict=True)]
    low, high = min(relevance), max(relevance)
    flat = [(r - low + 1e-6) / (high - low + 1e-6) for r in relevance]

    def mirrored(k, size):
        return -k if k < 0 else 2 * (size - 1) - k if k >= size else k

    kernel = {(y, x): math.exp(-(x * x + y * y) / 2) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    demand = [
        (sum(k * flat[mirrored(r + y, height) * width + mirrored(c + x, width)] for (y, x), k in kernel.items())
         / sum(kernel.values())) ** beta
        for r in range(height) for c in range(width)
    ]  # fmt: skip
    similarity = [[(1 + cosine(a, b)) / 2 for b in patches] for a in patches]
    chosen, covered = [], [0.0] * n
    for _ in range(count):
        gains = {
            j: sum(d * max(0.0, s - c) for d, s, c in zip(demand, similarity[j], covered, strict=True))
            for j in range(n) if j not in chosen
        }  # fmt: skip
        chosen.append(max(gains, key=lambda j: (gains[j], -j)))
        covered = [max(c, s) for c, s in zip(covered, similarity[chosen[-1]], strict=True)]
    return sorted(chosen), relevance


def drawn(items, grid, words, seed):
    torch.manual_seed(seed)
    projected = torch.randn(items, grid[0] * grid[1], 24) + 0.5 * torch.randn(items, 1, 24)
    asked = projected[:, :words] + 0.3 * torch.randn(items, words, 24)
    return VisionFeatures(projected, grid, projected=projected, question=Question(asked, torch.ones(items, words) > 0))


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (0.0, 2.0), (1.0, 10.0), (0.3, 0.0)])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (9, 9)])
def test_against_loops(grid, alpha, beta):
    vision = drawn(3, grid, 11, seed=sum(grid))
    got = EADP((-2,), (7,), alpha=alpha, beta=beta).reduce(vision)
    for i in range(3):
        kept, relevance = reference(
            vision.projected[i].double().tolist(), vision.question.embeds[i].double().tolist(), grid, 7, alpha, beta
        )
        torch.testing.assert_close(got.scores[i].double(), torch.tensor(relevance).double(), rtol=0, atol=2e-4)
        assert got.patch_index[i].tolist() == kept


def test_padding_and_neighbours_change_nothing():
    vision = drawn(4, (4, 4), 6, seed=1)
    method = EADP((-2,), (5,))
    whole = method.reduce(vision)
    asked = vision.question
    padded = Question(
        torch.nn.functional.pad(asked.embeds, (0, 0, 3, 2), value=9.0), torch.nn.functional.pad(asked.valid, (3, 2))
    )
    again = method.reduce(VisionFeatures(vision.features, (4, 4), projected=vision.projected, question=padded))
    assert torch.equal(again.patch_index, whole.patch_index)
    alone = method.reduce(vision.rows(torch.tensor([2])))
    assert torch.equal(alone.patch_index, whole.patch_index[2:3]) and torch.equal(alone.scores, whole.scores[2:3])


def test_smoothing_keeps_what_is_even_and_mirrors_at_the_edges():
    assert torch.allclose(smoothed(torch.ones(1, 12), (3, 4)), torch.ones(1, 12))
    side = math.exp(-0.5)
    got = smoothed(torch.tensor([[1.0, 0.0, 0.0]]), (1, 3))
    assert torch.allclose(got, torch.tensor([[1.0, side, 0.0]]) / (1 + 2 * side))
