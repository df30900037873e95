"""Video-LLaVA's processor, writing as many placeholders as visual tokens enter the decoder."""

from __future__ import annotations

from typing import Any

from transformers import VideoLlavaProcessor

from .processing_sparse_llava import FIELDS, SparseProcessorMixin

# As the configuration has them.
FRAMES = 8
PUBLISHED_BUDGET = 194


class SparseVideoLlavaProcessor(SparseProcessorMixin, VideoLlavaProcessor):
    """`VideoLlavaProcessor` for a pruned model; see `SparseProcessorMixin`, and `SparseVideoLlavaConfig` for budgets.

    How many tokens a video has depends on its frames, so without the package it writes as many as the dense model has,
    of which the pruned one drops what it does not need. Pixels of images are `pixel_values`, whatever the release.
    """

    def check_settings(self) -> None:
        size = self.image_processor.crop_size
        self._tokens(size["height"], size["width"], frames=FRAMES, at_most=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments as of `VideoLlavaProcessor`, and those of `SparseProcessorMixin`."""
        outputs = super().__call__(*args, **kwargs)
        if "pixel_values_images" in outputs:
            outputs["pixel_values"] = outputs.pop("pixel_values_images")
        return outputs

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        dense = super().replace_image_token(image_inputs, image_idx, **kwargs)
        pixels = image_inputs.get("pixel_values_images", image_inputs.get("pixel_values"))
        tokens = self._tokens(*pixels[image_idx].shape[-2:])  # type: ignore[index]
        return dense if tokens is None else self.image_token * tokens

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        dense = super().replace_video_token(video_inputs, video_idx, **kwargs)
        frames = video_inputs["pixel_values_videos"][video_idx]
        tokens = self._tokens(*frames[0].shape[-2:], frames=len(frames))
        return dense if tokens is None else self.video_token * tokens

    def _tokens(self, height: int, width: int, at_most: bool = True, **sizes: Any) -> int | None:
        """Placeholders of an image, or of a video's frames, of so many pixels; None for those of the dense model."""
        alone = all(getattr(self, name) is None for name in FIELDS[2:])
        if self.sparse_method == "sparsevlm" and alone and self.sparse_budget in (None, PUBLISHED_BUDGET):
            return None
        return self.entering((height // self.patch_size) * (width // self.patch_size), at_most=at_most, **sizes)
