"""LLaVA-OneVision's processor, writing as many placeholders as visual tokens enter the decoder."""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution

from .processing_sparse_llava import SparseProcessorMixin


class SparseLlavaOnevisionProcessor(SparseProcessorMixin, LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` for a pruned model; see `SparseProcessorMixin`.

    How many tokens a picture or a video has depends on its size, so without the package it writes as many as the dense
    model has, of which the pruned one drops what it does not need.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.num_image_tokens:
            self.entering(self.num_image_tokens, tiles=1 + int(self.vision_aspect_ratio.removeprefix("anyres_max_")))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        dense = super().replace_image_token(image_inputs, image_idx, **kwargs)
        together = [int(count) for count in image_inputs["batch_num_images"] for _ in range(int(count))]
        tiles = 1
        if together[image_idx] == 1:
            height, width = image_inputs["pixel_values"][0][0].shape[-2:]
            size = list(map(int, image_inputs["image_sizes"][image_idx]))
            rows, columns = select_best_resolution(size, self.image_processor.image_grid_pinpoints)
            tiles += (rows // height) * (columns // width)
        packed = len(dense) // len(self.image_token)
        tokens = self.entering(self.num_image_tokens, tiles=tiles, packed=packed)
        return dense if tokens is None else self.image_token * tokens

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        dense = super().replace_video_token(video_inputs, video_idx, **kwargs)
        tokens = self.entering(len(dense) // len(self.video_token), at_most=True)
        return dense if tokens is None else self.video_token * tokens
