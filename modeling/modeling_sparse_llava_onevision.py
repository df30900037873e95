"""LLaVA-OneVision whose visual tokens are pruned: a picture in tiles, several pictures, videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

from .configuration_sparse_llava import build_sparsifier
from .configuration_sparse_llava_onevision import SparseLlavaOnevisionConfig
from .modeling_sparse_clip import register_weight_names, vision_tower
from .modeling_sparse_text import sparse_decoder
from .pruning_head import PrunedHeadMixin
from .pruning_items import ImageFeatures
from .pruning_stock import features_getter
from .pruning_tiles import OF_PICTURES, TilesMixin

register_weight_names({"sparse_llava_onevision": "llava_onevision", "SparseLlavaOnevisionModel": "LlavaOnevisionModel"})


class SparseLlavaOnevisionModel(TilesMixin, LlavaOnevisionModel):
    """LLaVA-OneVision without language-model head, pruned.

    Modifications: the decoder is the sparse class; a prompt's only picture is in tiles, as of `TilesMixin`, each of
    several is one tile. Methods behind the projector choose from all pooled tokens of a video at once. With
    `sparse_method=None` it runs the stock forward.
    """

    config_class = SparseLlavaOnevisionConfig
    config: SparseLlavaOnevisionConfig
    visual_arguments = (
        "pixel_values_videos", "vision_feature_layer", "vision_feature_select_strategy", "question_ids", *OF_PICTURES,
    )  # fmt: skip
    modalities = {  # noqa: RUF012
        "image": ("pixel_values", "image_token_id"),
        "video": ("pixel_values_videos", "video_token_id"),
    }

    get_image_features = features_getter(LlavaOnevisionModel.get_image_features)
    get_video_features = features_getter(LlavaOnevisionModel.get_video_features, "video")

    def __init__(self, config: SparseLlavaOnevisionConfig) -> None:
        # Skips LlavaOnevisionModel.__init__, which would build the stock parts first.
        super(LlavaOnevisionModel, self).__init__(config)
        self.sparsifier = build_sparsifier(config)
        self.vision_tower = vision_tower(config.vision_config)
        self.multi_modal_projector = LlavaOnevisionMultiModalProjector(config)
        width = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(width, dtype=self.dtype) / width**0.5)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = sparse_decoder(config.text_config)
        self.post_init()

    def dense_tokens(self, image_size: Any, grid: tuple[int, int]) -> int:
        if grid == (0, 0):
            return self.side**2 + 1
        rows, columns = self.unpadded(image_size, grid)
        most = self.config.tiles_per_image - 1
        ratio = (rows * columns / (most * self.side**2)) ** 0.5
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return self.side**2 + rows * (columns + 1)

    def pack_dense(self, tiles: Sequence[Tensor], image_sizes: Any, given: dict[str, Any]) -> list[Tensor]:
        aspect = given.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        newline = self.newline
        return self.pack_image_features(tiles, image_sizes, image_newline=newline, vision_aspect_ratio=aspect)[0]

    def video_features(self, pixel_values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        frames = self.apply_pooling(self.projected_features(pixel_values.flatten(0, 1), **given))
        newline = self.newline[None].to(frames.device, frames.dtype)
        return [torch.cat([x, newline]) for x in frames.reshape(len(pixel_values), -1, frames.shape[-1])]

    def stock_features(self, given: Any, modality: str) -> Any:
        if modality != "video" or not isinstance(given, ImageFeatures):
            return given
        return BaseModelOutputWithPooling(pooler_output=torch.stack(given.features))


class SparseLlavaOnevisionForConditionalGeneration(PrunedHeadMixin, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision, pruned: the class that users load; see `PrunedHeadMixin`."""

    config_class = SparseLlavaOnevisionConfig
    config: SparseLlavaOnevisionConfig
    model_class = SparseLlavaOnevisionModel
