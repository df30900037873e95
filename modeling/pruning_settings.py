"""The five settings as one value, options as fields with bounds, and the checks that all of them go through."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, NoReturn

FIELDS = ("sparse_method", "sparse_budget", "sparse_layers", "sparse_budgets", "sparse_options")
NAMES = ("method", "budget", "layers", "budgets", "options")
JOIN = "+"
POSITIONS = ("compact", "original")
SHOWN, LONGEST = 80, 1000
PRESET_PATCHES = 576
PRESET_DEPTH = 32


# --- What is shown, and what is a number ---------------------------------------------------------------------------


def shown(value: object) -> str:
    """A value as error messages show it: its representation, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # An integer of more digits than Python writes.
        return f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}... ({len(text)} characters)"


def nearest(name: object, allowed: Sequence[str]) -> str:
    """A hint that names the closest valid word, or an empty string: `(did you mean 'visionzip'?)`."""
    word = name[:SHOWN].lower() if isinstance(name, str) else ""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_count(value: object, low: int, high: int) -> bool:
    """Whether `value` is an integer (a bool is none) within `low..high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether `value` is a finite number (a bool is none) within `low..high`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value)) and low <= value <= high
    except OverflowError:
        return False


def check_counts(
    name: str, values: object, low: int, high: int, length: int | None = None, of: int | None = None
) -> tuple[int, ...]:
    """Returns `values` as a tuple of integers in `low..high`.

    Args:
        name: of the setting, for the message; length: how many there have to be, any number from 1 on by default.
        of: how many tokens there are, where a float may stand for a ratio of them, rounded down, one at least.

    Raises:
        ValueError: naming the setting, what is allowed and what was given.
    """
    size = "a list of" if length is None else f"a list of {length}"
    entries = list(values) if isinstance(values, list | tuple) else []
    if of is not None:
        ratio = [isinstance(v, float) and is_number(v, 0, 1) and v > 0 for v in entries]
        entries = [max(1, int(v * of)) if r else v for v, r in zip(entries, ratio, strict=True)]
    fits = len(entries) == length if length is not None else bool(entries)
    if not fits or not all(is_count(v, low, high) for v in entries):
        ratios = " or ratios in (0, 1]" if of is not None and any(isinstance(v, float) for v in entries) else ""
        raise ValueError(f"`{name}` must be {size} ints in [{low}, {high}]{ratios}, got {shown(values)}.")
    return tuple(entries)


def check_budget(budget: object, patches: int) -> int | None:
    """Returns `sparse_budget` as a token count; a ratio is one of the `patches` of an item, one token at least.

    Raises:
        ValueError: if it is neither None, nor an integer from 1 to `patches`, nor a float above 0, 1.0 at most.
    """
    if budget is None:
        return None
    if isinstance(budget, float) and is_number(budget, 0, 1) and budget > 0:
        return max(1, round(budget * patches))
    if not is_count(budget, 1, patches):
        raise ValueError(
            f"`sparse_budget` must be an int in [1, {patches}], the visual tokens of one image, or a float in (0, 1], "
            f"a ratio of them, got {shown(budget)}."
        )
    return budget  # type: ignore[return-value]


# --- Layers of a decoder -------------------------------------------------------------------------------------------


def scale_layers(published: Sequence[int], depth: int) -> tuple[int, ...]:
    """The layers that a paper gives for 32 decoder layers; fewer layers scale them down in proportion.

    Scaled layers lie at least two apart (one, where that does not fit before the last layer), the first from layer 1
    on: of 8 layers, 1, 3, 5 stand for 2, 6, 15. A model with fewer layers than stages drops the earliest stages.
    """
    if depth >= PRESET_DEPTH:
        return tuple(published)
    for gap in (2, 1):
        layers: list[int] = []
        for layer in published:
            scaled = max(1, int(layer * depth / PRESET_DEPTH + 0.5))
            layers.append(max(scaled, layers[-1] + gap) if layers else scaled)
        if layers[-1] <= depth - 2:
            return tuple(layers)
    last = max(1, depth - 1)
    return tuple(range(max(0, last - len(published)), last))


def check_stages(
    depth: int, layers: Sequence[int] | None, preset: tuple[int, ...], budgets: object, first: int = 0
) -> tuple[int, ...]:
    """The layers at which to prune, by default those of the `preset`, the last ones where `budgets` are fewer.

    Args:
        depth: layers of the decoder; first: the earliest that is allowed.

    Raises:
        ValueError: for `layers` that are not ascending, or not within `first` and the decoder's last.
    """
    if layers is None:
        fewer = isinstance(budgets, list | tuple) and 0 < len(budgets) < len(preset)
        return preset[-len(budgets) :] if fewer else preset  # type: ignore[arg-type]
    stages = check_counts("sparse_layers", layers, first, depth - 1)
    if any(a >= b for a, b in pairwise(stages)):
        raise ValueError(f"`sparse_layers` must be ascending decoder layers, each once, got {shown(layers)}.")
    return stages


# --- Options -------------------------------------------------------------------------------------------------------


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    kind: type | None = None,
    from_caller: bool = False,
) -> Any:
    """A dataclass field that is an option of a method.

    Args:
        default: also says of what kind the option is; None is allowed where it is the default.
        help: what it does, in a few words.
        low, high: bounds of a number; choices: the words that are allowed.
        kind: bool, int, float or str, where the default does not say.
        from_caller: a saved configuration cannot set it, only who loads one: it names something to be loaded.
    """
    known = {"help": help, "low": low, "high": high, "choices": choices, "kind": kind, "from_caller": from_caller}
    return field(default=default, metadata={"option": known})


def option_fields(method: Any) -> dict[str, Any]:
    """The fields of a method's dataclass that are options, by name."""
    return {f.name: f for f in fields(method) if f.name not in ("layers", "budgets") and not f.metadata.get("internal")}


