"""What prompts show: images and videos, encoded; of what size each is, and in what order they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.import_utils import is_torchdynamo_exporting

from .pruning_inputs import images_per_prompt
from .pruning_record import by_prompt
from .pruning_sequence import PromptLayout
from .pruning_types import VisionFeatures, VisualTokens


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Pictures, encoded: what `get_image_features` gives and `mm_encoder_outputs={"image": ...}` takes; or videos.

    Attributes:
        pooler_output: `(tokens, channels)` of each picture, as they enter the decoder; of a method that has yet to
            choose, by the question, all patches.
        dense: of each picture, the tokens that the dense model has.
        tokens: what a method has made of each picture; None where it has yet to choose, or chooses in the decoder.
        vision: what it has yet to choose from, for each picture: one item, or its tiles.
        grids: of each picture that is cut into tiles, the rows and columns of those behind the whole one; None for what
            is not, and where nothing is.
        fingerprints: `(pictures,)` int64, of a method that draws; question_ids: `(prompts, n)`, see `Question`.
        snapshot: the method that they were encoded for, which goes on with them.
        deepstack_features: what some of the decoder's layers are given besides: of each layer a list, of each picture
            `(patches, channels)`; or None.
    """

    dense: list[int] | None = None
    tokens: list[VisualTokens] | None = None
    vision: list[VisionFeatures] | None = None
    grids: list[Any] | None = None
    fingerprints: Tensor | None = None
    question_ids: Tensor | None = None
    snapshot: tuple[Any, ...] | None = None
    deepstack_features: list[list[Tensor]] | None = None

    @property
    def features(self) -> list[Tensor]:
        """As `pooler_output`, as a list."""
        return list(self.pooler_output)

    @property
    def sizes(self) -> list[Any]:
        """Of each picture what its budget depends on: tokens in the dense model, and the grid of its tiles, if any."""
        dense = self.dense or [len(image) for image in self.features]
        grids = self.grids or [None] * len(dense)
        return [count if grid is None else (count, grid) for count, grid in zip(dense, grids, strict=True)]

    @property
    def places(self) -> list[Tensor]:
        """Of each picture, at which of its patches its tokens stand, `(tokens,)` int64 each."""
        if self.tokens is None:
            return [torch.arange(len(image), device=image.device) for image in self.features]
        return [image.places[0] for image in self.tokens]

    def take(self, pictures: Sequence[int], prompts: Sequence[int] | None = None) -> ImageFeatures:
        """Some of the pictures; one may be there more than once.

        Args:
            prompts: whose `question_ids` they are asked with; as they are by default.
        """
        asked, drawn, stacked = self.question_ids, self.fingerprints, self.deepstack_features

        def some(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in pictures]

        chosen: Any = replace(
            self,
            dense=some(self.dense),
            tokens=some(self.tokens),
            vision=some(self.vision),
            grids=some(self.grids),
            fingerprints=None if drawn is None else drawn[list(pictures)],
            question_ids=asked if asked is None or prompts is None else asked[list(prompts)],
            deepstack_features=None if stacked is None else [[layer[i] for i in pictures] for layer in stacked],
        )
        chosen.last_hidden_state, chosen.pooler_output = None, [self.features[i] for i in pictures]
        return chosen

    @classmethod
    def joined(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Pictures and videos, one behind the other."""
        if len(parts) == 1:
            return parts[0]

        def all_of(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else [entry for value in values for entry in value]

        grids = [grid for part in parts for grid in part.grids or [None] * len(part.features)]
        drawn = [part.fingerprints for part in parts if part.fingerprints is not None]
        stacked = [part.deepstack_features for part in parts if part.deepstack_features is not None]
        return replace(
            parts[0],
            **{name: all_of(name) for name in ("pooler_output", "dense", "tokens", "vision")},
            grids=grids if any(grid is not None for grid in grids) else None,
            fingerprints=torch.cat(drawn) if drawn else None,
            question_ids=next((part.question_ids for part in parts if part.question_ids is not None), None),
            deepstack_features=[[x for part in layer for x in part] for layer in zip(*stacked, strict=True)] or None,
        )


@dataclass
class Request:
    """One forward pass: what the caller gave, and what the phases find.

    Attributes:
        method: the method of this pass, a snapshot; visual: the family's arguments that say what is to be seen.
        layout, images, written, sizes: found by `select`: where visual tokens are, how many images each prompt has, and
            of each image how many placeholders and its size, see `ImageFeatures`. Of features that the caller has
            merged there are no `written`.
        modalities: of each image, "image" or "video".
    """

    method: Any
    input_ids: Tensor | None
    embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: Cache | None
    visual_mask: Tensor | None
    encoded: Any
    visual: dict[str, Any]
    output_selection: bool = False
    prefill_chunk_size: int | None = None
    prompt_length: int | Tensor | None = None
    layout: PromptLayout | None = None
    images: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)

    @property
    def encoder(self) -> Any:
        return None if self.method is None else self.method.encoder

    @property
    def decoder(self) -> Any:
        return None if self.method is None else self.method.decoder

    @property
    def decoder_prunes(self) -> bool:
        return self.decoder is not None and self.layout is not None and any(self.layout.visual_counts)


class VisualItemsMixin:
    """What a family says of its items, an image or a video each, and what follows from that.

    Attributes:
        modalities: "image" and, of a family that takes them, "video": the argument that holds their pixels, and the
            configuration's field for their placeholder.
        gathers_positions: whether a token keeps the position of its place in the picture (M-RoPE), and none is
            renumbered where others go. Placeholders are then those of the dense model.
    """

    config: Any
    modalities: ClassVar[dict[str, tuple[str, str]]] = {"image": ("pixel_values", "image_token_id")}
    gathers_positions: ClassVar[bool] = False

    @property
    def dense_tokens_per_image(self) -> int | None:
        """Placeholders that a stock processor writes for an image; None where that depends on its size."""
        return None

    def sizes_of(self, size: Any) -> dict[str, Any]:
        """The sizes, as of `Geometry`, of an item of a size as of `ImageFeatures.sizes`; none for the usual item."""
        return {} if size == self.dense_tokens_per_image else {"patches": size}

    def method_for(self, method: Any, size: Any) -> Any:
        """The method for an item of a size as of `ImageFeatures.sizes`: budgets count, and ratios are, of it."""
        return method.of(**self.sizes_of(size))

    def encoders_for(self, method: Any, size: Any) -> list[Any]:
        """What reduces such an item: one encoder method, or one for each tile, or each frame inside the tower."""
        own, sizes = self.method_for(method, size), self.sizes_of(size)
        if "tiles" in sizes:
            return [own.encoder] * (sizes["tiles"] if own.encoder.unit == "tile" else 1)
        frames = sizes.get("frames")
        if frames is None or own.encoder.place == "projector":
            return [own.encoder]
        return [own.of(frame=frame).encoder for frame in range(frames)]

    def fixed_counts(self, request: Request, seen: dict[str, ImageFeatures]) -> list[int]:
        """Placeholders of each prompt in a graph of fixed shapes, which cannot read them: as stock processors write.

        Raises:
            ValueError: for methods whose shapes follow from what is read, and prompts of which none knows the pictures.
        """
        method, batch = request.method, len(request.embeds)
        way = "torch.export" if is_torchdynamo_exporting() else "fixed_layout"
        if method is not None and (method.decoder is not None or method.looks_at_question):
            raise ValueError(
                f"{way}: what {method.name} makes of a prompt depends on where its question is, which a graph "
                "of fixed shapes cannot read. Export an encoder method that looks at no question (visionzip, "
                "divprune), or compile with torch.compile."
            )
        usual: Any = self.dense_tokens_per_image
        items = [size for x in seen.values() for size in x.dense or [usual] * len(x.features)]
        if len(set(items)) != 1 or len(items) % batch:
            raise ValueError(
                f"{way}: {len(items)} pictures in {batch} prompts; as many in each, of one size, are allowed."
            )
        return [sum(items) // batch] * batch

    def prompt_budgets(self, request: Request) -> list[tuple[int, ...]] | None:
        """The decoder method's budgets for each prompt, where its items are of another size than the usual one."""
        usual = request.decoder
        own = {size: self.method_for(request.method, size).decoder for size in request.sizes}
        if all(method.budgets == usual.budgets for method in own.values()):
            return None
        # All items of a batch go through the same stages: of one that would have others, no more stay than of the rest.
        budgets = {
            size: x.budgets
            if x.layers == usual.layers
            else tuple(min(count, tokens_of(size)) for count in usual.budgets)
            for size, x in own.items()
        }
        prompts = by_prompt([budgets[size] for size in request.sizes], request.images)
        return [tuple(map(sum, zip(*prompt, strict=True))) for prompt in prompts]

    def merged_sizes(self, mask: Tensor, counts: Sequence[int]) -> list[list[int]]:
        """The tokens of each image of each prompt, whose features the caller has merged.

        Args:
            mask: `(batch, length)` bool, where they are: each run is an image, where images have no size in common.
            counts: how many there are in each prompt.
        """
        size = self.dense_tokens_per_image
        if size is None:
            return [[len(list(run)) for there, run in groupby(row) if there] for row in mask.tolist()]
        return [[size] * max(1, count // size) for count in counts]

    def kept_tokens(self, method: Any, images: ImageFeatures) -> list[int]:
        """Placeholders of each image that a processor writes which leaves out those that no token is left for."""
        if self.gathers_positions:
            return list(images.dense or ())
        if not images.vision:
            return [len(image) for image in images.features]
        return [sum(encoder.tokens for encoder in self.encoders_for(method, size)) for size in images.sizes]

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor, modality: str = "image") -> Tensor:
        """`(batch, length)` bool: where the placeholders of images, or of videos, are."""
        token = getattr(self.config, self.modalities[modality][1])
        if input_ids is not None:
            return input_ids == token
        embedding = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))  # type: ignore[attr-defined]
        return (inputs_embeds == embedding).all(-1)

    def in_order(
        self, request: Request, seen: dict[str, ImageFeatures], which: Sequence[Sequence[int]] | None
    ) -> ImageFeatures:
        """The images and videos as the prompts have them.

        Args:
            which: of the placeholders of each prompt, the modality by its number; None where there is but one.

        Raises:
            ValueError: where placeholders and images do not match.
        """
        names: list[str] = list(seen) if which is None else list(self.modalities)
        layout: Any = request.layout
        written: dict[str, list[int]] = {}
        prompts: list[int] = []
        for index, name in enumerate(names):
            images = seen.get(name)
            kept = [] if images is None else self.kept_tokens(request.method, images)
            dense = [] if images is None else list(map(tokens_of, images.sizes))
            counts = layout.visual_counts if which is None else [list(x).count(index) for x in which]
            prompts, written[name] = images_per_prompt(counts, kept, dense, name)
        joined = ImageFeatures.joined([seen[name] for name in names if name in seen])
        request.images, request.written = prompts, written[names[0]]
        request.modalities = names[:1] * len(joined.features)
        if which is not None:
            places = _in_prompts(which, [written[name] for name in names])
            order = [place for prompt in places for place in prompt]
            starts = [sum(len(written[name]) for name in names[:i]) for i in range(len(names))]
            joined = joined.take([starts[modality] + item for modality, item in order])
            request.images = [len(prompt) for prompt in places]
            request.written = [written[names[modality]][item] for modality, item in order]
            request.modalities = [names[modality] for modality, _ in order]
        request.sizes = joined.sizes
        return joined


def tokens_of(size: Any) -> int:
    """The tokens in the dense model of an item of a size as of `ImageFeatures.sizes`."""
    return size if isinstance(size, int) else int(size[0])


def _in_prompts(which: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Of each prompt the images and videos, as (modality, number among those of it).

    Args:
        which: modality of each placeholder of each prompt; written: placeholders of each item of each modality.

    Raises:
        ValueError: where the placeholders of one are not side by side.
    """
    following, prompts = [0] * len(written), []
    for kinds in which:
        column, items = 0, []
        while column < len(kinds):
            kind = kinds[column]
            count = written[kind][following[kind]]
            if set(kinds[column : column + count]) != {kind}:
                raise ValueError("Placeholders of a video stand among those of an image: each needs its own in a row.")
            items.append((kind, following[kind]))
            following[kind] += 1
            column += count
        prompts.append(items)
    return prompts
