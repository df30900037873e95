"""Two methods on one model: the first says what enters the decoder, the second acts between its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .checks import nearest
from .sparsifier import DecoderSparsifier, EncoderSparsifier, Geometry, Sparsifier

JOIN = "+"
SETTINGS = ("budget", "layers", "budgets")
# Of a budget for both, the encoder method hands over so many times as much.
SURPLUS = 2


@dataclass(frozen=True)
class Composition(Sparsifier):
    """An encoder method, then a decoder method on the tokens that it leaves: "divprune+sparsevlm".

    Settings for each: `sparse_budget`, `sparse_layers` and `sparse_budgets` are lists of two, the encoder method's
    first (None where it takes its own), or dicts by name; `sparse_options` is a dict by name, in which "budget",
    "layers" and "budgets" may stand too. A single `sparse_budget` b is the decoder method's, and the encoder method
    hands over 2 b, at most all. The decoder method's budgets are of the tokens that it is handed, a ratio is one of
    them.

    Attributes:
        first, second: the two methods; `layers` and `budgets` are theirs.
    """

    first: EncoderSparsifier
    second: DecoderSparsifier

    kind = "composition"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.first.name}{JOIN}{self.second.name}"

    @property
    def encoder(self) -> EncoderSparsifier:
        return self.first

    @property
    def decoder(self) -> DecoderSparsifier:
        return self.second

    @classmethod
    def resolve(cls, *args: Any, **kwargs: Any) -> Sparsifier:
        raise NotImplementedError("A composition is built by `compose`.")


def part_classes(name: str, methods: dict[str, type[Sparsifier]]) -> tuple[type[Sparsifier], type[Sparsifier]]:
    """The two classes that a composed name stands for.

    Raises:
        ValueError: if it is not an encoder method and then a decoder method.
    """
    parts = name.split(JOIN)
    kinds = {kind: sorted(n for n, m in methods.items() if m.kind == kind) for kind in ("encoder", "decoder")}
    for part in parts:
        if part not in methods:
            allowed = ", ".join(sorted(methods))
            raise ValueError(
                f"sparse_method={name!r}: {part!r} is unknown{nearest(part, list(methods))}; allowed: {allowed}."
            )
    if [methods[part].kind for part in parts] != ["encoder", "decoder"]:
        raise ValueError(
            f"sparse_method={name!r}: an encoder method, then a decoder method, is allowed: one of "
            f"{', '.join(kinds['encoder'])}, then one of {', '.join(kinds['decoder'])}."
        )
    return methods[parts[0]], methods[parts[1]]


def compose(
    name: str, classes: tuple[type[Sparsifier], type[Sparsifier]], geometry: Geometry, fields: dict[str, Any]
) -> Composition:
    """Builds a composition from the five `sparse_*` fields.

    Raises:
        ValueError: for all that either method refuses, and settings that are not for two.
    """
    names = name.split(JOIN)
    options = fields["sparse_options"]
    if options is not None and (not isinstance(options, dict) or set(options) - set(names)):
        raise ValueError(f"sparse_options={options!r}: a dict with {names[0]!r} and {names[1]!r} as keys is allowed.")
    settings: list[dict[str, Any]] = []
    for part in names:
        own = (options or {}).get(part)
        if own is not None and not isinstance(own, dict):
            raise ValueError(f"sparse_options: {part}={own!r}: a dict of options is allowed.")
        own = dict(own or {})
        settings.append({s: own.pop(s, None) for s in SETTINGS} | {"options": own or None})
    for setting in SETTINGS:
        field = f"sparse_{setting}"
        for values, value in zip(settings, _for_both(field, fields[field], names, geometry), strict=True):
            values[setting] = value if values[setting] is None else values[setting]
    first = classes[0].resolve(geometry, **settings[0])
    assert isinstance(first, EncoderSparsifier)
    if first.weighs:
        raise ValueError(
            f"sparse_method={name!r}: {names[0]} weighs its tokens in attention, which a decoder method does not; "
            f"sparse_options={{{names[0]!r}: {{'proportional': False}}}} is allowed."
        )
    second = classes[1].resolve(replace(geometry, patches=first.tokens), **settings[1])
    assert isinstance(second, DecoderSparsifier)
    # A method that finds its budgets at run time has None, which it also takes when the fields are read again.
    return Composition((first.layers, second.layers), (first.budgets, second.budgets or None), first, second)  # type: ignore[arg-type]


def _for_both(field: str, value: Any, names: Sequence[str], geometry: Geometry) -> Sequence[Any]:
    """A field's values for the two methods."""
    if value is None:
        return None, None
    if isinstance(value, dict) and not set(value) - set(names):
        return [value.get(name) for name in names]
    two = isinstance(value, list | tuple) and len(value) == 2
    if two and (field == "sparse_budget" or all(v is None or isinstance(v, list | tuple) for v in value)):
        return value
    if field == "sparse_budget" and isinstance(value, int | float) and not isinstance(value, bool):
        tokens = Sparsifier.check_budget(value, geometry.patches)
        assert tokens is not None
        return min(geometry.patches, SURPLUS * tokens), tokens
    kind = "numbers" if field == "sparse_budget" else "lists"
    raise ValueError(
        f"{field}={value!r}: for {JOIN.join(names)}, two {kind}, [{names[0]}'s, {names[1]}'s], or a dict by name is "
        "allowed."
    )
