"""Mini-Gemini's processor: a picture in two sizes, and as many placeholders as visual tokens enter the decoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from .processing_sparse_llava import SparseProcessorMixin

DEFAULTS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


class SparseMiniGeminiProcessor(SparseProcessorMixin, LlavaProcessor):
    """Makes of every picture what both towers see; see `SparseProcessorMixin` for the `sparse_*` settings.

    The picture becomes a square, padded with the mean colour, of `image_size_aux` pixels: `pixel_values_aux`. The CLIP
    tower gets that shrunk to the image processor's `crop_size`, or, with a grid, in tiles of that size, by rows, with
    the whole picture as the last: `pixel_values`.

    Args:
        image_processor: whose mean, deviation and `crop_size` count; tokenizer, patch_size, chat_template, image_token:
            as of `LlavaProcessor`.
        image_size_aux, image_grid, image_global: as of `SparseMiniGeminiConfig`.
    """

    def __init__(
        self,
        *,
        sparse_tokens: int | None = None,
        image_size_aux: int = 768,
        image_grid: int = 1,
        image_global: bool = False,
        **kwargs: Any,
    ) -> None:
        self.image_size_aux, self.image_grid, self.image_global = image_size_aux, image_grid, image_global
        self.sparse_tokens = sparse_tokens
        for name, value in DEFAULTS.items():
            kwargs.setdefault(name, value)
        super().__init__(**kwargs)

    def check_settings(self) -> None:
        self.sparse_tokens = self.entering(self._patches, tiles=self._tiles)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self._tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if image_sizes is not None:
            data.num_image_tokens = [self._tokens] * len(image_sizes)
        return data

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        side, grid = self.image_size_aux, self.image_grid
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "return_tensors": "pt"}
        squares = [self._square(image) for image in make_flat_list_of_images(images)]
        processed, written = super()._process_images(squares, **{**kwargs, **size})
        high = processed["pixel_values"]
        crop = self.image_processor.crop_size
        height, width = crop["height"], crop["width"]
        low = resized(high, height * grid, width * grid)
        if grid > 1:
            tiles = low.unflatten(3, (grid, width)).unflatten(2, (grid, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
            whole = [resized(low, height, width)[:, None]] if self.image_global else []
            low = torch.cat([tiles, *whole], dim=1)
        return {**processed, "pixel_values": low, "pixel_values_aux": high}, written

    def _square(self, image: Any) -> Any:
        """A picture in the middle of a square of the mean colour."""
        picture = to_pil_image(image).convert("RGB")
        side = max(picture.size)
        square = picture.resize((side, side))
        square.paste(tuple(int(mean * 255) for mean in self.image_processor.image_mean), (0, 0, side, side))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square

    @property
    def _tokens(self) -> int:
        """Placeholders of a picture."""
        tokens = self.entering(self._patches, tiles=self._tiles)
        return self._patches * self._tiles if tokens is None else tokens

    @property
    def _patches(self) -> int:
        size = self.image_processor.crop_size
        return (size["height"] // self.patch_size) * (size["width"] // self.patch_size)

    @property
    def _tiles(self) -> int:
        return self.image_grid**2 + self.image_global


def resized(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(images, 3, ...)` pixels, bilinear."""
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
