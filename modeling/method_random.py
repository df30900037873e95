"""Random visual tokens, in the encoder and in the decoder: the controls that a selection has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .method_sparsevlm import default_budgets, default_layers
from .pruning_methods import DecoderSparsifier, EncoderSparsifier
from .pruning_ops import LAST, best, scramble
from .pruning_registry import register_method
from .pruning_settings import POSITIONS, option
from .pruning_types import Geometry, RaterAttention, VisionFeatures, VisualTokens

PAPER = "the control of Token Pruning in Multimodal LLMs: Are We Solving the Right Problem? (arXiv 2502.11501)"


def random_scores(fingerprints: Tensor, numbers: Tensor, seed: int) -> Tensor:
    """Independent uniform scores: `(rows,)` fingerprints and `(rows, V)` token numbers give `(rows, V)` in [0, 1)."""
    image = scramble((scramble(fingerprints & LAST) + seed) & LAST)
    return (scramble(scramble(image)[:, None] ^ numbers) >> 8).float() / 2**24


@register_method
@dataclass(frozen=True)
class RandomTokens(EncoderSparsifier):
    """Keeps `sparse_budget` patches of every image, uniformly at random without repetition, as the tower gives them.

    Score of patch p = hash(seed, image, p), the image standing for itself by the signs of its pixels: the same image
    gives the same patches, whatever is beside it in a batch, on every device and in every dtype (images that differ in
    no sign get the same ones). Another `seed` is an independent draw; of one draw the smaller budget is a part of the
    larger, and all patches are the dense model. No CLS, nothing merged, grid order kept. `sparse_budgets` is [tokens].
    Complexity: one pass over the pixels.
    """

    name = "random"
    paper = PAPER
    summary = "keeps patches at random, seeded, per image: a control; does not look at the picture or the question"
    cost = "pixels"
    draws = True

    seed: int = option(0, "of all draws", low=0, high=LAST)

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        x, fingerprints = vision.features, vision.fingerprints
        patches = torch.arange(x.shape[1], device=x.device)
        scores = random_scores(fingerprints.to(x.device), patches, self.seed)  # type: ignore[union-attr]
        return VisualTokens.kept(x, best(scores, self.tokens), scores)


@register_method
@dataclass(frozen=True)
class RandomDecoder(DecoderSparsifier):
    """Drops visual tokens between decoder layers, uniformly at random: what a rating between layers has to beat.

    Score of token n of a prompt = hash(seed, the prompt's images, n), the same at all layers: what a layer keeps is a
    part of what the one before has kept. `budgets[stage]` tokens stay; nothing is merged. Of features
    that the caller has encoded elsewhere no picture is known: all prompts then get the same tokens.

    `sparse_budget` gives the layers and tokens of SparseVLM 2.0, which merges nothing either. Options: `seed`;
    `positions`: "original" (default) or "compact" (renumbered after every pruning); `trim_cache`.
    """

    name = "random_decoder"
    paper = PAPER
    summary = "drops visual tokens at random between decoder layers, seeded, per prompt: a control"
    cost = "pixels + V"
    looks_at_question = False
    draws = True

    positions: str = option("original", "what becomes of position ids", choices=POSITIONS)
    seed: int = option(0, "of all draws", low=0, high=LAST)
    trim_cache: bool = option(False, "whether earlier layers forget what was pruned, too")

    @classmethod
    def preset_layers(cls, geometry: Geometry, budget: int | None) -> tuple[int, ...]:
        return default_layers("2.0", geometry.decoder_layers)

    @classmethod
    def preset_budgets(cls, geometry: Geometry, budget: int, layers: tuple[int, ...], by_hand: bool) -> tuple[int, ...]:
        return default_budgets("2.0", budget, geometry.patches, len(layers))

    def rate(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        return torch.zeros_like(text_valid)

    def scores(self, attention: RaterAttention) -> Tensor:
        fingerprints, numbers = attention.fingerprints, attention.numbers
        return random_scores(fingerprints, numbers, self.seed)  # type: ignore[arg-type]
