"""Random visual tokens, in the encoder and in the decoder: the controls that a selection has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import is_count
from .sparsevlm import check_stage_budgets, default_layers
from .sparsifier import DecoderSparsifier, EncoderSparsifier, Geometry, Images, RaterAttention, Reduced
from .tensors import best

PAPER = "the control of Token Pruning in Multimodal LLMs: Are We Solving the Right Problem? (arXiv 2502.11501)"
LAST = 2**32 - 1


def scramble(x: Tensor) -> Tensor:
    """Mixes the bits of int64 numbers from 0 to 2^32 - 1, one to one; integers alone, so the same on every device."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & LAST
    return (x >> 16) ^ x


def image_fingerprints(pixels: Tensor) -> Tensor:
    """A number for every image, from the signs of its normalised pixels: no dtype and no device changes a sign.

    Args:
        pixels: `(images, 3, height, width)`.

    Returns:
        `(images,)` int64 from 0 to 2^32 - 1.
    """
    positive = pixels.flatten(1) > 0
    places = scramble(1 + torch.arange(positive.shape[1], device=pixels.device))
    return (positive * places).sum(-1) & LAST


def random_scores(fingerprints: Tensor, numbers: Tensor, seed: int) -> Tensor:
    """Independent uniform scores: `(rows,)` fingerprints and `(rows, V)` token numbers give `(rows, V)` in [0, 1)."""
    image = scramble((scramble(fingerprints & LAST) + seed) & LAST)
    return (scramble(scramble(image)[:, None] ^ numbers) >> 8).float() / 2**24


def check_seed(seed: object) -> int:
    """Returns `seed` if it is an integer from 0 to 2^32 - 1; raises ValueError otherwise."""
    if not is_count(seed, 0, LAST):
        raise ValueError(f"sparse_options: seed={seed!r}: an integer from 0 to {LAST} is allowed.")
    return int(seed)  # type: ignore[call-overload]


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
    option_defaults: ClassVar[dict[str, Any]] = {"seed": 0}

    seed: int = 0

    @classmethod
    def check_option(cls, name: str, value: Any) -> Any:
        return check_seed(value)

    def reduce(self, images: Images) -> Reduced:
        patches = torch.arange(images.hidden.shape[1] - 1, device=images.hidden.device)
        scores = random_scores(image_fingerprints(images.pixels).to(images.hidden.device), patches, self.seed)
        return Reduced.kept(images.hidden[:, 1:], best(scores, self.tokens), scores)


@dataclass(frozen=True)
class RandomDecoder(DecoderSparsifier):
    """Drops visual tokens between decoder layers, uniformly at random: what a rating between layers has to beat.

    Score of token n of a prompt = hash(seed, the prompt's images, n), the same at all layers: what a layer keeps is a
    part of what the one before has kept. `budgets[stage]` tokens stay; nothing is merged. Prompts given as embeddings
    (`visual_mask`) need the model's argument `fingerprints`, or all get the same tokens.

    `sparse_budget` gives the layers and tokens of SparseVLM 2.0, which merges nothing either. Options: `seed`;
    `positions`: "original" (default) or "compact" (renumbered after every pruning); `trim_cache`.
    """

    name = "random_decoder"
    paper = PAPER
    summary = "drops visual tokens at random between decoder layers, seeded, per prompt: a control"
    cost = "pixels + V"
    looks_at_question = False
    option_defaults: ClassVar[dict[str, Any]] = {"positions": "original", "seed": 0, "trim_cache": False}

    positions: str = "original"
    seed: int = 0
    trim_cache: bool = False

    @classmethod
    def check_option(cls, name: str, value: Any) -> Any:
        return check_seed(value) if name == "seed" else super().check_option(name, value)

    @classmethod
    def preset_layers(cls, geometry: Geometry, budget: int | None) -> tuple[int, ...]:
        return default_layers("2.0", geometry.decoder_layers)

    @classmethod
    def preset_budgets(cls, geometry: Geometry, budget: int, layers: tuple[int, ...], by_hand: bool) -> tuple[int, ...]:
        return check_stage_budgets(cls.name, "2.0", geometry, layers, budget, None)

    def fingerprints(self, pixels: Tensor) -> Tensor:
        return image_fingerprints(pixels)

    def rate(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        return torch.zeros_like(text_valid)

    def scores(self, attention: RaterAttention) -> Tensor:
        assert attention.fingerprints is not None
        assert attention.numbers is not None
        return random_scores(attention.fingerprints, attention.numbers, self.seed)
