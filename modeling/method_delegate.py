"""Delegate, a method of this package: the kept tokens stand for the patches that matter to the question."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .method_cdpruner import normalised
from .pruning_methods import EncoderSparsifier
from .pruning_ops import cosines, greedy_coverage, rows_at, to_float
from .pruning_registry import register_method
from .pruning_settings import option
from .pruning_types import Question, VisionFeatures, VisualTokens

EPSILON = 1e-6


def word_relevance(projected: Tensor, question: Question) -> Tensor:
    """How similar each patch is to the word of the question that it is most similar to.

    Args:
        projected: `(images, N, C)` visual features in the decoder's embedding space.

    Returns:
        `(images, N)`: the largest cosine over the text tokens of the question; 0 where it has none.
    """
    visual, text = (
        x / x.norm(dim=-1, keepdim=True).clamp(min=EPSILON) for x in map(to_float, (projected, question.embeds))
    )
    similarity = (visual @ text.transpose(1, 2)).masked_fill(~question.valid[:, None], -1)
    return torch.where(question.valid.any(-1, keepdim=True), similarity.amax(-1), 0)


def constituents(similarity: Tensor, kept: Tensor, sizes: Tensor | None = None) -> Tensor:
    """How many patches each of the `kept` `(rows, k)` stands for: itself, and those it is most similar to of all kept.

    Args:
        sizes: `(rows, N)`, how many each of these is itself; None for one.

    Returns:
        `(rows, k)` float.
    """
    places = torch.arange(kept.shape[1], device=kept.device)
    owner = rows_at(similarity, kept).argmax(1).scatter(1, kept, places.expand_as(kept))
    own = owner[:, None] == places[:, None]
    return (own if sizes is None else own * sizes[:, None]).sum(-1).to(similarity.dtype)


@register_method
@dataclass(frozen=True)
class Delegate(EncoderSparsifier):
    """Keeps the projected features that best represent what the question is about; each counts for all it represents.

    With v the projected features, t the question's tokens in the decoder's embeddings, S_ij = cos(v_i, v_j):

    - relevance r_i = max over t of cos(v_i, t), brought to q_i in 0..1 in every image; demand q_i^`beta`;
    - the kept tokens K are greedily those of largest sum over i of q_i^beta max(0, max over j in K of S_ij): relevant
      patches are kept or represented by similar ones, and nothing is kept twice (coverage);
    - a kept token j stands for the s_j patches that are most similar to it, and the decoder's attention is
      proportional: log s_j is added to the logits of all that look at it, as if all its patches were there. Fewer
      visual tokens draw less attention in all; without this, answers lean towards what the words alone suggest (No).
      Behind a method that merges in the tower's layers, patches are counted, not the tokens they have become.

    The kept tokens stand in their order, with contiguous positions, as they were. `sparse_budgets` is [tokens]. All
    patches are the dense model. Options: `beta`, 1 by default; `proportional`, true by default; `block`, see
    `greedy_coverage`, 1 by default.

    Proportional attention needs a mask: attention backends "sdpa" and "eager"; others, and a decoder method behind this
    one, need `proportional=False`. Relevance needs a model whose projector maps objects near their words, as the
    reference model's does. Complexity: N^2 C for the similarities, k N^2 for the choice.

    Ours; it borrows relevance in embedding space from SparseVLM, coverage from SCOPE, proportional attention from ToMe.
    """

    name = "delegate"
    paper = "of llava-sparse (docs/field.md), after SCOPE (arXiv 2510.24214) and ToMe (arXiv 2210.09461)"
    summary = (
        "keeps what best represents the patches that matter to the question; each token counts for those it represents"
    )
    cost = "N^2 C + k N^2"
    place = "projector"
    unit = "picture"
    looks_at_question = True

    beta: float = option(1.0, "exponent of the relevance of a patch", low=0)
    block: int = option(1, "tokens chosen at a time", low=1)
    proportional: bool = option(True, "whether a token counts in attention for all that it stands for")

    @property
    def needs_mask(self) -> bool:
        return self.proportional

    def flops(self, patches: int, width: int, channels: int) -> float:
        return 2.0 * patches**2 * channels + 2.0 * self.tokens * patches**2

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        projected: Any = vision.projected
        relevance = word_relevance(projected, vision.question)  # type: ignore[arg-type]
        similarity = cosines(projected)
        demand = normalised(relevance) ** self.beta
        kept = greedy_coverage(similarity, demand, self.tokens, self.block)[0].sort(dim=-1).values
        tokens = VisualTokens.kept(projected, kept, relevance)
        return (
            replace(tokens, token_sizes=constituents(similarity, kept, vision.token_sizes))
            if self.proportional
            else tokens
        )
