"""Pictures in tiles: a whole one and a grid of its parts, reduced tile by tile or as the decoder sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from .modeling_sparse_clip import ProjectedFeaturesMixin
from .pruning_items import ImageFeatures, tokens_of
from .pruning_model import PrunedModelMixin
from .pruning_ops import image_fingerprints
from .pruning_types import VisionFeatures, VisualTokens

# Arguments that say something of pictures alone.
OF_PICTURES = ("image_sizes", "image_sizes_videos", "vision_aspect_ratio", "batch_num_images")


def raster_order(index: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The order in which the tokens of a picture's tiles, taken tile by tile, enter the decoder, as published.

    Those of the whole picture as they are; then the patches of the other tiles in raster order over the picture, then
    what stands for none (CLS) and what was made anew, tile by tile.

    Args:
        index: `(tiles, k)` int64, see `VisualTokens.places`, the first tile being of the whole picture; grid: rows
            and columns of the others; side: patches along the side of a tile.

    Returns:
        `(tiles * k,)` int64.
    """
    (tiles, count), patches = index.shape, side * side
    tile = torch.arange(tiles, device=index.device)[:, None]
    row, column = (tile - 1).div(max(1, grid[1]), rounding_mode="floor"), (tile - 1) % max(1, grid[1])
    raster = (row * side + index // side) * grid[1] * side + column * side + index % side
    behind = (tiles - 1) * patches
    made = behind + tiles + tile * count + index - patches
    key = torch.where(index < 0, behind + tile, torch.where(index < patches, raster, made))
    first = torch.arange(count, device=index.device) - count
    return torch.where(tile == 0, first, key).flatten().argsort(stable=True)


class TilesMixin(ProjectedFeaturesMixin, PrunedModelMixin):
    """Modifications of a stock model without head whose pictures are cut into tiles.

    A method with unit "tile" reduces each tile by itself, padding included; its tokens stand in `raster_order`, with
    neither newlines nor unpadding. Others choose from what the decoder of the dense model is given, newlines among it.
    A family says how many tokens that is (`dense_tokens`), and how it is made (`pack_dense`); one that takes videos,
    what the decoder is given of these (`video_features`), from which methods behind the projector choose at once.
    """

    @property
    def side(self) -> int:
        """Patches along the side of a tile."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def newline(self) -> Tensor:
        """The vector behind a row, `(channels,)`; where weights are offloaded, they come in for `forward` alone."""
        here: Tensor = self.image_newline  # type: ignore[attr-defined]
        if not here.is_meta:
            return here
        hook: Any = self._hf_hook  # type: ignore[attr-defined]
        aligning = next(one for one in (hook, *getattr(hook, "hooks", ())) if getattr(one, "weights_map", None))
        kept: Tensor = aligning.weights_map["image_newline"]
        return kept

    def sizes_of(self, size: Any) -> dict[str, Any]:
        if isinstance(size, int):  # Packed by the caller.
            return {"patches": size, "tiles": 1}
        return {"tiles": 1 + size[1][0] * size[1][1], "packed": tokens_of(size)}

    def grid_of(self, patches: int) -> tuple[int, int]:
        """Packed tokens are no grid: rows end in newlines, and the first tile is the whole picture."""
        return (1, patches)

    def tile_grids(self, image_sizes: Any, batch_num_images: Any = None) -> list[tuple[int, int]]:
        """Rows and columns of the tiles, besides the first, of pictures of `(height, width)`.

        Args:
            batch_num_images: pictures of each prompt, of a family that cuts a prompt's only picture alone.
        """
        pinpoints, size = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        grids = [get_anyres_image_grid_shape(list(map(int, image)), pinpoints, size) for image in image_sizes]
        if batch_num_images is None:
            return grids
        together = [int(count) for count in batch_num_images for _ in range(int(count))]
        return [grid if count == 1 else (0, 0) for grid, count in zip(grids, together, strict=True)]

    def dense_tokens(self, image_size: Any, grid: tuple[int, int]) -> int:
        """Tokens of a picture of `(height, width)` in the dense model: without padding, a newline behind every row."""
        rows, columns = self.unpadded(image_size, grid)
        return self.side**2 + (self.config.vision_feature_select_strategy == "full") + rows * (columns + 1)

    def unpadded(self, image_size: Any, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches that are not padding, of the tiles behind the first."""
        whole = torch.empty(1, grid[0] * self.side, grid[1] * self.side, device="meta")
        _, rows, columns = unpad_image(whole, list(map(int, image_size))).shape
        return rows, columns

    def pack_dense(self, tiles: Sequence[Tensor], image_sizes: Any, given: dict[str, Any]) -> list[Tensor]:
        """What the dense model makes of the projected tiles of each picture; `given` are arguments of the call."""
        raise NotImplementedError

    def video_features(self, pixel_values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        """What the dense model makes of `(videos, frames, 3, height, width)`; `given` are arguments of the call."""
        raise NotImplementedError

    def encode_images(
        self,
        method: Any,
        pixel_values: Tensor,
        image_sizes: Any = None,
        question_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageFeatures:
        encoder = None if method is None else method.encoder
        if image_sizes is None:
            raise ValueError("pixel_values need image_sizes, (pictures, 2), the height and width of each.")
        kwargs.pop("image_sizes_videos", None)
        grids = self.tile_grids(image_sizes, kwargs.pop("batch_num_images", None))
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
            aspect = {"vision_aspect_ratio": kwargs.pop("vision_aspect_ratio", None)}
            features = self.projected_features(torch.cat(pictures), **kwargs).split(tiles)
            packed = self.pack_dense(features, image_sizes, kwargs | aspect)
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

    def encode_videos(
        self, method: Any, pixel_values: Tensor, question_ids: Tensor | None = None, **kwargs: Any
    ) -> ImageFeatures:
        """As `encode_images`, of `(videos, frames, 3, height, width)`, or a list of `(frames, 3, height, width)`.

        Raises:
            ValueError: for a method inside the tower, which sees the frames before they are pooled.
        """
        if not torch.is_tensor(pixel_values):
            videos = [self.encode_videos(method, video[None], question_ids, **kwargs) for video in pixel_values]
            return ImageFeatures.joined(videos)
        given = {name: value for name, value in kwargs.items() if name not in OF_PICTURES}
        encoder = None if method is None else method.encoder
        if encoder is not None:
            self.refuse_features(encoder, given)
            if encoder.place != "projector":
                raise ValueError(
                    f"{encoder.name} works in the vision tower, and this model pools the frames of a video behind it; "
                    "methods behind the projector (divprune) and in the decoder (sparsevlm) take videos."
                )
        features = self.video_features(pixel_values, given)
        images: Any = ImageFeatures(
            dense=[len(x) for x in features],
            fingerprints=image_fingerprints(pixel_values) if method is not None and method.draws else None,
            question_ids=question_ids,
            snapshot=(method,),
        )
        images.pooler_output = features
        if encoder is None:
            return images
        vision = [VisionFeatures(x[None], (1, len(x)), projected=x[None]) for x in features]
        return self.reduced(method, replace(images, vision=vision))

    def _encode_tiles(self, method: Any, pictures: list[Tensor], sizes: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        """What its method makes of the tiles of each picture, or has yet to choose from; an item for each tile."""
        same: dict[Any, list[int]] = {}
        for i, size in enumerate(sizes):
            same.setdefault(self.method_for(method, size).encoder, []).append(i)
        made: dict[int, Any] = {}
        for encoder, group in same.items():
            pixels = torch.cat([pictures[i] for i in group])
            if self.reduces_inside(encoder):
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
        order = raster_order(tiles.places, grid, self.side)
        whole = VisualTokens.joined(tiles.split())
        sizes = whole.token_sizes
        return replace(
            whole,
            features=whole.features[:, order],
            patch_index=whole.patch_index[:, order],
            token_sizes=None if sizes is None else sizes[:, order],
        )
