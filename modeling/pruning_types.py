"""What goes into a method and what comes out of it: features of pictures, the question, visual tokens, the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that presets and checks depend on.

    Attributes:
        patches: of one item (a picture, for LLaVA-1.5); encoder_layers, decoder_layers: how many there are.
        feature_layer: the encoder layer whose output the model uses, -1 for the last.
        frames: of an item that is a video; of each, CLS enters the decoder beside its patches. None for a picture.
        frame: which of them a method inside the tower is asked about.
        tiles: that a picture is cut into, each of so many patches.
        packed: tokens of the picture in the decoder of the dense model, where they are not its patches: newlines too.
        dynamic: whether pictures are of any size, so that a number of tokens is one at most; `patches` are then of the
            one that presets are made for.
        has_cls: whether the tower has a token that stands for the whole picture.
    """

    patches: int
    encoder_layers: int
    decoder_layers: int = 0
    feature_layer: int = -2
    frames: int | None = None
    frame: int = 0
    tiles: int = 1
    packed: int | None = None
    dynamic: bool = False
    has_cls: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of the item that enter the decoder of the dense model."""
        if self.packed is not None:
            return self.packed
        return self.patches * self.tiles if self.frames is None else self.frames * (self.patches + 1)


@dataclass(frozen=True)
class Selection:
    """One reduction stage of one forward pass.

    Visual tokens are numbered over the original patch grid: 0-based, without CLS, image *i* of a prompt adding
    the patches of the images before it; merged tokens are numbered on from the prompt's total of patches. A method
    inside the tower's layers and one behind the projector are one stage: `kept` are patches that are left as they were;
    a token that the first has merged and the second kept is a merged token, and a patch has the score of the token that
    it was merged into. (Where a model feeds CLS to its decoder, `vision_feature_select_strategy="full"`, decoder
    methods count it as token 0 of its image. Of a video, CLS is token 0 of each frame, for all methods, and its patches
    follow: P patches a frame make 1 + P numbers. Of a picture in tiles, methods that choose tile by tile number on from
    tile to tile; others number what the dense model gives the decoder, in its order, newlines included.)

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


class TokenCounts(NamedTuple):
    """The visual tokens of some prompts, as tables count them.

    Attributes:
        entering: that enter the decoder; of the prompt with the most.
        layers: behind each decoder layer, mean over the layers, as the papers count; of the prompt with the most.
        samples: the same, mean over the prompts.
    """

    entering: float
    layers: float
    samples: float

    @classmethod
    def of(cls, visual_tokens: Tensor) -> TokenCounts:
        """Of an output's `visual_tokens`, `(prompts, 1 + layers)`, or those of several outputs below each other."""
        layers = visual_tokens[:, 1:].double().mean(1)
        return cls(float(visual_tokens[:, 0].max()), float(layers.max()), float(layers.mean()))


class _Rows:
    """A dataclass of tensors that have a row for each item."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Any:
        """The same with `change` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        changed = {
            name: change(x) if torch.is_tensor(x) else x.map(change)
            for name, x in values.items()
            if torch.is_tensor(x) or isinstance(x, _Rows)
        }
        return replace(self, **changed)  # type: ignore[type-var]

    def rows(self, index: Tensor) -> Any:
        """Some of the items, `(n,)` int64; an item may be there more than once."""
        return self.map(lambda x: x[index.to(x.device)])

    def to(self, device: torch.device, **kwargs: Any) -> Any:
        return self.map(lambda x: x.to(device, **kwargs))

    def split(self, sizes: Sequence[int] | None = None) -> list[Any]:
        """An entry for each item, or for so many at a time."""
        sizes = [1] * len(self.features) if sizes is None else sizes  # type: ignore[attr-defined]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.map(lambda x, i=i, n=n: x[i : i + n]) for i, n in zip(starts, sizes, strict=True)]  # type: ignore[misc]


@dataclass(frozen=True)
class Question(_Rows):
    """What is asked about some items, a row for each.

    Attributes:
        embeds: `(items, T, channels)` input embeddings of the text behind the last image of the prompt, or, where
            there is none, of all its text; valid: `(items, T)` bool, false for padding.
        ids: `(items, n)` int64, the question in the vocabulary of a CLIP text tower, -1 for padding; or None.
    """

    embeds: Tensor
    valid: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True)
