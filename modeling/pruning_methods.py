"""What a pruning method is: its declarations, and the two kinds.

A method is a frozen dataclass: its fields besides `layers` and `budgets` are its options. It holds nothing of a
request. What it needs is declared by the class attributes of `Sparsifier`; families, processors, the configuration, the
cost model and the evaluation read that, and ask nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from .pruning_settings import Sparsity, check_budget, check_counts, check_options, check_stages, shown
from .pruning_types import Geometry, RaterAttention, VisionFeatures, VisualTokens


@dataclass(frozen=True)
class Sparsifier(ABC):
    """A method with its settings for one model.

    Attributes:
        name, paper, summary, cost: what tables show; cost is the order of what choosing adds.
        kind: "encoder" or "decoder".
        place: where it works: "tower", on the output of a layer of the vision tower; "layers", inside these;
            "projector", on projected features of all patches; "decoder", between its layers.
        unit: what it chooses from at a time where a picture is cut into tiles: "tile" or "picture".
        needs_attention: whether it reads `VisionFeatures.saliency` or `keys`.
        looks_at_question: whether the choice depends on the text of the prompt.
        draws: whether it reads fingerprints of the pictures.
        layers: where it acts, 0-based.
        budgets: tokens per stage, per image; empty where the method decides at run time.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "-"
    summary: ClassVar[str]
    cost: ClassVar[str] = "-"
    kind: ClassVar[str]
    place: ClassVar[str]
    unit: ClassVar[str] = "picture"
    needs_attention: ClassVar[bool] = False
    looks_at_question: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    layers: tuple[int, ...]
    budgets: tuple[int, ...]

    def of(self, **sizes: Any) -> Any:
        """The method of the same settings for an item of another size, which keeps all where a budget is larger.

        Args:
            sizes: of the item, as of `Geometry`.
        """
        origin = self.__dict__.get("origin")
        if origin is None:  # Made by hand, for one size.
            return self
        resolve, settings, geometry = origin
        other = replace(geometry, **sizes)
        return self if other == geometry else resolve(settings.at_most(other.tokens), other)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The methods that it is composed of, itself where it is one."""
        return (self,)

    @property
    def encoder(self) -> Any:
        """The part that reduces what enters the decoder, an `EncoderSparsifier`, or None."""
        return None

    @property
    def decoder(self) -> Any:
        """The part that acts between decoder layers, a `DecoderSparsifier`, or None."""
        return None

    @property
    def counted(self) -> tuple[Any, Any]:
        """How many tokens it leaves: those that enter the decoder, and those of each stage there; None for all."""
        return self.encoder and self.encoder.tokens, self.decoder and self.decoder.budgets

    @property
    def needs_mask(self) -> bool:
        """Whether its tokens have sizes, which a mask brings into the decoder's attention."""
        return False

    @classmethod
    @abstractmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> Sparsifier:
        """Builds the method.

        Args:
            geometry: the sizes of the model; settings: explicit layers and budgets win over the preset of `budget`.

        Raises:
            ValueError: for any setting that is out of range or contradicts another one.
        """

    @classmethod
    def entering(cls, patches: int, settings: Sparsity) -> int | None:
        """Tokens of an item of so many patches that enter the decoder; None for all of them.

        Raises:
            ValueError: for a budget, or an option, that is not allowed whatever the layers are.
        """
        check_options(cls, settings.options)
        check_budget(settings.budget, patches)
        return None

    @classmethod
    def needs_budget(cls, form: str) -> ValueError:
        """The error of settings that say nothing of how many tokens stay."""
        return ValueError(f"`sparse_method`={cls.name!r} needs `sparse_budget` (64, say) or `sparse_budgets`={form}.")


