"""LLaVA-NeXT-Video whose visual tokens are pruned: pictures in tiles, and videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoModel
from transformers.models.llava_next_video.modeling_llava_next_video import (
    LlavaNextVideoMultiModalProjector,
    LlavaNextVideoPooler,
)

from .configuration_sparse_llava import build_sparsifier
from .configuration_sparse_llava_next_video import SparseLlavaNextVideoConfig
from .modeling_sparse_clip import register_weight_names, vision_tower
from .modeling_sparse_text import sparse_decoder
from .pruning_head import PrunedHeadMixin
from .pruning_stock import features_getter
from .pruning_tiles import TilesMixin

register_weight_names(
    {"sparse_llava_next_video": "llava_next_video", "SparseLlavaNextVideoModel": "LlavaNextVideoModel"}
)


class SparseLlavaNextVideoModel(TilesMixin, LlavaNextVideoModel):
    """LLaVA-NeXT-Video without language-model head, pruned.

    Modifications: vision tower and decoder are the sparse classes; pictures and videos as of `TilesMixin`. With
    `sparse_method=None` it runs the stock forward.
    """

    config_class = SparseLlavaNextVideoConfig
    config: SparseLlavaNextVideoConfig
    visual_arguments = (
        "pixel_values_videos", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy", "question_ids",
    )  # fmt: skip
    modalities = {  # noqa: RUF012
        "image": ("pixel_values", "image_token_id"),
        "video": ("pixel_values_videos", "video_token_id"),
    }

    get_image_features = features_getter(LlavaNextVideoModel.get_image_features)
    get_video_features = features_getter(LlavaNextVideoModel.get_video_features, "video")

    def __init__(self, config: SparseLlavaNextVideoConfig) -> None:
        # Skips LlavaNextVideoModel.__init__, which would build the stock parts first.
        super(LlavaNextVideoModel, self).__init__(config)
        self.sparsifier = build_sparsifier(config)
        self.vision_tower = vision_tower(config.vision_config)
        self.multi_modal_projector = LlavaNextVideoMultiModalProjector(config)
        width = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(width, dtype=self.dtype) / width**0.5)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = sparse_decoder(config.text_config)
        self.vision_resampler = LlavaNextVideoPooler(config)
        self.post_init()

    def pack_dense(self, tiles: Sequence[Tensor], image_sizes: Any, given: dict[str, Any]) -> list[Tensor]:
        strategy = given.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        return self.pack_image_features(tiles, image_sizes, strategy, image_newline=self.newline)[0]

    def video_features(self, pixel_values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        frames = self.projected_features(pixel_values.flatten(0, 1), pool=self.vision_resampler, **given)
        return list(frames.reshape(len(pixel_values), -1, frames.shape[-1]))


class SparseLlavaNextVideoForConditionalGeneration(PrunedHeadMixin, LlavaNextVideoForConditionalGeneration):
    """LLaVA-NeXT-Video, pruned: the class that users load; see `PrunedHeadMixin`."""

    config_class = SparseLlavaNextVideoConfig
    config: SparseLlavaNextVideoConfig
    model_class = SparseLlavaNextVideoModel
