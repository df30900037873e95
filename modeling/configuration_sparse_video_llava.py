"""Configuration of Video-LLaVA with the five `sparse_*` fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import VideoLlavaConfig

from .configuration_sparse_llava import SparseFieldsMixin
from .pruning_settings import Sparsity

FRAMES = 8
# SparseVLM on Video-LLaVA as its authors run it: one stage behind layer 1, as many tokens as the attention's rank.
PUBLISHED_BUDGET = 194
PUBLISHED: dict[str, Any] = {"layers": [1], "options": {"version": "1.0", "scale": 1.0, "bias": 0.0}}


class SparseVideoLlavaConfig(SparseFieldsMixin, VideoLlavaConfig):
    """`VideoLlavaConfig` with the `sparse_*` fields.

    `sparse_budget` is of a video over all its frames, and of an image: an integer keeps at most all there is, a ratio
    is of the tokens that the item has in the dense model, CLS of every frame among them. A method inside the vision
    tower gets an equal share for each frame; `sparse_budgets` of such a method are of a frame. What settings are
    checked against, and expanded to, is a video of 8 frames, with which the model was trained. SparseVLM without
    further settings, or with the published budget of 194, is what its authors published for Video-LLaVA.
    """

    model_type = "sparse_video_llava"

    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None

    @property
    def frames_per_video(self) -> int:
        return FRAMES

    def published(self, settings: Sparsity) -> Sparsity:
        """The settings with what the paper has in place of what they leave open."""
        alone = (settings.layers, settings.budgets, settings.options) == (None, None, None)
        if settings.method == "sparsevlm" and alone and settings.budget in (None, PUBLISHED_BUDGET):
            return replace(settings, **PUBLISHED)
        return settings
