"""Turning a loaded dense LLaVA into a pruned one, in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from .modeling.configuration_sparse_llava import SparseLlavaConfig
from .modeling.modeling_sparse_llava import SparseLlavaForConditionalGeneration

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
    with torch.device("meta"):
        sparse = SparseLlavaForConditionalGeneration(config)
    configs = {id(model.config): config}
    for name in ("text_config", "vision_config"):
        configs[id(getattr(model.config, name))] = getattr(config, name)
    _become(sparse, model, configs, {})
    sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.set_sparsity(method, budget, layers=layers, budgets=budgets, options=options)
    return sparse


def _sparse_config(dense: Any) -> SparseLlavaConfig:
    """The dense configuration as a sparse one, with sub-configurations of its own."""
    values = {k: v for k, v in dense.to_dict().items() if k not in ("model_type", "architectures")}
    values = {k: v for k, v in values.items() if not k.startswith("sparse_")}
    values |= {name: copy.deepcopy(getattr(dense, name)) for name in ("text_config", "vision_config")}
    config = SparseLlavaConfig(**values | {"dtype": dense.dtype})
    # Of each part its own: setting the whole would spread one backend over all.
    config._attn_implementation_internal = dense._attn_implementation
    config.name_or_path = dense.name_or_path
    return config


def _become(shell: Any, dense: nn.Module, configs: dict[int, Any], twins: dict[int, Any]) -> None:
    """Gives a module of a sparse class all that a stock one has: its state, and twins of what it is made of."""
    parts = dict(shell.named_children())
    own = {name: shell.__dict__[name] for name in ("sparsifier",) if name in shell.__dict__}
    shell.__dict__.update(_state(dense, configs, twins) | own)
    for name, child in dense.named_children():
        part = parts.get(name)
        if part is not None and type(part).__name__ == f"Sparse{type(child).__name__}":
            _become(part, child, configs, twins)
            shell._modules[name] = part
        else:
            shell._modules[name] = _twin(child, configs, twins)
    _rehook(shell, dense)
    if hasattr(shell, "watch_layers"):
        shell.watch_layers()


def _twin(module: nn.Module, configs: dict[int, Any], twins: dict[int, Any]) -> Any:
    """The same module once more, and all modules in it, around the same weights."""
    if id(module) not in twins:
        twin = twins[id(module)] = module.__class__.__new__(module.__class__)
        twin.__dict__.update(_state(module, configs, twins))
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, configs, twins)
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
            state[name] = copy.copy(value)
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
