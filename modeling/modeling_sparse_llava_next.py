"""LLaVA-NeXT whose visual tokens are pruned: pictures in tiles, reduced tile by tile or as the decoder sees them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextMultiModalProjector,
    get_anyres_image_grid_shape,
    unpad_image,
)
from transformers.utils.generic import can_return_tuple

from .configuration_sparse_llava import build_sparsifier
from .configuration_sparse_llava_next import SparseLlavaNextConfig
from .modeling_sparse_clip import ProjectedFeaturesMixin, SparseCLIPVisionModel, register_weight_names, vision_tower
from .modeling_sparse_llava import SparseLlavaForConditionalGeneration
from .modeling_sparse_text import sparse_decoder
from .pruning_generation import PrunedGenerationMixin
from .pruning_items import ImageFeatures, tokens_of
from .pruning_model import PrunedHeadMixin, PrunedModelMixin
from .pruning_ops import image_fingerprints
from .pruning_types import VisionFeatures, VisualTokens

register_weight_names({"sparse_llava_next": "llava_next", "SparseLlavaNextModel": "LlavaNextModel"})


def raster_order(index: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The order in which the tokens of a picture's tiles, taken tile by tile, enter the decoder, as published.

    Those of the whole picture as they are; then the patches of the other tiles in raster order over the picture, then
    what stands for none (CLS) and what was made anew, tile by tile.

    Args:
        index: `(tiles, k)` int64, see `VisualTokens.patch_index`, the first tile being of the whole picture; grid: rows
            and columns of the others; side: patches along the side of a tile.

    Returns:
        `(tiles * k,)` int64.
    """
    (tiles, count), patches = index.shape, side * side
    tile = torch.arange(tiles, device=index.device)[:, None]
    row, column = (tile - 1).div(grid[1], rounding_mode="floor"), (tile - 1) % grid[1]
    raster = (row * side + index // side) * grid[1] * side + column * side + index % side
    behind = (tiles - 1) * patches
    made = behind + tiles + tile * count + index - patches
    key = torch.where(index < 0, behind + tile, torch.where(index < patches, raster, made))
    first = torch.arange(count, device=index.device) - count
    return torch.where(tile == 0, first, key).flatten().argsort(stable=True)


class SparseLlavaNextModel(PrunedModelMixin, ProjectedFeaturesMixin, LlavaNextModel):
    """LLaVA-NeXT without language-model head, pruned.

    Modifications: vision tower and decoder are the sparse classes. A method with unit "tile" reduces each tile by
    itself, padding included; its tokens stand in `raster_order`, with neither newlines nor unpadding. Others choose
    from what the decoder of the dense model is given, newlines among it. With `sparse_method=None` it runs the stock
    forward.
    """

    config_class = SparseLlavaNextConfig
    config: SparseLlavaNextConfig
    visual_arguments = ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy", "question_ids")

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

    @property
    def side(self) -> int:
        """Patches along the side of a tile."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def sizes_of(self, size: Any) -> dict[str, Any]:
        if isinstance(size, int):  # Packed by the caller.
            return {"patches": size, "tiles": 1}
        return {"tiles": 1 + size[1][0] * size[1][1], "packed": tokens_of(size)}

    def grid_of(self, patches: int) -> tuple[int, int]:
        """Packed tokens are no grid: rows end in newlines, and the first tile is the whole picture."""
        return (1, patches)

    def tile_grids(self, image_sizes: Any) -> list[tuple[int, int]]:
        """Rows and columns of the tiles, besides the first, of pictures of `(height, width)`."""
        pinpoints, size = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return [get_anyres_image_grid_shape(list(map(int, image)), pinpoints, size) for image in image_sizes]

    def dense_tokens(self, image_size: Any, grid: tuple[int, int]) -> int:
        """Tokens of a picture of `(height, width)` in the dense model."""
        full = self.config.vision_feature_select_strategy == "full"
        if self.config.image_packing == "tiles":
            return (1 + grid[0] * grid[1]) * (self.side**2 + full)
        whole = torch.empty(1, grid[0] * self.side, grid[1] * self.side, device="meta")
        _, rows, columns = unpad_image(whole, list(map(int, image_size))).shape
        return self.side**2 + full + rows * (columns + 1)

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

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes and projects images; arguments as the stock class's, and

        Args:
            question_ids: `(prompts, n)` int64, the question in CLIP's vocabulary, -1 for padding, for a method that
                reads it with a CLIP text tower.

        Returns:
            `ImageFeatures`, which `forward` and `generate` take as `mm_encoder_outputs={"image": ...}`; of a dense
            model the stock output.

        Raises:
            ValueError: for a feature layer or strategy that contradicts an encoder method, which takes its own.
        """
        stock: dict[str, Any] = {
            "image_sizes": image_sizes,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        method = self.sparsifier
        if method is None:
            return super().get_image_features(pixel_values=pixel_values, return_dict=True, **stock, **kwargs)
        return self.encode_images(method, pixel_values, question_ids=question_ids, **stock, **kwargs)

    def encode_images(
        self,
        method: Any,
        pixel_values: Tensor,
        image_sizes: Any = None,
        question_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageFeatures:
        encoder = None if method is None else method.encoder
        grids = self.tile_grids(image_sizes)
        tiles = [1 + rows * columns for rows, columns in grids]
        if pixel_values.dim() == 4:
            pictures = list(pixel_values.split(tiles))
        else:
            pictures = [picture[:count] for picture, count in zip(pixel_values, tiles, strict=True)]
        drawn = None
        if method is not None and method.draws:
            drawn = torch.cat([image_fingerprints(picture.flatten(0, 1)[None]) for picture in pictures])
        known: dict[str, Any] = {"fingerprints": drawn, "question_ids": question_ids, "snapshot": (method,)}
        if encoder is not None:
            self.refuse_features(encoder, kwargs)
        if encoder is None or encoder.unit == "picture":
            strategy = kwargs.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
            features = self.projected_features(torch.cat(pictures), **kwargs).split(tiles)
            packed, _ = self.pack_image_features(features, image_sizes, strategy, self.image_newline)
            return replace(self.adopt(BaseModelOutputWithPooling(pooler_output=packed), method), **known)
        dense = [self.dense_tokens(size, grid) for size, grid in zip(image_sizes, grids, strict=True)]
        images: Any = ImageFeatures(dense=dense, grids=grids, **known)
        made = self._encode_tiles(method, pictures, images.sizes, kwargs)
        if isinstance(made[0], VisionFeatures):
            return self.reduced(
                method, replace(images, vision=made, pooler_output=[x.projected.flatten(0, 1) for x in made])
            )
        tokens = [self.pack(tiles, grid) for tiles, grid in zip(made, grids, strict=True)]
        return replace(images, tokens=tokens, pooler_output=[x.features[0] for x in tokens])

    def _encode_tiles(self, method: Any, pictures: list[Tensor], sizes: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        """What its method makes of the tiles of each picture, or has yet to choose from; an item for each tile."""
        same: dict[Any, list[int]] = {}
        for i, size in enumerate(sizes):
            same.setdefault(self.method_for(method, size).encoder, []).append(i)
        made: dict[int, Any] = {}
        for encoder, group in same.items():
            pixels = torch.cat([pictures[i] for i in group])
            if isinstance(self.vision_tower, SparseCLIPVisionModel):
                outputs = self.vision_tower(pixels, sparsifier=encoder, return_dict=True, **kwargs)
                projected = self.multi_modal_projector(outputs.last_hidden_state)
                found, name = (outputs.vision, "projected") if outputs.tokens is None else (outputs.tokens, "features")
                found = replace(found.to(projected.device), **{name: projected})
            else:
                projected = self.projected_features(pixels, **kwargs)
                found = VisionFeatures(projected, (self.side, self.side), projected=projected)
            made |= zip(group, found.split([len(pictures[i]) for i in group]), strict=True)
        return [made[i] for i in range(len(pictures))]

    def pack(self, tiles: VisualTokens, grid: tuple[int, int]) -> VisualTokens:
        order = raster_order(tiles.patch_index, grid, self.side)
        whole = VisualTokens.joined(tiles.split())
        sizes = whole.token_sizes
        return replace(
            whole,
            features=whole.features[:, order],
            patch_index=whole.patch_index[:, order],
            token_sizes=None if sizes is None else sizes[:, order],
        )


class SparseLlavaNextForConditionalGeneration(
    PrunedGenerationMixin, PrunedHeadMixin, LlavaNextForConditionalGeneration
):
    """LLaVA-NeXT, pruned: the class that users load.

    Modifications: as of `SparseLlavaForConditionalGeneration`, around a `SparseLlavaNextModel`.
    """

    config_class = SparseLlavaNextConfig
    config: SparseLlavaNextConfig
    forward = SparseLlavaForConditionalGeneration.forward

    def __init__(self, config: SparseLlavaNextConfig) -> None:
        # Skips LlavaNextForConditionalGeneration.__init__, which would build the stock model first.
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = SparseLlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
