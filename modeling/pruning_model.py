"""The way of a prompt through a pruned model, the same for all families: encode, select, place, decode, record."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_sparse_llava import build_method
from .pruning_cache import CACHE, remember, remembered, the_cache
from .pruning_inputs import (
    DecoderInputs,
    check_unpacked,
    images_per_prompt,
    newest_mask,
    place_features,
    question_of,
    translate,
    weigh,
)
from .pruning_ops import autocast_disabled
from .pruning_record import numbers_by_prompt, stage_of_encoder
from .pruning_sequence import PADDING, PromptLayout
from .pruning_settings import Sparsity, as_lists
from .pruning_stage import DecoderPruning
from .pruning_types import Question, Selection, VisionFeatures, VisualTokens, concatenated

IGNORED_LABEL = -100
# transformers 5.24 keeps the whole output of the image encoder, older ones its features.
IMAGES = next(f.name for f in fields(LlavaModelOutputWithPast) if f.name in ("image_outputs", "image_hidden_states"))


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Pictures, encoded: what `get_image_features` gives and `mm_encoder_outputs={"image": ...}` takes.

    Attributes:
        pooler_output: `(tokens, channels)` of each picture, as they enter the decoder; of a method that has yet to
            choose, by the question, all patches.
        dense: of each picture, the tokens that the dense model has.
        tokens: what a method has made of each picture; None where it has yet to choose, or chooses in the decoder.
        vision: what it has yet to choose from, for all pictures at once or for each.
        fingerprints: `(pictures,)` int64, of a method that draws; question_ids: `(prompts, n)`, see `Question`.
        snapshot: the method that they were encoded for, which goes on with them.
    """

    dense: list[int] | None = None
    tokens: list[VisualTokens] | None = None
    vision: list[VisionFeatures] | None = None
    fingerprints: Tensor | None = None
    question_ids: Tensor | None = None
    snapshot: tuple[Any, ...] | None = None

    @property
    def features(self) -> list[Tensor]:
        """As `pooler_output`, as a list."""
        return list(self.pooler_output)

    def kept(self, method: Any) -> list[int]:
        """Tokens of each picture that enter the decoder."""
        return [method.encoder.tokens if self.vision else len(image) for image in self.features]

    def take(self, pictures: Sequence[int], prompts: Sequence[int] | None = None) -> ImageFeatures:
        """Some of the pictures; one may be there more than once.

        Args:
            prompts: whose `question_ids` they are asked with; as they are by default.
        """
        index = torch.tensor(pictures, dtype=torch.int64)
        vision = self.vision
        if vision is not None:
            whole = len(vision) == 1 and len(vision[0].features) == len(self.features)
            vision = [vision[0].rows(index)] if whole else [vision[i] for i in pictures]
        asked = self.question_ids
        chosen: Any = replace(
            self,
            dense=None if self.dense is None else [self.dense[i] for i in pictures],
            tokens=None if self.tokens is None else [self.tokens[i] for i in pictures],
            vision=vision,
            fingerprints=None if self.fingerprints is None else self.fingerprints[index.to(self.fingerprints.device)],
            question_ids=asked if asked is None or prompts is None else asked[list(prompts)],
        )
        chosen.last_hidden_state, chosen.pooler_output = None, [self.features[i] for i in pictures]
        return chosen


@dataclass
class SparseModelOutput(LlavaModelOutputWithPast):
    """Adds to the stock output.

    Attributes:
        columns: `(batch, new_length)` int64, the input column of each row of `last_hidden_state`, -1 for merged
            tokens, -2 for padding; None where nothing was dropped and nothing is padding.
        selection: the stages, one `Selection` each, if they were asked for.
    """

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None


@dataclass
class SparseCausalLMOutput(LlavaCausalLMOutputWithPast):
    """Adds to the stock output; see `SparseModelOutput`. `logits` has `new_length` rows."""

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None


