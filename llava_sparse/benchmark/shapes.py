"""Models of a published shape with random weights, made on the device: what they cost does not need what they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import llava_sparse
from llava_sparse.evaluation.model import load_model, resolve_device, resolve_dtype
from llava_sparse.evaluation.plan import DENSE
from llava_sparse.families import FAMILIES
from llava_sparse.modeling.pruning_settings import nearest
from llava_sparse.published import MODELS, SMALL

# Of each shape what `config.json` has. LLaVA-NeXT's pictures are as papers' tables count them: 2,880 tokens each.
_TABLES = {"image_packing": "tiles", "image_grid_pinpoints": [[672, 672]]}
# What of Mini-Gemini finds features for the tower's tokens.
MINING = tuple(f"vlm_uni_{part}_projector" for part in ("query", "aux", "val"))
SHAPES: dict[str, dict[str, Any]] = {
    name: of.config | (_TABLES if of.family.model_type == "llava_next" else {}) for name, of in (MODELS | SMALL).items()
}


def shape_config(shape: str) -> dict[str, Any]:
    """The configuration of a shape.

    Raises:
        ValueError: for a name that is none of `SHAPES`.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r}{nearest(shape, list(SHAPES))}: allowed: {', '.join(SHAPES)}.")
    return SHAPES[shape]


def build_model(shape: str | dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Any:
    """A dense model with random weights: transformers' own class, where its configuration has all that is set.

    Args:
        shape: one of `SHAPES`, or a configuration as `config.json` has it, of a sparse class.

    Raises:
        ValueError: for another name.
    """
    config = shape_config(shape) if isinstance(shape, str) else shape
    known = {name: value for name, value in config.items() if name not in ("architectures", "dtype", "model_type")}
    family = FAMILIES[config["model_type"].removeprefix("sparse_")]
    kind = family.sparse if "image_packing" in config else family.stock
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            torch.manual_seed(0)
            model = kind("ForConditionalGeneration")(kind("Config")(**known))
    finally:
        torch.set_default_dtype(before)
    # Nothing ends an answer: all runs say as much as they are asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def open_model(model: Any, shape: str | None, dtype: str = "auto", device: str = "auto", **memory: Any) -> Any:
    """A dense model: a loaded one, without its method if it has one; by Hub id or folder; or of a shape.

    None for both is the reference model; `memory` is what `load_model` takes beside dtype and device.

    Raises:
        ValueError: for a model and a shape, an unknown shape, dtype or device, or what is of no supported family.
        OSError: if it cannot be read.
    """
    if shape is not None and model is not None:
        raise ValueError("model, shape: one of them is allowed.")
    if shape is not None:
        if any(memory.values()):
            raise ValueError(f"shape: random weights are not quantised or spread; {', '.join(memory)} go with a model.")
        chosen = resolve_device(device)
        kind = resolve_dtype(dtype, chosen)
        return build_model(shape, kind if isinstance(kind, torch.dtype) else torch.bfloat16, chosen)
    if model is None or isinstance(model, str | Path):
        return load_model(model, dtype, device, **memory).with_method(DENSE)
    return llava_sparse.sparsify(model, None) if getattr(model.config, "sparse_method", None) else model


def parts_of(model: Any) -> dict[str, list[nn.Module]]:
    """The modules that a prompt of `make_inputs` goes through, by stage; a Qwen-VL's tower has its projector in it."""
    names = {
        # Of Video-LLaVA, the tower that a video goes through.
        "vision tower": ("aux_tower", "vision_tower", "video_tower", "visual", *MINING),
        "projector": ("multi_modal_projector",),
        "decoder": ("language_model",),
    }
    inner = model.model
    return {stage: [getattr(inner, name) for name in own if hasattr(inner, name)] for stage, own in names.items()}
