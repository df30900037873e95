"""What a pruning method is: two abstract kinds, the record of what it kept, and the checks all methods share.

A method is a frozen dataclass of hyper-parameters; it holds nothing of a request. It is built from the five `sparse_*`
fields of a configuration by `Sparsifier.resolve`, which is also where every invalid combination is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import CHOICES, check_choice, check_counts, check_flag, is_count, nearest
from .presets import check_stages


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that presets and checks depend on (counts of patches and of layers)."""

    patches: int
    encoder_layers: int
    decoder_layers: int = 0
    feature_layer: int = -2


@dataclass(frozen=True)
class Selection:
    """One reduction stage of one forward pass.

    Visual tokens are numbered over the original patch grid: 0-based, without CLS, image *i* of a prompt adding
    *i* x patches; merged tokens are numbered on from the prompt's total of patches. (Where a model feeds CLS to its
    decoder, `vision_feature_select_strategy="full"`, decoder methods count it as token 0 of its image.)

    Attributes:
        layer: the encoder or decoder layer (0-based) whose output was reduced.
        kept: `(batch, k)` int64, the tokens that were kept, ascending; -1 is padding where prompts differ.
        scores: `(batch, V)` float, the score of each visual token that entered the stage, in its order there;
            -inf is padding where prompts differ.
        merge_map: `(batch, numbers)` int64 or None where the method never merges: entry *n* is the number of the
            merged token that visual token *n* went into at this stage, -1 if it went into none.
        raters: `(batch, n)` int64 or None for an encoder method: the tokens of the prompt whose attention gave the
            scores, as columns of the caller's `input_ids`; -1 stands for tokens that did not rate.
    """

    layer: int
    kept: Tensor
    scores: Tensor
    merge_map: Tensor | None = None
    raters: Tensor | None = None


@dataclass(frozen=True)
class Sparsifier(ABC):
    """A method with its hyper-parameters.

    Attributes:
        layers: where it acts, 0-based.
        budgets: tokens per stage, per image; empty where the method decides at run time.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    option_defaults: ClassVar[dict[str, Any]] = {}
    cost: ClassVar[str]
    looks_at_question: ClassVar[bool] = False

    layers: tuple[int, ...]
    budgets: tuple[int, ...]

    @property
    def encoder(self) -> EncoderSparsifier | None:
        """The part that reduces what enters the decoder, if there is one."""
        return None

    @property
    def decoder(self) -> DecoderSparsifier | None:
        """The part that acts between decoder layers, if there is one."""
        return None

    @classmethod
    @abstractmethod
    def resolve(
        cls,
        geometry: Geometry,
        budget: float | None,
        layers: Sequence[int] | None,
        budgets: Sequence[int] | None,
        options: dict[str, Any] | None,
    ) -> Sparsifier:
        """Builds the method; explicit layers and budgets win over the preset of `budget`.

        Raises:
            ValueError: for any setting that is out of range or contradicts another one.
        """

    @classmethod
    def check_budget(cls, budget: float | None, patches: int) -> int | None:
        """Returns `budget` as a token count; a ratio is one of the `patches` of an image, one token at least.

        Raises:
            ValueError: if it is neither None, nor an integer from 1 to `patches`, nor a float above 0, 1.0 at most.
        """
        if isinstance(budget, float) and 0 < budget <= 1:
            return max(1, round(budget * patches))
        if budget is not None and not is_count(budget, 1, patches):
            raise ValueError(
                f"sparse_budget={budget!r}: an integer from 1 to {patches}, the visual tokens of one image, is "
                "allowed, or a ratio above 0.0 and up to 1.0."
            )
        return budget  # type: ignore[return-value]

    @classmethod
    def check_options(cls, options: dict[str, Any] | None) -> dict[str, Any]:
        """Returns the method's options with defaults filled in.

        Raises:
            ValueError: for a name that it does not have, and a value that `check_option` refuses.
        """
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"sparse_options={options!r}: a dict of options is allowed.")
        for name in options or {}:
            if name not in cls.option_defaults:
                allowed = ", ".join(sorted(cls.option_defaults)) or "none"
                hint = nearest(name, list(cls.option_defaults))
                raise ValueError(f"sparse_options: {cls.name} has no option {name!r}{hint}; it has: {allowed}.")
        return {
            name: cls.check_option(name, (options or {}).get(name, default))
            for name, default in cls.option_defaults.items()
        }

    @classmethod
    def check_option(cls, name: str, value: Any) -> Any:
        """Returns the value of an option as the method's field of that name takes it; raises ValueError for others."""
        if name in CHOICES:
            return check_choice(name, value, CHOICES[name])
        return check_flag(name, value) if isinstance(cls.option_defaults[name], bool) else value


