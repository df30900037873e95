"""Configuration of Qwen2.5-VL with the five `sparse_*` fields."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig

from .configuration_sparse_llava import DynamicFieldsMixin


class SparseQwen2_5_VLConfig(DynamicFieldsMixin, Qwen2_5_VLConfig):
    """`Qwen2_5_VLConfig` with the `sparse_*` fields; see `DynamicFieldsMixin`."""

    model_type = "sparse_qwen2_5_vl"

    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None