@dataclass
class Request:
    """One forward pass: what the caller gave, and what the phases find.

    Attributes:
        method: the method of this pass, a snapshot; visual: the family's arguments that say what is to be seen.
        layout, images, written: found by `select`: where visual tokens are, how many images each prompt has, and how
            many placeholders each image. Of features that the caller has merged, `images` alone.
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
    layout: PromptLayout | None = None
    images: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    @property
    def encoder(self) -> Any:
        return None if self.method is None else self.method.encoder

    @property
    def decoder(self) -> Any:
        return None if self.method is None else self.method.decoder


class PrunedModelMixin:
    """Modifications of a stock model without head: only the visual tokens that a method keeps reach the decoder.

    A family says how its pictures are encoded (`encode_images`), which arguments belong to that (`visual_arguments`),
    and how many tokens an image has (`dense_tokens_per_image`). With `sparse_method=None` the stock forward runs. A
    forward takes one snapshot of the method, which pictures encoded for it carry on: `set_sparsity`, called meanwhile,
    is for later ones.
    """

    config: Any
    sparsifier: Any = None
    language_model: Any
    visual_arguments: ClassVar[tuple[str, ...]] = ()

    @property
    def dense_tokens_per_image(self) -> int:
        """Placeholders that a stock processor writes for an image."""
        raise NotImplementedError

    def encode_images(self, method: Any, pixel_values: Tensor, **arguments: Any) -> ImageFeatures:
        """What stands for pictures, as far as it does not depend on the question.

        Args:
            method: or None for the dense model; pixel_values: as the stock class's; arguments: the family's
                `visual_arguments`.
        """
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        visual_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_selection: bool = False,
        prefill_chunk_size: int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SparseModelOutput:
        """Arguments as the stock class's, and

        Args:
            visual_mask: `(batch, length)` bool, which rows of `inputs_embeds` are image features of the dense model,
                all of each image; not together with `pixel_values`. Needed for `inputs_embeds` without `pixel_values`.
            mm_encoder_outputs: `{"image": ...}`, what `get_image_features` gave, of this model or of a stock one, in
                place of `pixel_values`.
            output_selection: whether to return the stages.
            prefill_chunk_size: tokens that the decoder takes at a time; None for all. Not with a decoder method.
            position_ids: of the tokens as passed; where placeholders are dropped, each is less by those before it.
            cache, past_key_values: two names of one argument.

        Raises:
            ValueError: if placeholders and images do not match, naming the counts that would; for arguments that
                contradict each other; and for what the method cannot be used with.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        cache = the_cache(past_key_values, cache)
        encoded = (mm_encoder_outputs or {}).get("image")
        carried = getattr(encoded, "snapshot", None)
        method = self.sparsifier if carried is None else carried[0]
        visual = {"pixel_values": pixel_values} | {k: kwargs.pop(k) for k in self.visual_arguments if k in kwargs}
        if method is None and not remembered(cache) and prefill_chunk_size is None:
            given: dict[str, Any] = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
            }
            known = {k: v for k, v in visual.items() if k != "question_ids"}
            given |= {"inputs_embeds": inputs_embeds, "mm_encoder_outputs": mm_encoder_outputs, CACHE: cache}
            stock = super().forward(**given, **known, return_dict=True, **kwargs)  # type: ignore[misc]
            return SparseModelOutput(**stock, selection=() if output_selection else None)
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[attr-defined]
        request = Request(
            method, input_ids, embeds, attention_mask, position_ids, cache, visual_mask, encoded, visual,
            output_selection, prefill_chunk_size,
        )  # fmt: skip
        images = self.select(request, self.encode(request))
        inputs = self.place(request, images)
        outputs = self.decode(request, images, inputs, kwargs)
        return self.record(request, images, inputs, outputs)

    def encode(self, request: Request) -> ImageFeatures | None:
        """First: pictures become features, by the tower, or as the caller has them; None where there are none."""
        if request.visual["pixel_values"] is not None:
            if request.encoded is not None or request.visual_mask is not None:
                raise ValueError(
                    "pixel_values, mm_encoder_outputs, and a visual_mask, which marks image features inside "
                    "inputs_embeds, exclude each other: pass one of them."
                )
            return self.encode_images(request.method, **request.visual)
        if request.encoded is not None:
            images = self.adopt(request.encoded, request.method)
            asked = request.visual.get("question_ids")
            return images if asked is None else replace(images, question_ids=asked)
        held = request.cache is not None and int(request.cache.get_seq_length()) > 0
        if request.visual_mask is None and request.input_ids is None and request.method is not None and not held:
            raise ValueError(
                "inputs_embeds may hold image features, and nothing tells them from text: pass visual_mask, "
                "(batch, length) bool, true for image features; all false for text alone. Or pass pixel_values."
            )
        encoder = request.encoder
        if request.visual_mask is None or encoder is None:
            return None
        if encoder.place != "projector":
            raise ValueError(f"visual_mask: {encoder.name} prunes in the encoder; pass pixel_values instead.")
        mask, size = request.visual_mask.bool(), self.dense_tokens_per_image
        merged = request.embeds[mask.to(request.embeds.device)]
        if len(merged) % size:
            raise ValueError(f"visual_mask marks {len(merged)} image features; a multiple of {size} is allowed.")
        features = list(merged.split(size)) if len(merged) else []
        return self.adopt(BaseModelOutputWithPooling(pooler_output=features), request.method)

    def adopt(self, given: Any, method: Any) -> ImageFeatures:
        """Features that the caller has, of this model's `get_image_features` or of another's.

        Raises:
            ValueError: for those of a dense model, if the method works before the projector.
        """
        if isinstance(given, ImageFeatures):
            return given
        features = list(given.pooler_output)
        encoder = None if method is None else method.encoder
        dense = [len(image) for image in features]
        if encoder is None:
            return ImageFeatures(pooler_output=features, dense=dense)
        if encoder.place == "projector":
            vision = [VisionFeatures(x[None], self.grid_of(len(x)), projected=x[None]) for x in features]
            return self.reduced(method, ImageFeatures(pooler_output=features, dense=dense, vision=vision))
        raise ValueError(
            f"mm_encoder_outputs: {encoder.name} works in the vision tower, and these are features of all patches "
            "behind it: pass pixel_values, or what this model's get_image_features gives for them."
        )

    def grid_of(self, patches: int) -> tuple[int, int]:
        """Rows and columns of so many patches, of an image of which nothing else is known."""
        side = int(patches**0.5)
        return (side, side) if side * side == patches else (1, patches)

    def reduced(self, method: Any, images: ImageFeatures, question: Question | None = None) -> ImageFeatures:
        """The images with the tokens that a method behind the projector leaves; as they are without its question."""
        encoder = method.encoder
        if not images.features or not images.vision or (encoder.looks_at_question and question is None):
            return images
        if all(len(x) < encoder.tokens for x in images.features):
            raise ValueError(f"{encoder.name} keeps {encoder.tokens} tokens of an image; these have fewer.")
        vision = images.vision
        if len({(x.patches, x.grid) for x in vision}) == 1:
            vision = [concatenated(vision)]
        tokens: list[VisualTokens] = []
        for group in vision:
            first = len(tokens)
            rows = torch.arange(first, first + len(group.features))
            asked = None if question is None else question.rows(rows).to(group.features.device)
            with autocast_disabled(group.features):
                tokens += encoder.reduce(replace(group, question=asked)).split()
        chosen: Any = replace(images, tokens=tokens, vision=None)
        chosen.pooler_output = [x.features[0] for x in tokens]
        return chosen

    def select(self, request: Request, images: ImageFeatures | None) -> ImageFeatures | None:
        """Second: finds where the images are in the prompts; a method that looks at the question chooses now."""
        embeds, size = request.embeds, self.dense_tokens_per_image
        mask = newest_mask(request.attention_mask, embeds.shape[1])
        if images is None:
            if request.visual_mask is not None:
                request.layout = PromptLayout.of(request.visual_mask, mask)
                request.images = [max(1, count // size) for count in request.layout.visual_counts]
            return None
        marked = request.visual_mask
        layout = PromptLayout.of(self.placeholders(request.input_ids, embeds) if marked is None else marked, mask)
        kept = images.kept(request.method)
        dense = images.dense or [size] * len(kept)
        request.layout = layout
        request.images, request.written = images_per_prompt(layout.visual_counts, kept, dense)
        if not images.vision:
            return images
        question = question_of(embeds, layout, request.images, None)
        if images.question_ids is not None:
            rows = torch.tensor([row for row, n in enumerate(request.images) for _ in range(n)])
            question = replace(question, ids=images.question_ids[rows.to(images.question_ids.device)])
        return self.reduced(request.method, images, question)

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """`(batch, length)` bool: where the image placeholders are."""
        token = self.config.image_token_id
        if input_ids is not None:
            return input_ids == token
        embedding = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))  # type: ignore[attr-defined]
        return (inputs_embeds == embedding).all(-1)

    def place(self, request: Request, images: ImageFeatures | None) -> DecoderInputs:
        """Third: tokens take the place of placeholders; those that none is left for go."""
        inputs = DecoderInputs(request.embeds, request.attention_mask, request.position_ids)
        layout, cache = request.layout, request.cache
        if images is not None and layout is not None:
            features = images.features
            if request.method is not None:
                check_unpacked(request.method, inputs, cache, [len(x) for x in features] != request.written)
            inputs, request.layout = place_features(inputs, layout, features, request.written, cache)
        held = remembered(cache).get(0)
        if held is not None and inputs.shortened is None:
            inputs = translate(inputs, held, cache)
        sizes = None
        if images is not None and images.tokens and images.tokens[0].token_sizes is not None:
            sizes = torch.cat([x.token_sizes[0] for x in images.tokens])  # type: ignore[index]
        if sizes is not None or (held is not None and held.bias is not None):
            inputs = weigh(inputs, request.layout, sizes, cache, self.config.text_config)
        return inputs

    def decode(
        self, request: Request, images: ImageFeatures | None, inputs: DecoderInputs, kwargs: dict[str, Any]
    ) -> Any:
        """Fourth: runs the decoder, at once or in chunks."""
        layout, method = request.layout, request.decoder
        if method is not None and layout is not None and any(layout.visual_counts):
            if request.prefill_chunk_size is not None:
                raise ValueError(
                    f"prefill_chunk_size: {method.name} prunes a prompt as a whole between layers; None is allowed, or "
                    "an encoder method."
                )
            numbers, drawn = None, None if images is None else images.fingerprints
            if images is not None and images.tokens and request.encoder is not None:
                numbers = numbers_by_prompt(images.tokens, request.images, request.encoder.new_tokens)
            if drawn is not None:
                drawn = torch.stack([part.sum() for part in drawn.split(request.images)])
            kwargs = kwargs | {
                "pruning": DecoderPruning(method, layout, request.images, numbers, drawn, request.output_selection)
            }
        length = inputs.embeds.shape[1]
        size = length if request.prefill_chunk_size is None else max(1, request.prefill_chunk_size)
        if size >= length:
            return self._decode_chunk(inputs, request.cache, 0, length, kwargs)
        if request.cache is None:
            raise ValueError("prefill_chunk_size needs a cache.")
        parts = [
            self._decode_chunk(inputs, request.cache, start, min(start + size, length), kwargs)
            for start in range(0, length, size)
        ]
        parts[-1].last_hidden_state = torch.cat([part.last_hidden_state for part in parts], dim=1)
        return parts[-1]

    def _decode_chunk(self, inputs: DecoderInputs, cache: Any, start: int, end: int, kwargs: dict[str, Any]) -> Any:
        """Runs the decoder on the columns from `start` to `end`, which stand behind all before them."""
        mask, length = inputs.attention_mask, inputs.embeds.shape[1]
        positions = inputs.position_ids
        if end - start < length:
            if mask is not None and mask.dim() == 4:
                held = int(cache.get_mask_sizes(end - start, 0)[0])
                mask = mask[:, :, start:end, :held]
            elif mask is not None:
                mask = mask[:, : mask.shape[1] - length + end]
            positions = None if positions is None else positions[:, start:end]
        return self.language_model(
            inputs_embeds=inputs.embeds[:, start:end],
            attention_mask=mask,
            position_ids=positions,
            **{CACHE: cache},
            **kwargs,
        )

    def record(
        self, request: Request, images: ImageFeatures | None, inputs: DecoderInputs, outputs: Any
    ) -> SparseModelOutput:
        """Fifth: the cache is told what it holds, and the output what became of the caller's columns."""
        cache = getattr(outputs, CACHE)
        if inputs.shortened is not None and cache is not None:
            remember(cache, 0, inputs.shortened)
        stages: tuple[Selection, ...] = getattr(outputs, "selection", None) or ()
        columns = getattr(outputs, "columns", None)
        if inputs.columns is not None:
            # The decoder counts in what it was given.
            columns = inputs.columns if columns is None else _of_caller(columns, inputs.columns)
            stages = tuple(replace(stage, raters=_of_caller(stage.raters, inputs.columns)) for stage in stages)  # type: ignore[arg-type]
        elif columns is None and request.layout is not None and request.layout.valid is not None:
            valid = request.layout.valid
            every = torch.arange(valid.shape[1], device=valid.device)
            columns = torch.where(valid, every, PADDING)
        if request.output_selection and images is not None and images.tokens and request.encoder is not None:
            layer = request.encoder.feature_layer % self.config.vision_config.num_hidden_layers
            stages = (stage_of_encoder(layer, images.tokens, request.images), *stages)
        seen: Any = images
        if images is not None and IMAGES == "image_hidden_states":
            seen = torch.cat(images.features) if images.features else None
        return SparseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            columns=columns,
            selection=stages if request.output_selection else None,
            **{CACHE: cache, IMAGES: seen},
        )


