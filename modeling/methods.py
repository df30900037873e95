"""The methods by name, and how the five `sparse_*` fields become one of them."""

from __future__ import annotations

from typing import Any

from .cdpruner import CDPruner
from .checks import nearest
from .composition import JOIN, compose, part_classes
from .delegate import Delegate
from .divprune import DivPrune
from .fastv import FastV
from .grid_tokens import PooledTokens, UniformTokens
from .pyramiddrop import PyramidDrop
from .random_tokens import RandomDecoder, RandomTokens
from .scope import Scope
from .sparsevlm import SparseVLM
from .sparsifier import Geometry, Sparsifier
from .tome import ToMe
from .visionzip import VisionZip
from .vispruner import VisPruner

METHODS: dict[str, type[Sparsifier]] = {
    method.name: method
    for method in (
        CDPruner,
        Delegate,
        DivPrune,
        FastV,
        PooledTokens,
        PyramidDrop,
        RandomDecoder,
        RandomTokens,
        Scope,
        SparseVLM,
        ToMe,
        UniformTokens,
        VisionZip,
        VisPruner,
    )
}
# Those that no method of a user's can replace.
BUILT_IN = dict(METHODS)
# A model for which every method expands its default settings.
TRIAL, TRIAL_BUDGET = Geometry(patches=16, encoder_layers=6, decoder_layers=6), 4

FIELDS = ("sparse_method", "sparse_budget", "sparse_layers", "sparse_budgets", "sparse_options")


def list_methods() -> list[str]:
    """Names of all methods, sorted: the values that `sparse_method` may take."""
    return sorted(METHODS)


def method_class(name: object) -> type[Sparsifier]:
    """The class of a method.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if not isinstance(name, str) or name not in METHODS:
        allowed = ", ".join(list_methods())
        raise ValueError(
            f"sparse_method={name!r} is unknown{nearest(name, list_methods())}; allowed: {allowed}, an encoder and a "
            f"decoder method joined by {JOIN!r}, None."
        )
    return METHODS[name]


def method_classes(name: object) -> tuple[type[Sparsifier], ...]:
    """The class of a method, or the two of a composition; raises ValueError for unknown names."""
    if isinstance(name, str) and JOIN in name:
        return part_classes(name, METHODS)
    return (method_class(name),)


def resolve_fields(fields: dict[str, Any], geometry: Geometry) -> Sparsifier | None:
    """Builds the method that the five fields describe; None where `sparse_method` is None.

    Raises:
        ValueError: for settings without a method, and for all that the method itself refuses.
    """
    if fields["sparse_method"] is None:
        for name in FIELDS[1:]:
            if fields[name] is not None:
                raise ValueError(
                    f"{name}={fields[name]!r} without sparse_method: name one of {', '.join(list_methods())} too."
                )
        return None
    budget, layers, budgets, options = (fields[name] for name in FIELDS[1:])
    classes = method_classes(fields["sparse_method"])
    if len(classes) == 2:
        return compose(fields["sparse_method"], classes, geometry, fields)
    return classes[0].resolve(geometry, budget, layers, budgets, options)