class VisionFeatures(_Rows):
    """What an encoder method sees of some items of one size: pictures, tiles or frames.

    Attributes:
        features: `(items, N, channels)`, the patches as the method's encoder layer leaves them, without CLS; of a tower
            that is not ours, as the projector does. For a method inside the layers, the tokens they have left.
        grid: rows and columns of the patches.
        cls: `(items, channels)` the CLS token at that layer; None in a tower without one.
        saliency: `(items, heads, N)` float attention probability of CLS to every patch at that layer, and
            keys: `(items, heads, N, head_dim)`, output of its key projection; None without `needs_attention`. In a
            tower without CLS, `(items, 1, N)`, the mean over heads of all attention that a patch receives, and keys as
            they are compared with queries, rotated.
        projected: `(items, N, channels)` output of the projector, for a method behind it.
        sources: `(items, N)` int64, the token of `features` that each patch went into, for a method in the layers.
        before: for a method behind one in the layers, what that has made of the patches; `features` and `projected` are
            of its tokens then, and `grid` is `(1, N)`.
        fingerprints: `(items,)` int64 that identify the pictures, for a method that draws from them.
        question: for a method that looks at the question.
    """

    features: Tensor
    grid: tuple[int, int]
    cls: Tensor | None = None
    saliency: Tensor | None = None
    keys: Tensor | None = None
    projected: Tensor | None = None
    sources: Tensor | None = None
    fingerprints: Tensor | None = None
    question: Question | None = None
    before: VisualTokens | None = None

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1] if self.before is None else self.before.patches

    @property
    def token_sizes(self) -> Tensor | None:
        """`(items, N)` float, how many patches each token stands for; None for one."""
        if self.before is None:
            return None
        return self.before.token_sizes if self.before.token_sizes is not None else self.before.members

    def joined(self, frames: int) -> VisionFeatures:
        """Every `frames` items as one, without a grid and without a CLS of its own."""

        def whole(x: Tensor | None, place: int) -> Tensor | None:
            """Of `(items * frames, ...)`, with the tokens at dimension `place`, those of all frames in a row."""
            return None if x is None else x.unflatten(0, (-1, frames)).movedim(1, place).flatten(place, place + 1)

        return VisionFeatures(
            self.features.unflatten(0, (-1, frames)).flatten(1, 2),
            (1, frames * self.features.shape[1]),
            saliency=whole(self.saliency, 2),
            keys=whole(self.keys, 2),
            fingerprints=None if self.fingerprints is None else self.fingerprints.unflatten(0, (-1, frames)).sum(-1),
        )