def _of_caller(columns: Tensor, known: Tensor) -> Tensor:
    """Columns `(batch, n)` of the decoder's input as the caller's, which are `known`; negative ones stay."""
    columns = columns.to(known.device)
    return torch.where(columns < 0, columns, known.gather(1, columns.clamp(min=0)))


class PrunedHeadMixin:
    """Modifications of a stock model with its head: labels follow the tokens that are left, methods can be switched."""

    config: Any
    model: Any
    lm_head: nn.Module
    loss_function: Any

    def set_sparsity(
        self,
        method: str | None = None,
        budget: Any = None,
        *,
        layers: Any = None,
        budgets: Any = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Switches the method without touching the weights; `set_sparsity(None)` makes the model dense.

        A forward pass or a generation that another thread has begun goes on as it began.

        Args:
            method, budget, layers, budgets, options: the configuration's fields `sparse_method`, `sparse_budget`,
                `sparse_layers`, `sparse_budgets`, `sparse_options`.

        Raises:
            ValueError: for an invalid combination; the model stays as it was.
        """
        settings = Sparsity(method, budget, as_lists(layers), as_lists(budgets), options)
        resolved = build_method(self.config, settings)
        changed = copy.copy(self.config)
        changed.take_sparsity(settings)
        self.config.__dict__.update(changed.__dict__)
        self.model.sparsifier = resolved

    def pruned_forward(
        self, inputs: dict[str, Any], labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> Any:
        """The model, its logits and, with `labels` `(batch, length)` over the tokens as passed, the loss."""
        outputs = self.model(**inputs, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            if outputs.columns is not None:
                columns = outputs.columns.to(labels.device)
                # A row of padding predicts nothing: the token behind it has no predecessor.
                follows_padding = nn.functional.pad(columns[:, :-1] == PADDING, (1, 0))
                labels = labels.gather(1, columns.clamp(min=0))
                labels = labels.masked_fill((columns < 0) | follows_padding, IGNORED_LABEL)
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return SparseCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            columns=outputs.columns,
            selection=outputs.selection,
            **{name: getattr(outputs, name) for name in (CACHE, IMAGES)},
        )
