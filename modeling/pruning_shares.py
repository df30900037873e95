"""What of the settings belongs to a part: to one method of two, one tile of a picture, one frame of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .pruning_methods import Sparsifier
from .pruning_settings import JOIN, Sparsity, check_budget
from .pruning_types import Geometry


@dataclass(frozen=True)
class Composition(Sparsifier):
    """An encoder method, then a decoder method on the tokens that it leaves: "divprune+sparsevlm".

    Of the settings see `Sparsity`. The decoder method's budgets are of the tokens that it is handed, a ratio is one of
    them.

    Attributes:
        first, second: the two methods; `layers` and `budgets` are theirs.
    """

    kind = "composition"
    place = "decoder"

    first: Any
    second: Any

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.first.name}{JOIN}{self.second.name}"

    @property
    def encoder(self) -> Any:
        return self.first

    @property
    def decoder(self) -> Any:
        return self.second

    @property
    def looks_at_question(self) -> bool:  # type: ignore[override]
        return True

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.first.draws or self.second.draws

    @classmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> Sparsifier:
        raise NotImplementedError("A composition is built of two classes, by `compose`.")


def for_part(cls: Any, geometry: Geometry, settings: Sparsity) -> tuple[Geometry, Sparsity]:
    """What a method is resolved with: for one tile, or in the tower for one frame, alone, by its share of the budget.

    Raises:
        ValueError: for a budget that leaves nothing of a tile or a frame.
    """
    frames = geometry.frames
    if _by_tile(cls, geometry):
        return _for_tile(cls, geometry, settings)
    if frames is None or cls.place not in ("tower", "layers"):
        return replace(geometry, patches=geometry.tokens, frames=None, tiles=1, packed=None), settings
    alone, budget = replace(geometry, frames=None, frame=0), check_budget(settings.budget, geometry.tokens)
    if budget is None:
        return alone, settings
    cls_apart = int(not cls.keeps_cls)
    least = frames * (1 + cls_apart)
    if isinstance(settings.budget, float):
        budget = max(budget, least)
    if budget < least:
        raise ValueError(
            f"`sparse_budget`={budget!r}: of a video of {frames} frames, of each of which {cls.name} leaves CLS and a "
            f"patch at least, {least} to {geometry.tokens} tokens are allowed."
        )
    share = budget * (geometry.frame + 1) // frames - budget * geometry.frame // frames - cls_apart
    return alone, replace(settings, budget=min(share, geometry.patches))


def _by_tile(cls: Any, geometry: Geometry) -> bool:
    return cls.unit == "tile" and (geometry.tiles > 1 or geometry.packed is not None)


def _for_tile(cls: Any, geometry: Geometry, settings: Sparsity) -> tuple[Geometry, Sparsity]:
    alone, tiles = replace(geometry, tiles=1, packed=None), geometry.tiles
    budget = check_budget(settings.budget, geometry.tokens)
    if budget is None:
        return alone, settings
    if isinstance(settings.budget, int) and budget < tiles:
        raise ValueError(
            f"`sparse_budget`={budget!r}: {cls.name} chooses tile by tile, and leaves one token of each at least: of a "
            f"picture of {tiles} tiles, an int in [{tiles}, {geometry.tokens}], or a ratio, is allowed."
        )
    return alone, replace(settings, budget=min(max(1, budget // tiles), alone.patches))


def entering_of(cls: Any, geometry: Geometry, settings: Sparsity) -> int | None:
    """As `Sparsifier.entering`, of an item that may be a video, or cut into tiles."""
    if _by_tile(cls, geometry):
        alone, own = _for_tile(cls, geometry, settings)
        return int(geometry.tiles * cls.entering(alone.patches, own))
    if geometry.frames is None or cls.place not in ("tower", "layers"):
        tokens: int | None = cls.entering(geometry.tokens, settings)
        return tokens
    parts = [for_part(cls, replace(geometry, frame=frame), settings) for frame in range(geometry.frames)]
    return sum(cls.entering(alone.patches, own) + (not cls.keeps_cls) for alone, own in parts)


def shared_out(settings: Sparsity, patches: int) -> tuple[Sparsity, Sparsity]:
    """The settings of a composition's two methods; of a single budget the encoder method takes twice as much."""
    first, second = settings.parts()
    if settings.shares_budget:
        tokens = check_budget(settings.budget, patches)
        if first.budget is None and first.budgets is None:
            first = replace(first, budget=min(patches, 2 * tokens))  # type: ignore[operator]
        if second.budget is None and second.budgets is None:
            second = replace(second, budget=tokens)
    return first, second


def compose(classes: Sequence[Any], geometry: Geometry, settings: Sparsity) -> Composition:
    """Builds a composition of an encoder and a decoder method.

    Raises:
        ValueError: for all that either method refuses, and settings that are not for two.
    """
    own, others = shared_out(settings, geometry.tokens)
    first = classes[0].resolve(*for_part(classes[0], geometry, own))
    if first.needs_mask:
        raise ValueError(
            f"`sparse_method`={settings.method!r}: {first.name} weighs its tokens in attention, which a decoder method "
            f"does not; sparse_options={{{first.name!r}: {{'proportional': False}}}} is allowed."
        )
    tokens = entering_of(classes[0], geometry, own) or geometry.tokens
    handed = replace(geometry, patches=tokens, frames=None, tiles=1, packed=None)
    second = classes[1].resolve(handed, others.at_most(tokens) if geometry.dynamic else others)
    # A method that finds its budgets at run time has None, which it also takes when the settings are read again.
    return Composition((first.layers, second.layers), (first.budgets, second.budgets or None), first, second)  # type: ignore[arg-type]