@dataclass(frozen=True)
class VisualTokens(_Rows):
    """What a method makes of some items of one size.

    Attributes:
        features: `(items, k, channels)`.
        patch_index: `(items, k)` int64, what each token is: patch p, from N on a token made anew, or -1 (one per item
            at most) for what stands for no patch: CLS.
        scores: `(items, N)` float, for the record.
        merged: `(items, N)` int64, which token made anew (from 0) each patch went into, -1 for none; or None.
        token_sizes: `(items, k)` float, how many tokens each counts for in the decoder's attention; None for one.
        anchors: `(items, k)` int64, the patch at whose position each token stands where tokens keep their positions,
            ascending; None where `patch_index` says it.
    """

    features: Tensor
    patch_index: Tensor
    scores: Tensor
    merged: Tensor | None = None
    token_sizes: Tensor | None = None
    anchors: Tensor | None = None

    @classmethod
    def kept(cls, features: Tensor, kept: Tensor, scores: Tensor) -> VisualTokens:
        """Of `(items, N, channels)` the patches `(items, k)`, ascending, as they are."""
        return cls(features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1])), kept, scores)

    @property
    def patches(self) -> int:
        return self.scores.shape[1]

    @property
    def places(self) -> Tensor:
        """`(items, k)` int64, the patches at whose positions the tokens stand."""
        return self.patch_index if self.anchors is None else self.anchors

    @property
    def owners(self) -> Tensor:
        """`(items, N)` int64, which token each patch is, or went into; -1 for none."""
        patches, count = self.patches, self.patch_index.shape[1]
        tokens = torch.arange(count, device=self.patch_index.device).expand_as(self.patch_index)
        # The last place takes what stands for no patch.
        of = tokens.new_full((len(tokens), patches + count + 1), -1)
        of = of.scatter(1, self.patch_index % of.shape[1], tokens)
        own = torch.arange(patches, device=tokens.device).expand_as(self.scores)
        return of.gather(1, own if self.merged is None else torch.where(self.merged < 0, own, patches + self.merged))

    @property
    def members(self) -> Tensor:
        """`(items, k)` float, how many patches each token is, or was made of."""
        owners = self.owners
        sizes = self.scores.new_zeros(len(owners), self.patch_index.shape[1] + 1)
        return sizes.scatter_add(1, owners % sizes.shape[1], torch.ones_like(self.scores))[:, :-1]

    def behind(self, first: VisualTokens) -> VisualTokens:
        """The same tokens numbered by patches, where they were chosen from, or made of, what `first` made of these.

        A patch goes where the token goes that `first` made it part of: one that was merged twice, or whose merged token
        was kept, is in `merged`, as if that had been one step; its score is that of the token it was part of.
        """
        owners, goes = first.owners, self.owners
        there, count = owners >= 0, self.patch_index.shape[1]

        def of_patches(x: Tensor, none: Tensor) -> Tensor:
            """What there is of each of the tokens of `first`, `(items, tokens)`, for each patch."""
            return torch.where(there, x.gather(1, owners.clamp(min=0)), none)

        token = of_patches(goes, goes.new_tensor(-1))
        own = first.patch_index.gather(1, self.patch_index.clamp(0, first.patch_index.shape[1] - 1))
        # New are those that this method has made, and those of the other that stay.
        new = (self.patch_index >= self.patches) | (own >= first.patches)
        number = new.cumsum(-1) - 1
        is_new = (token >= 0) & new.gather(1, token.clamp(min=0))
        sizes = self.token_sizes
        if sizes is None and first.token_sizes is not None:
            sizes = first.token_sizes.new_zeros(len(new), count + 1)
            sizes = sizes.scatter_add(1, goes % (count + 1), first.token_sizes)[:, :-1]
        return VisualTokens(
            self.features,
            torch.where(new, first.patches + number, torch.where(self.patch_index < 0, -1, own)),
            of_patches(self.scores, self.scores.amin(1, keepdim=True)),
            torch.where(is_new, number.gather(1, token.clamp(min=0)), -1),
            sizes,
        )

    @classmethod
    def joined(cls, parts: Sequence[VisualTokens]) -> VisualTokens:
        """Several items, one entry each, as one: numbered on from part to part, what is made anew behind them all."""
        total, before = sum(part.patches for part in parts), 0
        made: Tensor | int = 0
        index, merged = [], []
        for part in parts:
            own, patches = part.patch_index, part.patches
            moved = torch.where(own < patches, own + before, own - patches + total + made)
            index.append(torch.where(own < 0, own, moved))
            if part.merged is not None:
                merged.append(torch.where(part.merged < 0, part.merged, part.merged + made))
            before += patches
            made = made + (own >= patches).sum()
        features, scores = (
            torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("features", "scores")
        )
        sizes = [part.token_sizes for part in parts if part.token_sizes is not None]
        return cls(
            features,
            torch.cat(index, dim=1),
            scores,
            torch.cat(merged, dim=1) if merged else None,
            torch.cat(sizes, dim=1) if sizes else None,
        )

    def with_cls(self, cls: Tensor, there: bool) -> VisualTokens:
        """The same of items in which CLS, `(items, channels)`, is a token too: number 0, the patches from 1 on.

        Args:
            there: whether it is the first token already; else it goes in front.
        """
        features, index, sizes = self.features, self.patch_index, self.token_sizes
        if not there:
            features = torch.cat([cls[:, None].to(features), features], dim=1)
            index = nn.functional.pad(index, (1, 0), value=-1)
            sizes = None if sizes is None else nn.functional.pad(sizes, (1, 0), value=1.0)
        merged = None if self.merged is None else nn.functional.pad(self.merged, (1, 0), value=-1)
        # It always stays, so that no score is above its own.
        scores = torch.cat([self.scores.amax(1, keepdim=True), self.scores], dim=1)
        return VisualTokens(features, index + 1, scores, merged, sizes)

    def selection(self, layer: int) -> Selection:
        """The stage, numbered as of one item."""
        patches = self.patches
        own = (self.patch_index >= 0) & (self.patch_index < patches)
        width = int(own.sum(-1).max())
        ordered = torch.where(own, self.patch_index, patches).sort(dim=-1).values[:, :width]
        merge_map = None if self.merged is None else torch.where(self.merged >= 0, self.merged + patches, -1)
        return Selection(layer, torch.where(ordered < patches, ordered, -1), self.scores, merge_map)


@dataclass(frozen=True)
class RaterAttention:
    """What a decoder method sees of a pruning layer, for rows with equally many visual tokens.

    Attributes:
        probabilities: `(rows, heads, raters, V)` float32 attention of the raters to the visual tokens.
        raters: `(rows, raters)` bool, false for padding.
        rater_positions, visual_positions: `(rows, raters)`, `(rows, V)` int64 position ids.
        rotary: position ids `(rows, n)` -> float32 `(cos, sin)`, each `(rows, n, head_dim)`.
        numbers: `(rows, V)` int64, the visual tokens as `Selection` numbers them.
        fingerprints: `(rows,)` int64, the sum of the fingerprints of the images of the prompt.
    """

    probabilities: Tensor
    raters: Tensor
    rater_positions: Tensor
    visual_positions: Tensor
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]]
    numbers: Tensor | None = None
    fingerprints: Tensor | None = None


def concatenated(parts: Sequence[Any]) -> Any:
    """Several `VisionFeatures` of one size as one; what one of them lacks must be lacking in all."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    names = [f.name for f in fields(first)]
    values = {name: [getattr(part, name) for part in parts] for name in names}
    joined = {name: torch.cat(x) for name, x in values.items() if torch.is_tensor(x[0])}
    return replace(first, **joined, **{name: concatenated(x) for name, x in values.items() if isinstance(x[0], _Rows)})