class EncoderSparsifier(Sparsifier):
    """Reduces the visual tokens of every item on its own: a static number of them enters the decoder.

    Attributes:
        keeps_cls: whether the first of its tokens is CLS itself, where there is one.
        needs_cls: whether a tower without CLS cannot serve it; with `needs_attention` it gets what patches receive.
        needs_grid: whether it reads `VisionFeatures.grid`, in which merged tokens have no place.
    """

    kind: ClassVar[str] = "encoder"
    place: ClassVar[str] = "tower"
    unit: ClassVar[str] = "tile"
    keeps_cls: ClassVar[bool] = False
    needs_cls: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    @property
    def encoder(self) -> Any:
        return self

    @property
    def inside(self) -> Any:
        """The part that works in the tower, or None."""
        return None if self.place == "projector" else self

    @property
    def behind(self) -> Any:
        """The part that works behind the projector, or None."""
        return self if self.place == "projector" else None

    @property
    def tokens(self) -> int:
        """Visual tokens per item that enter the decoder."""
        return self.budgets[-1]

    @property
    def receives(self) -> bool:
        """Whether it reads what patches receive from all, and not the attention of CLS; with `needs_attention`."""
        return False

    @property
    def new_tokens(self) -> int:
        """How many of them, at most, are made anew of several patches."""
        return 0

    @property
    def feature_layer(self) -> int:
        """The encoder layer after which the tower stops."""
        return self.layers[-1]

    @classmethod
    def entering(cls, patches: int, settings: Sparsity) -> int:
        super().entering(patches, settings)
        tokens = check_budget(settings.budget, patches)
        if settings.budgets is None and tokens is None:
            raise cls.needs_budget("[tokens]")
        budgets = [tokens] if settings.budgets is None else settings.budgets
        return check_counts("sparse_budgets", budgets, 1, patches, 1, of=patches)[0]

    @classmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> EncoderSparsifier:
        """For a method with `sparse_budgets=[tokens]`."""
        options = check_options(cls, settings.options)
        return cls(
            (cls.check_layer(geometry, settings.layers),), (cls.entering(geometry.patches, settings),), **options
        )

    @classmethod
    def check_layer(cls, geometry: Geometry, layers: Sequence[int] | None) -> int:
        """The one layer of `sparse_layers`, by default the one that the model takes its features from.

        Raises:
            ValueError: if there are several, or the tower has no such layer.
        """
        depth = geometry.encoder_layers
        given = [geometry.feature_layer] if layers is None else layers
        return check_counts("sparse_layers", given, -depth, depth - 1, 1)[0]

    def tower_tokens(self, used: int, depth: int, patches: int) -> list[int]:
        """Tokens with CLS that enter each of the `used` layers of a tower of `depth`, and those that leave the last."""
        return [patches + 1] * (used + 1)

    def flops(self, patches: int, width: int, channels: int) -> float:
        """Operations of the selection for one item, of the tower's `width` and the decoder's `channels`.

        Counted is what matrix products take, as far as it grows with the square of a size.
        """
        return 2.0 * (patches + 1) * width**2 if self.needs_attention else 0.0

    @abstractmethod
    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        """Chooses, or makes, the tokens of each item; of one item the same, whatever is beside it."""

    def run_layers(self, layers: Sequence[Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """For a method inside the layers: runs them on `(items, N, channels)` tokens, CLS first.

        A layer called as `layer(hidden, None, run=f)` gives what `f(layer, hidden)` does: within that call alone are
        weights there that are offloaded or sharded.

        Returns:
            the tokens that are left, `(items, n, channels)`, and which of them each of the N went into, `(items, N)`.
        """
        raise NotImplementedError(f"{type(self).__name__}: place='layers' needs run_layers.")


class DecoderSparsifier(Sparsifier):
    """Drops visual tokens between decoder layers, scored by the attention that some tokens pay them.

    The layers `layers` run whole; their output is reduced. The kept tokens are the `counts` highest scores (ties go to
    the earlier token); all other tokens of the prompt stay.

    Attributes:
        before_layer: whether the method acts right before its layers instead, by the attention that each would pay.
        fewest: the smallest number that may stand in `sparse_budgets`.
        positions: "compact", renumbered after every pruning, or "original".
        trim_cache: whether, once a prompt is through, the cache of the layers up to the last pruning layer loses what
            was pruned too: answers then cost less memory, and see less than in the papers.
    """

    kind: ClassVar[str] = "decoder"
    place: ClassVar[str] = "decoder"
    looks_at_question: ClassVar[bool] = True
    before_layer: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    positions: str
    trim_cache: bool = False

    @property
    def decoder(self) -> Any:
        return self

    @classmethod
    def entering(cls, patches: int, settings: Sparsity) -> None:
        super().entering(patches, settings)
        if settings.budgets is not None:
            cls.check_falling(settings.budgets, patches, None)
        elif settings.budget is None:
            raise cls.needs_budget("[tokens per layer]")

    @classmethod
    def resolve(cls, geometry: Geometry, settings: Sparsity) -> DecoderSparsifier:
        """For a method that has `preset_layers` and `preset_budgets`."""
        options = check_options(cls, settings.options)
        tokens = check_budget(settings.budget, geometry.patches)
        preset = cls.preset_layers(geometry, tokens)
        first, depth = int(cls.before_layer), geometry.decoder_layers
        stages = check_stages(depth, settings.layers, preset, settings.budgets, first=first)
        budgets = settings.budgets
        if budgets is None and tokens is None:
            raise cls.needs_budget("[tokens per layer]")
        if budgets is None:
            budgets = cls.preset_budgets(geometry, tokens, stages, settings.layers is not None)  # type: ignore[arg-type]
        return cls(stages, cls.check_falling(budgets, geometry.patches, len(stages)), **options)

    @classmethod
    def check_falling(cls, budgets: object, patches: int, stages: int | None) -> tuple[int, ...]:
        """Tokens per stage, of which none can be more than were left before it.

        Args:
            stages: how many there are; None where that is not known yet.

        Raises:
            ValueError: if they are not as many as the stages, out of range, or rise.
        """
        counts = check_counts("sparse_budgets", budgets, cls.fewest, patches, stages, of=patches)
        if list(counts) != sorted(counts, reverse=True):
            raise ValueError(f"`sparse_budgets` must fall from stage to stage, got {shown(list(counts))}.")
        return counts

    @classmethod
    def preset_layers(cls, geometry: Geometry, budget: int | None) -> tuple[int, ...]:
        """The layers for `sparse_budget`, ascending."""
        raise NotImplementedError(f"{cls.__name__}: preset_layers, or a resolve of its own, is missing.")

    @classmethod
    def preset_budgets(cls, geometry: Geometry, budget: int, layers: tuple[int, ...], by_hand: bool) -> tuple[int, ...]:
        """The tokens per layer that `sparse_budget` stands for.

        Args:
            geometry: of the model; budget: as a count; layers: of the preset, or given `by_hand`.
        """
        raise NotImplementedError(f"{cls.__name__}: preset_budgets, or a resolve of its own, is missing.")

    @property
    def pruned_layers(self) -> tuple[int, ...]:
        """The layers whose output is pruned."""
        return tuple(layer - 1 for layer in self.layers) if self.before_layer else self.layers

    @property
    def visual_raters(self) -> bool:
        """Whether the visual tokens rate too, each what it sees.

        `scores` has to be a mean over raters then: it is asked for blocks of them, for there are as many as columns.
        """
        return False

    @abstractmethod
    def rate(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        """Which text tokens rate, decided once per prompt from the input embeddings.

        Args:
            visual: `(rows, V, channels)`, text: `(rows, T, channels)`, text_valid: `(rows, T)` bool.

        Returns:
            `(rows, T)` bool.
        """

    @abstractmethod
    def scores(self, attention: RaterAttention) -> Tensor:
        """Float32 scores `(rows, V)` of the visual tokens; the higher, the better."""

    def counts(self, stage: int, images: int, attention: RaterAttention) -> list[int]:
        """How many tokens each row keeps at stage `stage`: a list of `rows` integers from 0 to V."""
        rows, visual = attention.visual_positions.shape[:2]
        return [min(self.budgets[stage] * images, visual)] * rows

    def merge(self, layer: int, dropped: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merges dropped tokens into new ones; None where the method just drops.

        Args:
            layer: the pruning layer.
            dropped: `(rows, n, channels)` layer output of the dropped tokens, in descending order of score.

        Returns:
            merged `(rows, c, channels)` and assignment `(rows, n)` int64 (merged token of each, -1 for none).
        """
        return None
