"""Configuration of LLaVA-NeXT-Video with the five `sparse_*` fields."""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextVideoConfig

from .configuration_sparse_llava import SparseFieldsMixin
from .configuration_sparse_llava_next import most_tiles


class SparseLlavaNextVideoConfig(SparseFieldsMixin, LlavaNextVideoConfig):
    """`LlavaNextVideoConfig` with the `sparse_*` fields.

    `sparse_budget` is of a picture as in `SparseLlavaNextConfig`, or of a video over all its frames.
    """

    model_type = "sparse_llava_next_video"

    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None

    @property
    def tiles_per_image(self) -> int:
        """Tiles of the largest picture, with the one that is all of it."""
        return most_tiles(self)
