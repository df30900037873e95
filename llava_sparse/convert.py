"""Turning a loaded dense LLaVA into a pruned one, in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaModel

from .modeling.configuration_sparse_llava import SparseLlavaConfig
from .modeling.modeling_sparse_clip import SparseCLIPVisionModel
from .modeling.modeling_sparse_llava import SparseLlavaForConditionalGeneration, SparseLlavaModel
from .modeling.modeling_sparse_text import SPARSE_DECODERS

SPARSE: dict[str, Any] = {
    "LlavaForConditionalGeneration": SparseLlavaForConditionalGeneration,
    "LlavaModel": SparseLlavaModel,
    "CLIPVisionModel": SparseCLIPVisionModel,
    **{kind.__name__.removeprefix("Sparse"): kind for kind in SPARSE_DECODERS.values()},
}
# What accelerate leaves on a module that it has hooked.
HOOKED = ("forward", "_old_forward", "_hf_hook")


def sparsify(
    model: LlavaForConditionalGeneration,
    method: str | None,
    budget: float | None = None,
    *,
    layers: Sequence[Any] | None = None,
    budgets: Sequence[Any] | None = None,
    options: dict[str, Any] | None = None,
) -> SparseLlavaForConditionalGeneration:
    """A pruned model on the weights of a dense one, which stays as it is.

    Shared is the memory of all weights: training or editing them in place changes both models. All else is the pruned
    model's own: configuration, adapters, hooks, dtype and device (a model that is moved or cast has weights of its own
    then), embeddings that are resized.

    Args:
        model: a loaded LLaVA, whatever its dtype, device map, adapters or quantisation.
        method, budget, layers, budgets, options: as the configuration's `sparse_*` fields.

    Returns:
        the pruned model.

    Raises:
        TypeError: if `model` is no `LlavaForConditionalGeneration`.
        ValueError: for an invalid setting.
    """
    if not isinstance(model, LlavaForConditionalGeneration):
        raise TypeError(
            f"sparsify takes a LlavaForConditionalGeneration (LLaVA-1.5), not a {type(model).__name__}: no other "
            "family is supported yet."
        )
    config = _sparse_config(model.config)
    _prepare_classes(config.text_config.model_type, config.vision_config.model_type)
    configs = {id(model.config): config}
    for name in ("text_config", "vision_config"):
        configs[id(getattr(model.config, name))] = getattr(config, name)
    sparse: SparseLlavaForConditionalGeneration = _twin(model, configs, {})
    sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.set_sparsity(method, budget, layers=layers, budgets=budgets, options=options)
    return sparse


def _sparse_config(dense: Any) -> SparseLlavaConfig:
    """The dense configuration as a sparse one, with sub-configurations of its own."""
    values = {k: v for k, v in dense.to_dict().items() if k not in ("model_type", "architectures")}
    values = {k: v for k, v in values.items() if not k.startswith("sparse_")}
    values |= {name: copy.deepcopy(getattr(dense, name)) for name in ("text_config", "vision_config")}
    config = SparseLlavaConfig(**values | {"dtype": dense.dtype})
    # Of each part its own: making the whole has set one backend for all.
    config._attn_implementation_internal = dense._attn_implementation
    for name in ("text_config", "vision_config"):
        getattr(config, name)._attn_implementation_internal = getattr(dense, name)._attn_implementation
    config.name_or_path = dense.name_or_path
    return config


@lru_cache(maxsize=8)
def _prepare_classes(text: str, vision: str) -> None:
    """Makes a small model once: transformers notes of every class, when it is first made, what it can record."""
    parts = {"text_config": AutoConfig.for_model(text), "vision_config": AutoConfig.for_model(vision)}
    for part in parts.values():
        part.num_hidden_layers = 1
    with torch.device("meta"):
        SparseLlavaForConditionalGeneration(SparseLlavaConfig(**parts))


def _twin(module: nn.Module, configs: dict[int, Any], twins: dict[int, Any]) -> Any:
    """The same module once more, and all modules in it, around the same weights; of a sparse class where there is one.

    Sparse classes add methods, `sparsifier` and what `watch_layers` does to the stock ones: no weights.
    """
    if id(module) not in twins:
        kind = SPARSE.get(type(module).__name__, type(module))
        for stock in (LlavaForConditionalGeneration, LlavaModel):
            kind = SPARSE[stock.__name__] if isinstance(module, stock) else kind
        twin = twins[id(module)] = kind.__new__(kind)
        twin.__dict__.update(_state(module, configs, twins))
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, configs, twins)
        if kind in (SparseLlavaModel, SparseCLIPVisionModel):
            twin.sparsifier = None
        if hasattr(twin, "watch_layers"):
            twin.watch_layers()
        _rehook(twin, module)
    return twins[id(module)]


def _state(module: nn.Module, configs: dict[int, Any], twins: dict[int, Any]) -> dict[str, Any]:
    """The attributes of a module for another: containers copied, weights as views, no children."""
    state: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in HOOKED:
            continue
        if name in ("_parameters", "_buffers"):
            state[name] = {key: _view(tensor, twins) for key, tensor in value.items()}
        elif name == "_modules":
            state[name] = {}
        elif isinstance(value, (dict, list, set)):
            state[name] = value.copy()
        else:
            state[name] = configs.get(id(value), value)
    return state


def _view(tensor: Any, twins: dict[int, Any]) -> Any:
    """A parameter of its own on the same memory; of kinds with a state of their own, such as 4-bit, the same one."""
    if type(tensor) is not nn.Parameter:
        return tensor
    if id(tensor) not in twins:
        # Kept with the original: an id names nothing once its owner is gone.
        twins[id(tensor)] = (nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad), tensor)
    return twins[id(tensor)][0]


def _rehook(twin: Any, module: Any) -> None:
    """Lets accelerate's hook, which is bound to one module, act on its twin as well."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(twin, copy.copy(hook))
