"""LLaVA-NeXT-Video's processor, writing as many placeholders as visual tokens enter the decoder."""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextVideoProcessor

from .processing_sparse_llava_next import TilesProcessorMixin


class SparseLlavaNextVideoProcessor(TilesProcessorMixin, LlavaNextVideoProcessor):
    """`LlavaNextVideoProcessor` for a pruned model; see `TilesProcessorMixin`."""

    def __init__(
        self,
        video_processor: Any = None,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        video_token: str = "<video>",
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        sparse_method: str | None = None,
        sparse_budget: Any = None,
        sparse_layers: Any = None,
        sparse_budgets: Any = None,
        sparse_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            sparse_method=sparse_method,
            sparse_budget=sparse_budget,
            sparse_layers=sparse_layers,
            sparse_budgets=sparse_budgets,
            sparse_options=sparse_options,
            video_processor=video_processor,
            video_token=video_token,
            **kwargs,
        )

    def __call__(  # type: ignore[override]
        self, images: Any = None, text: Any = None, videos: Any = None, question: Any = None, **kwargs: Any
    ) -> Any:
        """Arguments as of `LlavaNextVideoProcessor`, and those of `SparseProcessorMixin`."""
        return super().__call__(images, text, question, videos=videos, **kwargs)

    def replace_video_token(self, video_inputs: dict | None = None, video_idx: int = 0, **kwargs: Any) -> str:
        dense = super().replace_video_token(video_inputs, video_idx, **kwargs)
        tokens = self.entering(len(dense) // len(self.video_token), at_most=True)
        return dense if tokens is None else self.video_token * tokens
