"""LLaVA-NeXT's processor, writing as many image placeholders as visual tokens enter the decoder."""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution

from .processing_sparse_llava import SparseProcessorMixin

PACKINGS = ("unpadded", "tiles")


class TilesProcessorMixin(SparseProcessorMixin):
    """Modifications of a stock processor for pictures in tiles, in a pruned model.

    How many tokens a picture has depends on its tiles, so without the package it writes as many as the dense model has,
    of which the pruned one drops what it does not need.
    """

    image_processor: Any
    patch_size: int

    def check_settings(self) -> None:
        height, width = self._tile
        largest = max((h // height) * (w // width) for h, w in self.image_processor.image_grid_pinpoints)
        self.entering(self._patches, tiles=1 + largest)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        dense = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        return self.image_token * self._tokens(
            image_inputs["image_sizes"][image_idx], len(dense) // len(self.image_token)
        )

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)  # type: ignore[misc]
        if image_sizes is not None:
            counts = zip(image_sizes, data.num_image_tokens, strict=True)
            data.num_image_tokens = [self._tokens(size, dense) for size, dense in counts]
        return data

    @property
    def _tile(self) -> tuple[int, int]:
        size = self.image_processor.crop_size
        return size["height"], size["width"]

    @property
    def _patches(self) -> int:
        height, width = self._tile
        return (height // self.patch_size) * (width // self.patch_size)

    def _tokens(self, image_size: Any, dense: int) -> int:
        """Placeholders of a picture of `(height, width)` that has so many tokens in the dense model."""
        height, width = self._tile
        rows, columns = select_best_resolution(list(map(int, image_size)), self.image_processor.image_grid_pinpoints)
        tokens = self.entering(self._patches, tiles=1 + (rows // height) * (columns // width), packed=dense)
        return dense if tokens is None else tokens


class SparseLlavaNextProcessor(TilesProcessorMixin, LlavaNextProcessor):
    """`LlavaNextProcessor` for a pruned model.

    Args:
        image_processor, ..., sparse_options: see `TilesProcessorMixin`.
        image_packing: "unpadded" or "tiles", as in the model's configuration.
    """

    def __init__(self, *, image_packing: str = "unpadded", **kwargs: Any) -> None:
        if image_packing not in PACKINGS:
            raise ValueError(f"`image_packing` must be one of {', '.join(PACKINGS)}, got {image_packing!r}.")
        self.image_packing = image_packing
        super().__init__(**kwargs)

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        if self.image_packing != "tiles":
            return super()._get_number_of_features(orig_height, orig_width, height, width)
        rows, columns = select_best_resolution([orig_height, orig_width], self.image_processor.image_grid_pinpoints)
        tiles = 1 + (rows // height) * (columns // width)
        patches = (height // self.patch_size) * (width // self.patch_size)
        # The caller takes one off for the strategy "default".
        full = self.vision_feature_select_strategy != "default"
        return tiles * patches + self.num_additional_image_tokens * (tiles if full else 1)
