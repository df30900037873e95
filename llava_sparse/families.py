"""The families of models that can be pruned: a line each. Every other name follows from the stock class's prefix.

For `llava_next` and `LlavaNext` that is `SparseLlavaNextConfig` of `modeling/configuration_sparse_llava_next.py`, the
models of `modeling/modeling_sparse_llava_next.py`, and `SparseLlavaNextProcessor` of
`processing/processing_sparse_llava_next.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import transformers


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: of the stock configuration; prefix: of the stock classes; title: what people call it.
        published_type: of a family that is not in transformers, the `model_type` of published configurations. Its own
            class without a method is its stock class then.
    """

    model_type: str
    prefix: str
    title: str
    published_type: str | None = None

    @property
    def sparse_type(self) -> str:
        """The `model_type` of the sparse configuration."""
        return f"sparse_{self.model_type}"

    @property
    def names(self) -> dict[str, str]:
        """The modules of its sparse classes, by the classes' names, within this package."""
        models = f"modeling.modeling_sparse_{self.model_type}"
        return {
            f"Sparse{self.prefix}Config": f"modeling.configuration_sparse_{self.model_type}",
            f"Sparse{self.prefix}ForConditionalGeneration": models,
            f"Sparse{self.prefix}Model": models,
            f"Sparse{self.prefix}Processor": "processing",
        }

    def sparse(self, kind: str) -> Any:
        """A sparse class, imported now: of kind "Config", "ForConditionalGeneration", "Model" or "Processor"."""
        name = f"Sparse{self.prefix}{kind}"
        return getattr(import_module(f"{__package__}.{self.names[name]}"), name)

    def stock(self, kind: str) -> Any:
        """The stock class of a kind, imported now."""
        return self.sparse(kind) if self.published_type else getattr(transformers, f"{self.prefix}{kind}")


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "Llava", "LLaVA-1.5"),
        Family("llava_next", "LlavaNext", "LLaVA-NeXT"),
        Family("llava_next_video", "LlavaNextVideo", "LLaVA-NeXT-Video"),
        Family("llava_onevision", "LlavaOnevision", "LLaVA-OneVision"),
        Family("video_llava", "VideoLlava", "Video-LLaVA"),
        Family("mini_gemini", "MiniGemini", "Mini-Gemini", published_type="mgm"),
        Family("qwen2_vl", "Qwen2VL", "Qwen2-VL"),
        Family("qwen2_5_vl", "Qwen2_5_VL", "Qwen2.5-VL"),
        Family("qwen3_vl", "Qwen3VL", "Qwen3-VL"),
    )
}


def model_types() -> list[str]:
    """The `model_type` of every configuration that can be loaded, dense and sparse."""
    families = FAMILIES.values()
    kinds = [(family.model_type, family.sparse_type, family.published_type) for family in families]
    return [kind for family in kinds for kind in family if kind]


def supported() -> str:
    """The families, for messages."""
    return ", ".join(f"{family.title} (model_type {name!r})" for name, family in FAMILIES.items())