def option_defaults(method: Any) -> dict[str, Any]:
    """The default of each option."""
    return {name: f.default for name, f in option_fields(method).items()}


def check_options(method: Any, options: object) -> dict[str, Any]:
    """The options of a method, with defaults filled in.

    Raises:
        ValueError: for what is no dict, a name that the method does not have, and a value that is not allowed.
    """
    known = option_fields(method)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"`sparse_options` must be a dict of options, got {shown(options)}.")
    for name in options or {}:
        if name not in known:
            allowed = ", ".join(sorted(known)) or "none"
            hint = nearest(name, list(known))
            raise ValueError(f"`sparse_options`: {method.name} has no option {shown(name)}{hint}; it has: {allowed}.")
    given = dict(options or {})
    return {name: _checked(name, given.get(name, f.default), f) for name, f in known.items()}


def _checked(name: str, value: Any, f: Any) -> Any:
    """The value of an option, as its field takes it."""
    known = f.metadata.get("option", {})
    kind = known.get("kind") or (None if f.default is None else type(f.default))
    if value is None and f.default is None:
        return None
    low, high = known.get("low"), known.get("high")
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    if choices := known.get("choices"):
        if not isinstance(value, str) or value not in choices:
            _refuse(name, f"one of {', '.join(map(repr, choices))}", value, nearest(value, choices))
    elif kind is bool:
        if not isinstance(value, bool):
            _refuse(name, "true or false", value)
    elif kind is int:
        if not is_number(value, *bounds) or not isinstance(value, int):
            _refuse(name, _range("an int", low, high), value)
    elif kind is float:
        if not is_number(value, *bounds):
            _refuse(name, _range("a number", low, high), value)
        return float(value)
    elif kind is str and not (isinstance(value, str) and 0 < len(value) <= LONGEST):
        _refuse(name, f"a text of at most {LONGEST} characters", value)
    return value


