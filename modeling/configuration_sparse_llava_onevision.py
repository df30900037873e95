"""Configuration of LLaVA-OneVision with the five `sparse_*` fields."""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionConfig

from .configuration_sparse_llava import SparseFieldsMixin


class SparseLlavaOnevisionConfig(SparseFieldsMixin, LlavaOnevisionConfig):
    """`LlavaOnevisionConfig` with the `sparse_*` fields.

    `sparse_budget` is of a picture over all its tiles, or of a video over all its frames: an integer at most all of its
    tokens, a ratio one of those that it has in the dense model. It is checked against, and expanded for, the largest
    picture after scaling: of "anyres_max_9", ten tiles.
    """

    model_type = "sparse_llava_onevision"

    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None

    @property
    def tiles_per_image(self) -> int:
        """Tiles that the largest picture is scaled down to, with the one that is all of it."""
        return 1 + int(self.vision_aspect_ratio.removeprefix("anyres_max_"))
