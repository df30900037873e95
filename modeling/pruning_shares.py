"""Methods composed, and what of the settings belongs to a part: to one of them, one tile of a picture, one frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .pruning_methods import EncoderSparsifier, Sparsifier
from .pruning_settings import JOIN, Sparsity, as_lists, check_budget, shown
from .pruning_types import Geometry, VisionFeatures, VisualTokens


class Joined:
    """What several methods in one share: `parts`, in their order."""

    parts: Any

    @property
    def name(self) -> str:
        return JOIN.join(part.name for part in self.parts)

    @property
    def draws(self) -> bool:
        return any(part.draws for part in self.parts)


@dataclass(frozen=True)
class Chain(Joined, EncoderSparsifier):  # type: ignore[override]
    """A method inside the tower's layers, then one behind the projector on the tokens that it leaves: "tome+divprune".

    What comes out is of the patches, see `VisualTokens.behind`; a picture in tiles is reduced tile by tile.

    Attributes:
        first, second: the two methods; `layers` and `budgets` are theirs.
    """

    place = "layers"

    first: Any
    second: Any

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.first, self.second

    @property
    def looks_at_question(self) -> bool:  # type: ignore[override]
        return bool(self.second.looks_at_question)

    @property
    def needs_mask(self) -> bool:
        return any(part.needs_mask for part in self.parts)

    @property
    def inside(self) -> Any:
        return self.first

    @property
    def behind(self) -> Any:
        return self.second

    @property
    def tokens(self) -> int:
        return int(self.second.tokens)

    @property
    def new_tokens(self) -> int:
        return int(min(self.first.new_tokens, self.tokens) + self.second.new_tokens)

    @property
    def feature_layer(self) -> int:
        return int(self.first.feature_layer)

    @classmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> EncoderSparsifier:
        raise NotImplementedError("A chain is built of two classes, by `compose`.")

    def tower_tokens(self, used: int, depth: int, patches: int) -> list[int]:
        tokens: list[int] = self.first.tower_tokens(used, depth, patches)
        return tokens

    def flops(self, patches: int, width: int, channels: int) -> float:
        return float(self.first.flops(patches, width, channels) + self.second.flops(self.first.tokens, width, channels))

    def run_layers(self, layers: Sequence[Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
        left: tuple[Tensor, Tensor] = self.first.run_layers(layers, hidden)
        return left

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        """Of what the first has left, see `VisionFeatures.before`."""
        tokens: VisualTokens = self.second.reduce(vision)
        return tokens.behind(vision.before)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Composition(Joined, Sparsifier):  # type: ignore[override]
    """An encoder method, or two, then a decoder method on the tokens that they leave: "divprune+sparsevlm".

    Of the settings see `Sparsity`. The decoder method's budgets are of the tokens that it is handed, a ratio is one of
    them.

    Attributes:
        first, second: the encoder part, a `Chain` where it is two methods, and the decoder method; `layers` and
            `budgets` are those of all.
    """

    kind = "composition"
    place = "decoder"

    first: Any
    second: Any

    @property
    def parts(self) -> tuple[Any, ...]:
        return (*self.first.parts, self.second)

    @property
    def encoder(self) -> Any:
        return self.first

    @property
    def decoder(self) -> Any:
        return self.second

    @property
    def looks_at_question(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> Sparsifier:
        raise NotImplementedError("A composition is built of classes, by `compose`.")


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


def entering_of(classes: Sequence[Any], geometry: Geometry, settings: Sequence[Sparsity]) -> int | None:
    """As `Sparsifier.entering`, behind encoder methods in their order, of an item that may be a video, or in tiles."""
    cls, own = classes[0], settings[0]
    tokens: Any
    frames = geometry.frames
    if _by_tile(cls, geometry):
        alone, share = _for_tile(cls, geometry, own)
        tokens = geometry.tiles * cls.entering(alone.patches, share)
    elif frames is None or cls.place not in ("tower", "layers"):
        tokens = cls.entering(geometry.tokens, own)
    else:
        parts = [for_part(cls, replace(geometry, frame=frame), own) for frame in range(frames)]
        tokens = sum(int(cls.entering(alone.patches, share)) + (not cls.keeps_cls) for alone, share in parts)
    if len(classes) > 1:
        alone, share = _for_second(classes[1], geometry, tokens, settings[1])
        tokens = geometry.tiles * classes[1].entering(alone.patches, share)
    return None if tokens is None else int(tokens)


def _for_second(cls: Any, geometry: Geometry, tokens: int, settings: Sparsity) -> tuple[Geometry, Sparsity]:
    """As `for_part`, behind a method inside the layers that leaves so many tokens of an item; tile by tile as that."""
    handed = replace(geometry, patches=tokens // geometry.tiles, packed=None)
    return _for_tile(cls, handed, settings.at_most(handed.tokens) if _by_tile(Chain, geometry) else settings)


def shared_out(settings: Sparsity, patches: int) -> list[Sparsity]:
    """The settings of a composition's methods; of a single budget each takes twice as much as the one behind it."""
    parts = settings.parts()
    if settings.shares_budget:
        tokens: Any = check_budget(settings.budget, patches)
        for place, part in enumerate(parts):
            if part.budget is None and part.budgets is None:
                parts[place] = replace(part, budget=min(patches, tokens * 2 ** (len(parts) - 1 - place)))
    return parts


