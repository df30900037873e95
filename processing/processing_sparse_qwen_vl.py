"""The processors of the Qwen-VL kinds, which check the settings of a pruned model."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor

from .processing_sparse_llava import SparseProcessorMixin

# The visual tokens that the published processor allows a picture at most.
MOST = 16384


class DynamicProcessorMixin(SparseProcessorMixin):
    """Modifications of a stock processor for pictures of any size: see `SparseProcessorMixin`.

    It checks and saves the settings, and writes as many placeholders as the dense model has tokens: positions are those
    of the whole picture, and the model drops what it does not need.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check_settings()

    def check_settings(self) -> None:
        self.entering(MOST, at_most=True, dynamic=True, has_cls=False)


class SparseQwen2VLProcessor(DynamicProcessorMixin, Qwen2VLProcessor):
    """`Qwen2VLProcessor` for a pruned model; see `DynamicProcessorMixin`."""


class SparseQwen2_5_VLProcessor(DynamicProcessorMixin, Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` for a pruned model; see `DynamicProcessorMixin`."""


class SparseQwen3VLProcessor(DynamicProcessorMixin, Qwen3VLProcessor):
    """`Qwen3VLProcessor` for a pruned model; see `DynamicProcessorMixin`."""
