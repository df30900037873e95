"""Configuration of Qwen3-VL with the five `sparse_*` fields."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLConfig

from .configuration_sparse_llava import DynamicFieldsMixin


class SparseQwen3VLConfig(DynamicFieldsMixin, Qwen3VLConfig):
    """`Qwen3VLConfig` with the `sparse_*` fields; see `DynamicFieldsMixin`."""

    model_type = "sparse_qwen3_vl"

    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None
