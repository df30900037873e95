"""LLaVA-NeXT-Video's processor, writing as many placeholders as visual tokens enter the decoder."""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextVideoProcessor

from .processing_sparse_llava_next import TilesProcessorMixin


class SparseLlavaNextVideoProcessor(TilesProcessorMixin, LlavaNextVideoProcessor):
    """`LlavaNextVideoProcessor` for a pruned model; see `TilesProcessorMixin`."""

    def replace_video_token(self, video_inputs: dict | None = None, video_idx: int = 0, **kwargs: Any) -> str:
        dense = super().replace_video_token(video_inputs, video_idx, **kwargs)
        tokens = self.entering(len(dense) // len(self.video_token), at_most=True)
        return dense if tokens is None else self.video_token * tokens
