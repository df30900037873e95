"""Turning a loaded dense model into a pruned one, in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .families import FAMILIES, Family, supported
from .modeling import modeling_sparse_clip, modeling_sparse_text

# What accelerate leaves on a module that it has hooked.
HOOKED = ("forward", "_old_forward", "_hf_hook")


def sparsify(
    model: PreTrainedModel,
    method: str | None,
    budget: float | None = None,
    *,
    layers: Sequence[Any] | None = None,
    budgets: Sequence[Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """A pruned model on the weights of a dense one, which stays as it is.

    Shared is the memory of all weights: training or editing them in place changes both models. All else is the pruned
    model's own: configuration, adapters, hooks, dtype and device (a model that is moved or cast has weights of its own
    then), embeddings that are resized.

    Args:
        model: a loaded model of a supported family, whatever its dtype, device map, adapters or quantisation.
        method, budget, layers, budgets, options: as the configuration's `sparse_*` fields.

    Returns:
        the pruned model, of the family's `Sparse...ForConditionalGeneration`.

    Raises:
        TypeError: if `model` is of no supported family, or has no head.
        ValueError: for an invalid setting.
    """
    kind = str(model.config.model_type) if isinstance(model, PreTrainedModel) else ""
    family = FAMILIES.get(kind.removeprefix("sparse_"))
    if family is None or not isinstance(model, family.stock("ForConditionalGeneration")):
        raise TypeError(
            f"sparsify takes a model with its head, such as LlavaForConditionalGeneration, not a "
            f"{type(model).__name__}. Supported: {supported()}."
        )
    config, configs = _sparse_config(model.config, family.sparse("Config"))
    _prepare_classes(family, tuple((name, part.model_type) for name, part in configs.items()))
    known = {id(model.config): config} | {id(getattr(model.config, name)): part for name, part in configs.items()}
    sparse = _twin(model, family, known, {})
    sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.set_sparsity(method, budget, layers=layers, budgets=budgets, options=options)
    return sparse


def _sparse_config(dense: Any, kind: Any) -> tuple[Any, dict[str, Any]]:
    """The dense configuration as a sparse one, and its sub-configurations, of its own, by name."""
    values = {k: v for k, v in dense.to_dict().items() if k not in ("model_type", "architectures")}
    values = {k: v for k, v in values.items() if not k.startswith("sparse_")}
    values |= {name: copy.deepcopy(getattr(dense, name)) for name in dense.sub_configs}
    config = kind(**values | {"dtype": dense.dtype})
    # Of each part its own: making the whole has set one backend for all.
    config._attn_implementation_internal = dense._attn_implementation
    parts = {name: getattr(config, name) for name in dense.sub_configs}
    for name, part in parts.items():
        part._attn_implementation_internal = getattr(dense, name)._attn_implementation
    config.name_or_path = dense.name_or_path
    return config, parts


@lru_cache(maxsize=8)
def _prepare_classes(family: Family, parts: tuple[tuple[str, str], ...]) -> None:
    """Makes a small model once: transformers notes of every class, when it is first made, what it can record."""
    configs = {name: AutoConfig.for_model(kind) for name, kind in parts}
    for config in configs.values():
        for layers in ("num_hidden_layers", "depth"):
            if hasattr(config, layers):
                setattr(config, layers, 1)
    with torch.device("meta"):
        family.sparse("ForConditionalGeneration")(family.sparse("Config")(**configs))


def _sparse_class(module: nn.Module, family: Family) -> Any:
    """The sparse class of a module of its stock class, or of one made from it; its own where there is none."""
    for stock in ("ForConditionalGeneration", "Model"):
        if isinstance(module, family.stock(stock)):
            return family.sparse(stock)
    models = import_module(family.sparse("Model").__module__)
    name = f"Sparse{type(module).__name__}"
    found = (getattr(parts, name, None) for parts in (models, modeling_sparse_text, modeling_sparse_clip))
    return next((kind for kind in found if kind is not None), type(module))


def _twin(module: nn.Module, family: Family, configs: dict[int, Any], twins: dict[int, Any]) -> Any:
    """The same module once more, and all modules in it, around the same weights; of a sparse class where there is one.

    Sparse classes add methods, and what `watch_layers` does, to the stock ones: no weights.
    """
    if id(module) not in twins:
        kind = _sparse_class(module, family)
        twin = twins[id(module)] = kind.__new__(kind)
        twin.__dict__.update(_state(module, configs, twins))
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, family, configs, twins)
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
