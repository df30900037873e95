"""EADP (Wang, Yang and Shen, ECCV 2026, arXiv 2607.02484): pointed words guide what represents the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .method_cdpruner import EPSILON
from .pruning_methods import EncoderSparsifier
from .pruning_ops import cosines, greedy_coverage, to_float
from .pruning_registry import register_method
from .pruning_settings import option
from .pruning_types import VisionFeatures, VisualTokens

TEMPERATURE = 0.01
KEPT_WORDS = 0.2


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def word_weights(visual: Tensor, words: Tensor, valid: Tensor) -> Tensor:
    """How much each word guides: softmax of its negated entropy over the patches, among the fifth of least entropy.

    Args:
        visual: `(items, N, C)` unit vectors; words: `(items, L, C)`; valid: `(items, L)`.

    Returns:
        `(items, L)`, 0 for words that do not guide, and where no word is valid.
    """
    # Word by word: temperatures of 0.01 twice amplify rounding, which must not depend on what is in a batch.
    maps = torch.stack([(visual * word[:, None]).sum(-1) for word in unit(words).unbind(1)], dim=1)
    p = (maps / TEMPERATURE).softmax(-1)
    entropy = -(p * (p + 1e-12).log()).sum(-1)
    count = (valid.sum(-1, keepdim=True).double() * KEPT_WORDS).floor().clamp(min=1)
    rank = entropy.masked_fill(~valid, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    kept = (rank < count) & valid
    logits = (-entropy / (TEMPERATURE + EPSILON)).masked_fill(~kept, -torch.inf)
    return torch.where(kept, logits.softmax(-1), 0.0)


def smoothed(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scores `(items, N)` of a grid under a 3 x 3 Gaussian of sigma 1, mirrored at the edges without repeating them."""
    x, side = scores.unflatten(1, grid), float(torch.tensor(-0.5, dtype=torch.float64).exp())
    for axis, size in ((1, grid[0]), (2, grid[1])):
        if size > 1:
            place = torch.arange(size, device=scores.device)
            before, after = (place - 1).abs(), size - 1 - (size - 2 - place).abs()
            around = x.index_select(axis, before) + x.index_select(axis, after)
            x = (x + side * around) / (1 + 2 * side)
    return x.flatten(1)


@register_method
@dataclass(frozen=True)
class EADP(EncoderSparsifier):
    """Keeps the projected features that represent best what the question points to.

    With v the unit patches and t the words where they can be compared: each word's entropy is that of
    softmax(v t / 0.01); of the words the fifth of least entropy guide, weighted by softmax(-entropy / 0.01); u is
    alpha times the unit mean of the words plus (1 - alpha) times the weighted unit words. Relevance v u is brought to
    0..1 in every image, smoothed over the grid (3 x 3) and raised to beta: the demand of a patch. The kept tokens are
    those of largest sum over the patches i of demand_i max over the kept j of (1 + cos(v_i, v_j)) / 2, greedily, in
    their order, as they were.

    Options: `alpha` and `beta`, as the authors' code for LLaVA has them; `block`, see `greedy_coverage`, 1 by default.
    `sparse_budgets` is [tokens]; all patches are the dense model. Complexity: N^2 C for the similarities, k N^2 for the
    choice.

    Departs from the published code: words and patches are compared in the decoder's embedding space, as in the authors'
    code for Qwen, not by a CLIP text tower, and relevance is the cosine, not its negative, as the reference model's
    projector maps objects near their words; a batch is not one set of texts; an axis of one patch is not smoothed. The
    settings of the paper's tables are not published: they are not reproduced here.
    """

    name = "eadp"
    paper = "Combating Textual Noise and Redundancy: Entropy-Aware Dense Visual Token Pruning (arXiv 2607.02484)"
    summary = "keeps what represents best the patches that the question's most pointed words are similar to"
    cost = "N^2 C + k N^2"
    place = "projector"
    unit = "picture"
    looks_at_question = True
    needs_grid = True

    alpha: float = option(0.5, "weight of the whole question beside single words", low=0, high=1)
    beta: float = option(1.0, "exponent of the demand of a patch", low=0)
    block: int = option(1, "tokens chosen at a time", low=1)

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        projected, question = vision.projected, vision.question
        demand_of: Any = self.relevance(to_float(projected), question)  # type: ignore[arg-type]
        low, high = demand_of.amin(-1, keepdim=True), demand_of.amax(-1, keepdim=True)
        demand = smoothed((demand_of - low + EPSILON) / (high - low + EPSILON), vision.grid) ** self.beta
        similarity = (1 + cosines(projected).clamp(min=-1)) / 2  # type: ignore[arg-type]
        kept = greedy_coverage(similarity, demand, self.tokens, self.block)[0].sort(dim=-1).values
        return VisualTokens.kept(projected, kept, demand_of)  # type: ignore[arg-type]

    def relevance(self, projected: Tensor, question: Any) -> Tensor:
        """Of `(items, N, C)` patches to the words, `(items, N)`; equal patches get equal values."""
        visual, words, valid = unit(projected), to_float(question.embeds), question.valid
        weights = word_weights(visual, words, valid)
        whole = (words * valid[..., None]).sum(1) / valid.sum(-1, keepdim=True).clamp(min=1)
        direction = self.alpha * unit(whole) + (1 - self.alpha) * (weights[..., None] * unit(words)).sum(1)
        return (visual * direction[:, None]).sum(-1)
