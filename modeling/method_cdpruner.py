"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): diverse visual tokens, given what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pruning_methods import EncoderSparsifier
from .pruning_ops import cosines, ranked, rows_at, to_float
from .pruning_registry import register_method
from .pruning_settings import option
from .pruning_types import Question, VisionFeatures, VisualTokens

EPSILON = 1e-6


def normalised(relevance: Tensor) -> Tensor:
    """Relevance `(images, N)` of each image from about 0 to 1: (r - min + 1e-6) / (max - min); 1 where all is equal."""
    low, high = relevance.amin(-1, keepdim=True), relevance.amax(-1, keepdim=True)
    return torch.where(high > low, (relevance - low + EPSILON) / (high - low).clamp(min=EPSILON**2), 1.0)


def text_relevance(projected: Tensor, question: Question) -> Tensor:
    """Relevance of `(images, N, C)` projected features to the question, in the decoder's own embedding space.

    r_i = mean over the text tokens t of cos(v_i, t): `(images, N)`.
    """
    text = to_float(question.embeds)
    unit = text / text.norm(dim=-1, keepdim=True).clamp(min=EPSILON)
    weight = question.valid.to(unit.dtype)
    mean = (weight[:, None] @ unit) / weight.sum(-1).clamp(min=1)[:, None, None]
    visual = to_float(projected)
    # Not a product of matrices, which may round equal patches differently: normalised, that would be their order.
    return (visual * mean).sum(-1) / visual.norm(dim=-1).clamp(min=EPSILON)


@torch.no_grad()
def conditional_dpp(kernel: Tensor, count: int, block: int = 1) -> tuple[Tensor, Tensor]:
    """Greedy maximum a posteriori choice of a determinantal point process (paper, section 3.3).

    Where the rank of the kernel is used up, so that nothing left adds to the volume, a new round begins among the rest.

    Args:
        kernel: `(rows, N, N)` symmetric, positive semidefinite.
        count: how many are chosen; block: how many at a time, each by its variance given those before them all.

    Returns:
        the tokens in the order of choice, and the conditional variance with which each was chosen, `(rows, count)`.
    """
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    least = EPSILON * diagonal
    variance = diagonal.clone()
    taken = torch.zeros_like(variance, dtype=torch.bool)
    factors = kernel.new_zeros(kernel.shape[0], count, kernel.shape[1])
    chosen, gains = [], []
    for start in range(0, count, block):
        spent = ((variance <= least) | taken).all(-1, keepdim=True)
        variance = torch.where(spent, diagonal, variance)
        factors = factors.masked_fill(spent[..., None], 0)
        # A token that the chosen ones span has no variance of its own, but for rounding.
        value = torch.where(variance > least, variance, -1.0).masked_fill(taken, -torch.inf)
        end = min(start + block, count)
        tokens = value.argmax(-1, keepdim=True) if end == start + 1 else ranked(value)[:, : end - start]
        gain = value.gather(1, tokens)
        chosen.append(tokens)
        gains.append(gain)
        taken = taken.scatter(1, tokens, True)
        known = factors.gather(2, tokens[:, None].expand(-1, count, -1))
        rows = rows_at(kernel, tokens) - known.transpose(1, 2) @ factors
        if end == start + 1:
            rows = rows / gain.clamp(min=torch.finfo(gain.dtype).tiny).sqrt()[..., None]
        else:
            among = rows.gather(2, tokens[:, None].expand(-1, end - start, -1))
            # Tokens of a block may be alike; a little on the diagonal keeps its root.
            among = among + torch.diag_embed(EPSILON + least.gather(1, tokens))
            root = torch.linalg.cholesky_ex(among)[0]
            rows = torch.linalg.solve_triangular(root, rows, upper=False).nan_to_num(posinf=0, neginf=0)
        factors[:, start:end] = rows
        variance = variance - rows.square().sum(1)
    return torch.cat(chosen, dim=1), torch.cat(gains, dim=1)


@register_method
@dataclass(frozen=True)
class CDPruner(EncoderSparsifier):
    """Keeps the projected features of largest volume, each weighted by its relevance to the question.

    With S the cosines of the projected features and q the relevance of each patch, brought to 0..1 in every image:
    L = diag(q) S diag(q), and the kept tokens are the greedy maximum of det(L_kept): one after the other the token of
    the largest variance given those chosen. They stand in their order, with contiguous positions.

    Relevance. Options: `clip`: a CLIP model, by Hub id or folder, whose vision tower is the LLaVA's own
    ("openai/clip-vit-large-patch14-336" for LLaVA-1.5). As published: r_i = mean over the parts m of the question of
    -cos(image embedding of patch i, text embedding of m), negated; the model then needs `question_ids`, which
    `SparseLlavaProcessor` with the same options writes. Without it (default), the decoder's own embeddings: see
    `text_relevance`, which needs no second model and is not the paper's.

    `sparse_budgets` is [tokens]. `block`, 1 by default, as published, chooses several at a time: see
    `conditional_dpp`. All patches are the dense model. Complexity: N^2 C for the kernel, k^2 N / 2 for the choice.

    Departs from the published code: relevance is normalised in every image, not over the batch; where the rank of L is
    used up, the choice goes on in a new round, where the published one repeats tokens; several images stay several.
    """

    name = "cdpruner"
    paper = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (arXiv 2506.10967)"
    )
    summary = "keeps a diverse set of projected features, weighted by relevance to the question"
    cost = "N^2 C + k^2 N"
    place = "projector"
    looks_at_question = True

    clip: str | None = option(
        None, "Hub id or folder of a CLIP model that measures relevance", kind=str, from_caller=True
    )

    block: int = option(1, "tokens chosen at a time", low=1)

    def relevance(self, vision: VisionFeatures) -> Tensor:
        """Of `(items, N)` patches to the question, by CLIP where it is named, else by the decoder's embeddings."""
        question: Any = vision.question
        if self.clip is None:
            return text_relevance(vision.projected, question)  # type: ignore[arg-type]
        # transformers' CLIP is slow to import, and nothing else here needs it.
        from .clip_text import clip_relevance

        return clip_relevance(self.clip, vision.features, question.ids)

    def flops(self, patches: int, width: int, channels: int) -> float:
        return 2.0 * patches**2 * channels + 2.0 * self.tokens**2 * patches

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        projected: Any = vision.projected
        relevance = self.relevance(vision)
        q = normalised(relevance)
        kernel = q[:, :, None] * cosines(projected) * q[:, None]
        order = conditional_dpp(kernel, self.tokens, self.block)[0]
        return VisualTokens.kept(projected, order.sort(dim=-1).values, relevance)