def _range(what: str, low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return what
    return f"{what} from {low} on" if high is None else f"{what} in [{low}, {high}]"


def _refuse(name: str, allowed: str, value: object, hint: str = "") -> NoReturn:
    raise ValueError(f"`sparse_options`: {name!r} must be {allowed}, got {shown(value)}{hint}.")


# --- The settings --------------------------------------------------------------------------------------------------


def as_lists(value: Any) -> Any:
    """Tuples as lists, nested ones too: what configurations and results hold."""
    if isinstance(value, tuple | list):
        return [as_lists(entry) for entry in value]
    return value


@dataclass(frozen=True)
class Sparsity:
    """Which method prunes, and how: the five `sparse_*` fields of a configuration as one value.

    Attributes:
        method: a name of `list_methods()`, several joined by "+", or None for the dense model.
        budget: visual tokens retained per image, as the papers' tables count; a float is a ratio of the patches.
        layers: the layers at which the method acts.
        budgets: tokens per stage and image.
        options: the method's own options.

    A composition has up to one method of each place, in their order: inside the tower's layers, behind the projector,
    in the decoder; a method on the output of the tower stands in for the first two. Its `budget`, `layers` and
    `budgets` are lists with an entry for each (None where it takes its own), or dicts by name; `options` is a dict by
    name, in which the other three may stand too. A single budget b is the last method's; the one in front of it hands
    over 2 b, and one in front of that 4 b, at most all. A ratio of one method alone is of the tokens that it is handed.
    """

    method: str | None = None
    budget: Any = None
    layers: Any = None
    budgets: Any = None
    options: Any = None

    @classmethod
    def read(cls, source: Any) -> Sparsity:
        """Of a configuration, a mapping with `sparse_*` keys, or anything with such attributes."""
        get = source.get if isinstance(source, Mapping) else lambda name, default: getattr(source, name, default)
        return cls(**{short: as_lists(get(name, None)) for short, name in zip(NAMES, FIELDS, strict=True)})

    def fields(self) -> dict[str, Any]:
        """As `sparse_*` fields."""
        return {name: getattr(self, short) for short, name in zip(NAMES, FIELDS, strict=True)}

    def check_named(self) -> None:
        """Refuses settings without a method.

        Raises:
            ValueError: naming the setting.
        """
        for name, value in self.fields().items():
            if self.method is None and value is not None:
                raise ValueError(f"`{name}`={shown(value)} needs `sparse_method`: name a method too.")

    def parts(self) -> list[Sparsity]:
        """The settings of the methods of a composition, but for a single budget, which belongs to all.

        Raises:
            ValueError: for settings that are not for so many.
        """
        names = str(self.method).split(JOIN)
        if self.options is not None and (not isinstance(self.options, Mapping) or set(self.options) - set(names)):
            raise ValueError(
                f"`sparse_options` must be a dict by name, {' and '.join(map(repr, names))}, got {shown(self.options)}."
            )
        settings: list[dict[str, Any]] = []
        for part in names:
            own = (self.options or {}).get(part)
            if own is not None and not isinstance(own, Mapping):
                raise ValueError(f"`sparse_options`: {part} must have a dict of options, got {shown(own)}.")
            own = dict(own or {})
            settings.append({s: own.pop(s, None) for s in NAMES[1:4]} | {"options": own or None})
        for name in NAMES[1:4]:
            for values, value in zip(settings, _for_each(name, getattr(self, name), names), strict=True):
                values[name] = value if values[name] is None else values[name]
        return [Sparsity(part, **values) for part, values in zip(names, settings, strict=True)]

    def at_most(self, tokens: int) -> Sparsity:
        """The settings for an item that has so many tokens: what asks for more asks for all of them."""

        def cut(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: cut(entry) for name, entry in value.items()}
            if isinstance(value, tuple | list):
                return [cut(entry) for entry in value]
            return min(value, tokens) if is_count(value, 1, sys.maxsize) else value

        return replace(self, budget=cut(self.budget), budgets=cut(self.budgets))

    @property
    def shares_budget(self) -> bool:
        """Whether a composition has one budget, of which each method takes twice as much as the one behind it."""
        return isinstance(self.budget, int | float) and not isinstance(self.budget, bool)


def _for_each(name: str, value: Any, names: Sequence[str]) -> Sequence[Any]:
    """A setting's values for the methods of a composition."""
    if value is None:
        return [None] * len(names)
    if isinstance(value, Mapping) and not set(value) - set(names):
        return [value.get(part) for part in names]
    fits = isinstance(value, list | tuple) and len(value) == len(names)
    if fits and (name == "budget" or all(v is None or isinstance(v, list | tuple) for v in value)):
        return value
    if name == "budget" and isinstance(value, int | float) and not isinstance(value, bool):
        return [None] * len(names)
    kind, count = "numbers" if name == "budget" else "lists", {2: "two", 3: "three"}[len(names)]
    whose = "'s, ".join(names)
    raise ValueError(
        f"`sparse_{name}` must, for {JOIN.join(names)}, be {count} {kind}, [{whose}'s], or a dict by name, got "
        f"{shown(value)}."
    )
