"""What a pruning method is: two abstract kinds, the record of what it kept, and the checks all methods share.

A method is a frozen dataclass of hyper-parameters; it holds nothing of a request. It is built from the five `sparse_*`
fields of a configuration by `Sparsifier.resolve`, which is also where every invalid combination is refused.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


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


def nearest(name: object, allowed: Sequence[str]) -> str:
    """A hint that names the closest valid word, or an empty string: `(did you mean 'visionzip'?)`."""
    close = difflib.get_close_matches(str(name).lower(), list(allowed), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_count(value: object, low: int, high: int) -> bool:
    """Whether `value` is an integer (a bool is none) within `low..high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_counts(field: str, values: object, low: int, high: int, length: int | None = None) -> tuple[int, ...]:
    """Returns `values` as a tuple of integers in `low..high`.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    size = "a list of" if length is None else f"a list of {length}"
    entries = list(values) if isinstance(values, list | tuple) else None
    if (
        not entries
        or (length is not None and len(entries) != length)
        or not all(is_count(v, low, high) for v in entries)
    ):
        raise ValueError(f"{field}={values!r}: {size} integers from {low} to {high} is allowed.")
    return tuple(entries)


def check_choice(option: str, value: object, allowed: Sequence[str]) -> str:
    """Returns the `value` of an option if it is one of the `allowed` words; raises ValueError otherwise."""
    if value not in allowed:
        raise ValueError(f"sparse_options: {option}={value!r}{nearest(value, allowed)}; allowed: {', '.join(allowed)}.")
    return str(value)


def check_flag(option: str, value: object) -> bool:
    """Returns the `value` of an option if it is true or false; raises ValueError otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"sparse_options: {option}={value!r}: true or false is allowed.")
    return value


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

    layers: tuple[int, ...]
    budgets: tuple[int, ...]

    @classmethod
    @abstractmethod
    def resolve(
        cls,
        geometry: Geometry,
        budget: int | None,
        layers: Sequence[int] | None,
        budgets: Sequence[int] | None,
        options: dict[str, Any] | None,
    ) -> Sparsifier:
        """Builds the method; explicit layers and budgets win over the preset of `budget`.

        Raises:
            ValueError: for any setting that is out of range or contradicts another one.
        """

    @classmethod
    def check_budget(cls, budget: int | None, patches: int) -> int | None:
        """Returns `budget` if it is None or a token count from 1 to `patches`; raises ValueError otherwise."""
        if budget is not None and not is_count(budget, 1, patches):
            raise ValueError(
                f"sparse_budget={budget!r}: an integer from 1 to {patches}, the visual tokens of one image, is allowed."
            )
        return budget

    @classmethod
    def check_options(cls, options: dict[str, Any] | None) -> dict[str, Any]:
        """Returns the method's options with defaults filled in; raises ValueError for a name it does not have."""
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"sparse_options={options!r}: a dict of options is allowed.")
        for name in options or {}:
            if name not in cls.option_defaults:
                allowed = ", ".join(sorted(cls.option_defaults)) or "none"
                hint = nearest(name, list(cls.option_defaults))
                raise ValueError(f"sparse_options: {cls.name} has no option {name!r}{hint}; it has: {allowed}.")
        return {**cls.option_defaults, **(options or {})}


class EncoderSparsifier(Sparsifier):
    """Reduces the tokens of the vision tower: a static number of tokens leaves it, so all after it stays stock."""

    kind: ClassVar[str] = "encoder"

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Visual tokens per image that enter the decoder."""

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
    def reduce(
        self, hidden: Tensor, cls_attention: Tensor, keys: Tensor, pixels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Reduces the output of encoder layer `layers[0]`.

        Args:
            hidden: `(images, 1 + patches, channels)` output of the layer, CLS first.
            cls_attention: `(images, heads, patches)` float attention probability of CLS to every patch.
            keys: `(images, heads, 1 + patches, head_dim)` output of the layer's key projection.
            pixels: `(images, 3, height, width)` as the tower was given them.

        Returns:
            features `(images, tokens, channels)`, and for the record: kept `(images, k)` patches, scores
            `(images, patches)`, merged `(images, patches)` (index of the merged token of each patch, -1 for none)
            or None.
        """


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
        positions: "compact", renumbered after every pruning, or "original".
        trim_cache: whether, once a prompt is through, the cache of the layers up to the last pruning layer loses what
            was pruned too: answers then cost less memory, and see less than in the papers.
    """

    kind: ClassVar[str] = "decoder"
    positions: str
    trim_cache: bool = False

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

    @abstractmethod
    def counts(self, stage: int, images: int, attention: RaterAttention) -> list[int]:
        """How many tokens each row keeps at stage `stage`: a list of `rows` integers from 0 to V."""

    def merge(self, layer: int, dropped: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merges dropped tokens into new ones; None where the method just drops.

        Args:
            layer: the pruning layer.
            dropped: `(rows, n, channels)` layer output of the dropped tokens, in descending order of score.

        Returns:
            merged `(rows, c, channels)` and assignment `(rows, n)` int64 (merged token of each, -1 for none).
        """
        return None


def exact(x: Tensor) -> torch.autocast:
    """A context that keeps autocast away from scores on the device of `x`: they are float32 whatever is around them."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def to_float(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cluster_mean(x: Tensor, assignment: Tensor, clusters: int, epsilon: float) -> Tensor:
    """Unweighted means of clusters, as a product of matrices (deterministic on every device).

    Args:
        x: `(rows, n, channels)`; assignment: `(rows, n)` int64 cluster of each vector, negative for none.

    Returns:
        `(rows, clusters, channels)`: sums over members divided by (members + epsilon), or by 1 where that is less
        than 1 (an empty cluster is zero).
    """
    member = (assignment[:, None, :] == torch.arange(clusters, device=x.device)[None, :, None]).to(x.dtype)
    size = (member.sum(-1, keepdim=True) + epsilon).clamp(min=1)
    return (member @ x) / size
