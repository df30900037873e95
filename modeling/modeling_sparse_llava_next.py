"""LLaVA-NeXT whose visual tokens are pruned: pictures in tiles, reduced tile by tile or as the decoder sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from .configuration_sparse_llava import build_sparsifier
from .configuration_sparse_llava_next import SparseLlavaNextConfig
from .modeling_sparse_clip import register_weight_names, vision_tower
from .modeling_sparse_text import sparse_decoder
from .pruning_head import PrunedHeadMixin
from .pruning_stock import features_getter
from .pruning_tiles import TilesMixin, raster_order

register_weight_names({"sparse_llava_next": "llava_next", "SparseLlavaNextModel": "LlavaNextModel"})


class SparseLlavaNextModel(TilesMixin, LlavaNextModel):
    """LLaVA-NeXT without language-model head, pruned.

    Modifications: vision tower and decoder are the sparse classes; pictures as of `TilesMixin`. With
    `sparse_method=None` it runs the stock forward.
    """

    config_class = SparseLlavaNextConfig
    config: SparseLlavaNextConfig
    visual_arguments = ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy", "question_ids")

    get_image_features = features_getter(LlavaNextModel.get_image_features)

    def __init__(self, config: SparseLlavaNextConfig) -> None:
        # Skips LlavaNextModel.__init__, which would build the stock parts first.
        super(LlavaNextModel, self).__init__(config)
        self.sparsifier = build_sparsifier(config)
        self.vision_tower = vision_tower(config.vision_config)
        self.multi_modal_projector = LlavaNextMultiModalProjector(config)
        width = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(width, dtype=self.dtype) / width**0.5)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = sparse_decoder(config.text_config)
        self.post_init()

    def dense_tokens(self, image_size: Any, grid: tuple[int, int]) -> int:
        if self.config.image_packing != "tiles":
            return super().dense_tokens(image_size, grid)
        full = self.config.vision_feature_select_strategy == "full"
        return (1 + grid[0] * grid[1]) * (self.side**2 + full)

    def pack_dense(self, tiles: Sequence[Tensor], image_sizes: Any, given: dict[str, Any]) -> list[Tensor]:
        strategy = given.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        return self.pack_image_features(tiles, image_sizes, strategy, self.newline)[0]

    def pack_image_features(
        self,
        image_features: Any,
        image_sizes: Any,
        vision_feature_select_strategy: str,
        image_newline: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """As the stock class's, or, with `image_packing="tiles"`, all patches of all tiles in `raster_order`."""
        if self.config.image_packing != "tiles":
            return super().pack_image_features(
                image_features, image_sizes, vision_feature_select_strategy, image_newline=image_newline
            )
        packed = []
        for tiles, grid in zip(image_features, self.tile_grids(image_sizes), strict=True):
            count = tiles.shape[1]
            index = torch.arange(count, device=tiles.device) - (count - self.side**2)
            packed.append(tiles.flatten(0, 1)[raster_order(index.expand(len(tiles), -1), grid, self.side)])
        return packed, torch.tensor([len(x) for x in packed], device=packed[0].device)


class SparseLlavaNextForConditionalGeneration(PrunedHeadMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT, pruned: the class that users load; see `PrunedHeadMixin`."""

    config_class = SparseLlavaNextConfig
    config: SparseLlavaNextConfig
    model_class = SparseLlavaNextModel
