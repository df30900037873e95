"""llava_sparse inside other programs; nothing of theirs is imported before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Task files of lmms-eval, for its `--include_path`.
TASKS = Path(__file__).parent / "lmms_tasks"
# Families whose pictures vLLM lets us encode; of the others positions or packing are its own.
SERVED = ("llava", "llava_next")


def not_served(family: str) -> str:
    """What to tell about a family that vLLM does not serve pruned."""
    return (
        f"sparse_method: a pruned model of the family {family!r} is not served by vLLM; supported: "
        f"{', '.join(SERVED)}. `llava-sparse serve` serves all families."
    )


def register_vllm() -> None:
    """Makes pruned models known to vLLM, which calls this in each process: an entry point `vllm.general_plugins`.

    Folders of pruned models are served, and stock checkpoints with
    `--hf-overrides '{"sparse_method": "visionzip", "sparse_budget": 64}'`. Calling it again changes nothing.
    """
    from vllm import ModelRegistry

    from llava_sparse.families import FAMILIES

    for family in FAMILIES.values():
        own = f"Sparse{family.prefix}ForConditionalGeneration"
        used = own if family.model_type in SERVED else "SparseLlavaForConditionalGeneration"
        if own not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(own, f"llava_sparse.integrations.vllm:{used}")
        if not family.published_type:
            family.stock("Config").sparse_method = property(_method, _choose(family.model_type, own))


def lmms_eval_model() -> Any:
    """The model `llava_sparse` of lmms-eval, which calls this: an entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_sparse", simple_class_path="llava_sparse.integrations.lmms_eval.LlavaSparse")


def _method(config: Any) -> str | None:
    method: str | None = config.__dict__.get("_sparse_method")
    return method


def _choose(family: str, architecture: str) -> Any:
    """What it means that `--hf-overrides` sets a method on the finished configuration of a stock checkpoint."""

    def choose(config: Any, method: str | None) -> None:
        if method is None:
            return
        if family not in SERVED:
            raise ValueError(not_served(family))
        config.architectures = [architecture]
        config.__dict__["_sparse_method"] = method

    return choose