def compose(classes: Sequence[Any], geometry: Geometry, settings: Sparsity) -> Sparsifier:
    """Builds a composition, of methods in the order of their places.

    Raises:
        ValueError: for all that one of the methods refuses, and settings that are not for so many.
    """
    parts: Any = shared_out(settings, geometry.tokens)
    encoders = [cls for cls in classes if cls.kind == "encoder"]
    first = encoders[0].resolve(*for_part(encoders[0], geometry, parts[0]))
    if len(encoders) > 1:
        first = _chained(first, encoders[1], geometry, parts[1])
    if len(encoders) == len(classes):
        return first
    if first.needs_mask:
        name = first.parts[-1].name
        raise ValueError(
            f"`sparse_method`={settings.method!r}: {name} weighs its tokens in attention, which a decoder method "
            f"does not; sparse_options={{{name!r}: {{'proportional': False}}}} is allowed."
        )
    tokens = entering_of(encoders, geometry, parts) or geometry.tokens
    handed = replace(geometry, patches=tokens, frames=None, tiles=1, packed=None)
    second = classes[-1].resolve(handed, parts[-1].at_most(tokens) if geometry.dynamic else parts[-1])
    # A method that finds its budgets at run time has None, which it also takes when the settings are read again.
    every = (*first.parts, second)
    budgets: Any = tuple(x.budgets or None for x in every)
    return Composition(tuple(x.layers for x in every), budgets, first, second)


def _chained(first: Any, cls: Any, geometry: Geometry, settings: Sparsity) -> Chain:
    """A method inside the layers with the one behind it.

    Raises:
        ValueError: for what the second refuses, its layer where that is another one, and in models that take videos
            frame by frame.
    """
    name = f"{first.name}{JOIN}{cls.name}"
    if geometry.frames is not None:
        raise ValueError(
            f"`sparse_method`={name!r}: in this model each frame keeps its CLS beside what {first.name} leaves of it; "
            f"{first.name!r} or {cls.name!r} is allowed, alone or with a decoder method behind it."
        )
    second = cls.resolve(*_for_second(cls, geometry, first.tokens * geometry.tiles, settings))
    depth = geometry.encoder_layers
    if (second.feature_layer - first.feature_layer) % depth:
        raise ValueError(
            f"`sparse_layers`: {cls.name} takes what {first.name} leaves behind encoder layer "
            f"{first.feature_layer % depth}; None is allowed, got {shown(as_lists(second.layers))}."
        )
    return Chain((first.layers, second.layers), (first.budgets, second.budgets), first, second)