@dataclass(frozen=True)
class Question:
    """What is asked about some images, a row for each.

    Attributes:
        embeds: `(images, T, channels)` input embeddings of the text behind the last image of the prompt, or, where
            there is none, of all its text; valid: `(images, T)` bool, false for padding.
        ids: `(images, n)` int64, the question in the vocabulary of a CLIP text tower, -1 for padding; or None.
    """

    embeds: Tensor
    valid: Tensor
    ids: Tensor | None = None

    def rows(self, index: Tensor) -> Question:
        """The question of some of the images, or of some of the prompts for the images in them."""
        ids = None if self.ids is None else self.ids[index.to(self.ids.device)]
        return Question(self.embeds[index], self.valid[index], ids)


@dataclass(frozen=True)
class Images:
    """What an encoder method sees of some images.

    Attributes:
        hidden: `(images, 1 + patches, channels)` output of the method's encoder layer, CLS first.
        pixels: `(images, 3, height, width)` as the tower was given them.
        cls_attention: `(images, heads, patches)` float attention probability of CLS to every patch at that layer, and
            keys: `(images, heads, 1 + patches, head_dim)`, output of its key projection; None without
            `needs_attention`.
        projected: `(images, patches, channels)` output of the projector, for a method behind it.
        places: `(images, 1 + patches)` int64, the token of `hidden` that each token of the image went into, for a
            method inside the layers.
        question: for a method that looks at the question.
    """

    hidden: Tensor
    pixels: Tensor
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    projected: Tensor | None = None
    places: Tensor | None = None
    question: Question | None = None

    def rows(self, index: Tensor) -> Images:
        """Some of the images; an image may be there more than once."""
        return self._map(lambda x: x[index.to(x.device)])

    def to(self, device: torch.device) -> Images:
        return self._map(lambda x: x.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Images:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: function(x) for name, x in values.items() if torch.is_tensor(x)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Reduced:
    """What an encoder method makes of some images.

    Attributes:
        features: `(images, tokens, channels)`.
        numbers: `(images, tokens)` int64, what each token is: patch p, from `patches` on a token made anew, or -1 (one
            per image at most) for what stands for no patch: CLS.
        scores: `(images, patches)` float, for the record.
        merged: `(images, patches)` int64, which token made anew (from 0) each patch went into, -1 for none; or None.
        weights: `(images, tokens)` float, how many tokens each counts for in the decoder's attention; None for one.
    """

    features: Tensor
    numbers: Tensor
    scores: Tensor
    merged: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def kept(cls, features: Tensor, kept: Tensor, scores: Tensor) -> Reduced:
        """Of `(images, patches, channels)` the patches `(images, tokens)`, ascending, as they are."""
        return cls(features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1])), kept, scores)

    def selection(self, layer: int) -> Selection:
        """The stage, numbered as of one image."""
        patches = self.scores.shape[1]
        own = (self.numbers >= 0) & (self.numbers < patches)
        width = int(own.sum(-1).max())
        ordered = torch.where(own, self.numbers, patches).sort(dim=-1).values[:, :width]
        merge_map = None if self.merged is None else torch.where(self.merged >= 0, self.merged + patches, -1)
        return Selection(layer, torch.where(ordered < patches, ordered, -1), self.scores, merge_map)


