"""Turning a loaded dense LLaVA into a pruned one, in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .modeling.configuration_sparse_llava import SparseLlavaConfig
from .modeling.modeling_sparse_llava import SparseLlavaForConditionalGeneration

_LOADED_STATE = (
    "hf_device_map",
    "hf_quantizer",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_method",
    "_hf_peft_config_loaded",
)


def sparsify(
    model: LlavaForConditionalGeneration,
    method: str | None,
    budget: int | None = None,
    *,
    layers: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    options: dict[str, Any] | None = None,
) -> SparseLlavaForConditionalGeneration:
    """A pruned model that shares all weights with a dense one; the dense one stays as it is.

    Args:
        model: a loaded LLaVA, whatever its dtype, device map or quantisation.
        method, budget, layers, budgets, options: as the configuration's `sparse_*` fields.

    Raises:
        TypeError: if `model` is no `LlavaForConditionalGeneration`.
        ValueError: for an invalid setting.
    """
    if not isinstance(model, LlavaForConditionalGeneration):
        raise TypeError(f"sparsify takes a LlavaForConditionalGeneration, not a {type(model).__name__}.")
    config = _sparse_config(model.config)
    with torch.device("meta"):
        sparse = SparseLlavaForConditionalGeneration(config)
    _share(model, sparse, inner=("model",))
    _share(model.model, sparse.model, inner=("vision_tower", "language_model"))
    for name in ("vision_tower", "language_model"):
        theirs, part = getattr(model.model, name), getattr(sparse.model, name)
        if type(theirs) is type(part):
            setattr(sparse.model, name, theirs)
            continue
        _share(theirs, part, inner=())
        part.config = theirs.config
        part.watch_layers()
        # The layers are shared, so the hooks that record their outputs must be too: installed twice, they record twice.
        maybe_install_capturing_hooks(theirs)
        part._output_capturing_hooks_installed = True
    sparse.generation_config = copy.deepcopy(model.generation_config)
    for name in _LOADED_STATE:
        if hasattr(model, name):
            setattr(sparse, name, getattr(model, name))
    sparse.set_sparsity(method, budget, layers=layers, budgets=budgets, options=options)
    return sparse


def _sparse_config(dense: Any) -> SparseLlavaConfig:
    """The dense configuration as a sparse one around the same sub-configurations."""
    values = {k: v for k, v in dense.to_dict().items() if k not in ("model_type", "architectures")}
    values = {k: v for k, v in values.items() if not k.startswith("sparse_")}
    values |= {"text_config": dense.text_config, "vision_config": dense.vision_config, "dtype": dense.dtype}
    config = SparseLlavaConfig(**values)
    config._attn_implementation = dense._attn_implementation
    config.name_or_path = dense.name_or_path
    return config


def _share(dense: nn.Module, sparse: nn.Module, inner: tuple[str, ...]) -> None:
    """Gives `sparse` the children of `dense`, except `inner`, and what loading has left on it."""
    for name, child in dense.named_children():
        if name not in inner:
            setattr(sparse, name, child)
    for name, parameter in dense.named_parameters(recurse=False):
        setattr(sparse, name, parameter)
    for name, buffer in dense.named_buffers(recurse=False):
        setattr(sparse, name, buffer)
    sparse.training = dense.training
    if "_hf_hook" in dense.__dict__:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(sparse, dense._hf_hook)
