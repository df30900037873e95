"""Which methods run, with which budgets, seeds and options: the rows of a study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from llava_sparse.modeling.pruning_registry import METHODS, method_classes
from llava_sparse.modeling.pruning_settings import JOIN, nearest, option_defaults

DENSE = "dense"
# The dense model without its picture, and with the picture downsampled to as many tokens.
BLIND, SMALL = "blind", "downsampled"
UNPRUNED = (DENSE, BLIND, SMALL)
# What a method has to beat.
CONTROLS = ("random", "uniform", "pool", SMALL, BLIND)
CONTROL_SEEDS = 5
_LISTS = ("layers", "budgets")


@dataclass(frozen=True)
class Run:
    """A method with its settings.

    Attributes:
        method: a name of `llava_sparse.list_methods()`, or one of `UNPRUNED`.
        budget: visual tokens retained; None for dense and where `layers` and `budgets` say it.
        seed: None for methods that draw nothing.
        layers, budgets, options: as the configuration's `sparse_layers`, `sparse_budgets`, `sparse_options`.
        name: what the results call it: `dense`, `visionzip@64`, `visionzip@0.25`, `sparsevlm:raters=all@64`,
            `random@64#1`.
    """

    method: str
    budget: float | None = None
    seed: int | None = None
    layers: list[int] | None = None
    budgets: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    name: str = DENSE

    def grid(self, patches: int) -> int | None:
        """Of the controls that see no whole picture: patches along a side of what they see, 0 without a picture."""
        if self.method == SMALL and self.budget is not None:
            tokens = self.budget if isinstance(self.budget, int) else round(self.budget * patches)
            return max(1, isqrt(min(tokens, patches)))
        return 0 if self.method == BLIND else None

    @property
    def sparsity(self) -> dict[str, Any]:
        """The arguments of `set_sparsity` and `sparsify` behind the method."""
        if self.method in UNPRUNED:
            return {}
        options = self.options
        if self.seed is not None:
            options = _with_seed(self.method, options, self.seed)
        return {"budget": self.budget, "layers": self.layers, "budgets": self.budgets, "options": options or None}


def split_methods(text: str) -> list[str]:
    """The methods of a comma-separated list; commas within brackets separate nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def with_controls(methods: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """Methods and seeds of a comparison that can be trusted: all of `CONTROLS`, and five draws at least."""
    further = [n for n in range(CONTROL_SEEDS + len(seeds)) if n not in seeds]
    seeds = [*seeds, *further[: max(0, CONTROL_SEEDS - len(seeds))]]
    return [*methods, *(name for name in CONTROLS if name not in methods)], seeds


def plan_runs(methods: Sequence[str], budgets: Sequence[float | None], seeds: Sequence[int] = (0,)) -> list[Run]:
    """Every method with every budget, and those that draw at random with every seed.

    Args:
        methods: names, options behind colons: `"sparsevlm:raters=all:recycle=false"`. Values are JSON, or text. Those
            of a composition say whose they are: `"divprune+sparsevlm:sparsevlm.version=2.0"`.
            `layers=[...]` and `budgets=[...]` set the stages by hand, once instead of once for each budget.
        budgets: visual tokens retained, or ratios of the patches, as floats; None for a method's own default.
        seeds: for methods with an option `seed`.

    Raises:
        ValueError: for an unknown method or option, with the nearest known one; for a repeated run, and for none.
    """
    if not methods or not budgets or not seeds:
        raise ValueError("Of methods, budgets and seeds, one at least is needed.")
    runs = [run for method in methods for run in _runs_of(method, budgets, seeds)]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            listed = ", ".join(dict.fromkeys(names))
            raise ValueError(f"methods: {name} is there {names.count(name)} times; each of {listed} at most once.")
    return runs


def _runs_of(text: str, budgets: Sequence[float | None], seeds: Sequence[int]) -> list[Run]:
    method, *given = text.split(":")
    known = [*UNPRUNED, *sorted(METHODS)]
    if method not in known and JOIN not in method:
        raise ValueError(f"method {method!r} is unknown{nearest(method, known)}; allowed: {', '.join(known)}.")
    defaults = _defaults(method)
    lists: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for part in given:
        name, value = _option(method, defaults, part)
        if name in {**lists, **options}:
            raise ValueError(f"method {text!r}: {name} is given twice; each option once.")
        (lists if name in _LISTS else options)[name] = value
    draws = [name for name in defaults if name.rpartition(".")[2] == "seed" and name not in options]
    if method in (DENSE, BLIND):
        return [Run(method, name=method)]
    if method == SMALL:
        return [Run(SMALL, budget, name=f"{SMALL}@{budget}") for budget in budgets]
    runs = []
    for budget in [None] if "budgets" in lists else budgets:
        for seed in seeds if draws else [None]:
            name = text + ("" if budget is None else f"@{budget}") + ("" if seed is None else f"#{seed}")
            runs.append(Run(method, budget, seed, options=_nested(options), name=name, **lists))
    return runs


def _defaults(method: str) -> dict[str, Any]:
    """The options of a method with their defaults; those of a composition's methods as `name.option`."""
    if method in UNPRUNED:
        return {}
    classes = method_classes(method)
    if len(classes) == 1:
        return option_defaults(classes[0])
    return {f"{part.name}.{name}": value for part in classes for name, value in option_defaults(part).items()}


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """`sparse_options` of options by name, or `name.option`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        part, dot, option = name.rpartition(".")
        (found.setdefault(part, {}) if dot else found)[option] = value
    return found


def _with_seed(method: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """`sparse_options` with a seed wherever one is taken and none is given."""
    classes = method_classes(method)
    if len(classes) == 1:
        return {**options, "seed": seed}
    drawing = [part.name for part in classes if "seed" in option_defaults(part)]
    return {**options, **{name: {"seed": seed, **options.get(name, {})} for name in drawing}}


def _option(method: str, defaults: dict[str, Any], part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    known = [] if method in UNPRUNED else [*defaults, *_LISTS]
    if not equals or name not in known:
        raise ValueError(
            f"method {method}: {part!r} is no option{nearest(name, known)}; "
            f"allowed, as name=value: {', '.join(known) or 'none'}."
        )
    if isinstance(defaults.get(name), str):
        return name, value
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