class EncoderSparsifier(Sparsifier):
    """Reduces the visual tokens of every image on its own: a static number of them enters the decoder.

    Attributes:
        place: "tower", the method works on a layer's output and the projector sees what it leaves; "layers", likewise,
            and it is inside the layers too; or "projector": it works on projected features, of all patches.
        needs_attention: whether it reads `Images.cls_attention` or `Images.keys`.
    """

    kind: ClassVar[str] = "encoder"
    place: ClassVar[str] = "tower"
    needs_attention: ClassVar[bool] = False

    @property
    def encoder(self) -> EncoderSparsifier:
        return self

    @property
    def tokens(self) -> int:
        """Visual tokens per image that enter the decoder."""
        return self.budgets[-1]

    @property
    def new_tokens(self) -> int:
        """How many of them, at most, are made anew of several patches."""
        return 0

    @property
    def feature_layer(self) -> int:
        """The encoder layer after which the tower stops."""
        return self.layers[-1]

    @classmethod
    def resolve(
        cls,
        geometry: Geometry,
        budget: float | None,
        layers: Sequence[int] | None,
        budgets: Sequence[int] | None,
        options: dict[str, Any] | None,
    ) -> EncoderSparsifier:
        """For a method with `sparse_budgets=[tokens]`, and a field for every option."""
        chosen = cls.check_options(options)
        tokens = cls.check_budget(budget, geometry.patches)
        layer = cls.check_layer(geometry, layers)
        if budgets is None and tokens is None:
            raise ValueError(f"sparse_method={cls.name!r} needs sparse_budget (64, say) or sparse_budgets=[tokens].")
        counts = check_counts("sparse_budgets", [tokens] if budgets is None else budgets, 1, geometry.patches, 1)
        return cls((layer,), counts, **chosen)

    @property
    def weighs(self) -> bool:
        """Whether its tokens have `Reduced.weights`."""
        return False

    def flops(self, patches: int, width: int, channels: int) -> float:
        """Operations of the selection for one image, of the tower's `width` and the decoder's `channels`.

        Counted is what matrix products take, as far as it grows with the square of a size.
        """
        return 2.0 * (patches + 1) * width**2 if self.needs_attention else 0.0

    @classmethod
    def check_layer(cls, geometry: Geometry, layers: Sequence[int] | None) -> int:
        """The one layer of `sparse_layers`, by default the one that LLaVA takes its features from.

        Raises:
            ValueError: if there are several, or the tower has no such layer.
        """
        depth = geometry.encoder_layers
        given = [geometry.feature_layer] if layers is None else layers
        return check_counts("sparse_layers", given, -depth, depth - 1, 1)[0]

    @abstractmethod
    def reduce(self, images: Images) -> Reduced:
        """Chooses, or makes, the tokens of each image; of one image the same, whatever is beside it."""


@dataclass(frozen=True)
class RaterAttention:
    """What a decoder method sees of a pruning layer, for rows with equally many visual tokens.

    Attributes:
        probabilities: `(rows, heads, raters, V)` float32 attention of the raters to the visual tokens.
        raters: `(rows, raters)` bool, false for padding.
        rater_positions, visual_positions: `(rows, raters)`, `(rows, V)` int64 position ids.
        rotary: position ids `(rows, n)` -> float32 `(cos, sin)`, each `(rows, n, head_dim)`.
        numbers: `(rows, V)` int64, the visual tokens as `Selection` numbers them.
        fingerprints: `(rows,)` int64, the sum of the method's `fingerprints` over the images of the prompt.
    """

    probabilities: Tensor
    raters: Tensor
    rater_positions: Tensor
    visual_positions: Tensor
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]]
    numbers: Tensor | None = None
    fingerprints: Tensor | None = None


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
    looks_at_question: ClassVar[bool] = True
    before_layer: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    positions: str
    trim_cache: bool = False

    @property
    def decoder(self) -> DecoderSparsifier:
        return self

    @classmethod
    def resolve(
        cls,
        geometry: Geometry,
        budget: float | None,
        layers: Sequence[int] | None,
        budgets: Sequence[int] | None,
        options: dict[str, Any] | None,
    ) -> DecoderSparsifier:
        """For a method with a field for every option; see `preset_layers` and `preset_budgets`."""
        chosen = cls.check_options(options)
        tokens = cls.check_budget(budget, geometry.patches)
        preset = cls.preset_layers(geometry, tokens)
        stages = check_stages(geometry.decoder_layers, layers, preset, budgets, first=int(cls.before_layer))
        if budgets is None and tokens is None:
            raise ValueError(
                f"sparse_method={cls.name!r} needs sparse_budget (64, say) or sparse_budgets, tokens per layer."
            )
        if budgets is None:
            assert tokens is not None
            budgets = cls.preset_budgets(geometry, tokens, stages, layers is not None)
        counts = check_counts("sparse_budgets", budgets, cls.fewest, geometry.patches, len(stages))
        return cls(stages, counts, **chosen)

    @classmethod
    def preset_layers(cls, geometry: Geometry, budget: int | None) -> tuple[int, ...]:
        """The layers for `sparse_budget`, ascending."""
        raise NotImplementedError(f"{cls.__name__}: preset_layers, or a resolve of its own, is missing.")

    @classmethod
    def preset_budgets(cls, geometry: Geometry, budget: int, layers: tuple[int, ...], by_hand: bool) -> tuple[int, ...]:
        """The tokens per layer that `sparse_budget` stands for.

        Args:
            layers: of the preset, or given `by_hand`.
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

    def fingerprints(self, pixels: Tensor) -> Tensor | None:
        """`(images,)` int64 that identify the images `(images, 3, height, width)`; None where scores need none."""
        return None

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
        rows, visual = attention.visual_positions.shape
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
