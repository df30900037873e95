"""Processors; with the package they check settings as the models' configurations do."""

from typing import Any

from llava_sparse.modeling.pruning_registry import entering
from llava_sparse.modeling.pruning_settings import Sparsity

from . import processing_sparse_llava as _own
from .processing_sparse_llava import SparseLlavaProcessor, question_ids
from .processing_sparse_llava_next import SparseLlavaNextProcessor
from .processing_sparse_llava_next_video import SparseLlavaNextVideoProcessor
from .processing_sparse_llava_onevision import SparseLlavaOnevisionProcessor
from .processing_sparse_mini_gemini import SparseMiniGeminiProcessor
from .processing_sparse_qwen_vl import SparseQwen2_5_VLProcessor, SparseQwen2VLProcessor, SparseQwen3VLProcessor
from .processing_sparse_video_llava import SparseVideoLlavaProcessor

__all__ = [
    "SparseLlavaNextProcessor",
    "SparseLlavaNextVideoProcessor",
    "SparseLlavaOnevisionProcessor",
    "SparseLlavaProcessor",
    "SparseMiniGeminiProcessor",
    "SparseQwen2VLProcessor",
    "SparseQwen2_5_VLProcessor",
    "SparseQwen3VLProcessor",
    "SparseVideoLlavaProcessor",
    "question_ids",
]


def _count(settings: dict[str, Any], patches: int, **sizes: Any) -> int | None:
    return entering(Sparsity.read(settings), patches, **sizes)


_own.count_tokens = _count
