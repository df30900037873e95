"""The way of a prompt through a pruned model, the same for all families: encode, select, place, decode, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_exporting

from .pruning_answer import decode_apart
from .pruning_base import BaseWeightsMixin
from .pruning_cache import CACHE, remember, remembered, the_cache
from .pruning_features import FeaturesMixin
from .pruning_inputs import (
    DecoderInputs,
    check_unpacked,
    newest_mask,
    place_features,
    question_of,
    rows_as_passed,
    translate,
    weigh,
)
from .pruning_items import ImageFeatures, Request
from .pruning_ops import rows_at
from .pruning_record import by_prompt, count_visual_tokens, numbers_by_prompt, stage_of_encoder
from .pruning_sequence import PADDING, PromptLayout, of_caller
from .pruning_stage import DecoderPruning
from .pruning_types import Selection

logger = logging.get_logger(__name__)

# transformers 5.24 keeps the whole output of the image encoder, older ones its features.
NAMES = [f.name for f in fields(LlavaModelOutputWithPast)]
IMAGES = next(name for name in NAMES if name in ("image_outputs", "image_hidden_states"))


@dataclass
class SparseModelOutput(LlavaModelOutputWithPast):
    """Adds to the stock output.

    Attributes:
        columns: with `as_passed=False`, `(batch, new_length)` int64, the input column of each row of
            `last_hidden_state`, -1 for merged tokens, -2 for padding; None where nothing was dropped and nothing is
            padding.
        selection: the stages, one `Selection` each, if they were asked for.
        visual_tokens: with them, `(batch, 1 + layers)` int64, the visual tokens of each prompt that enter the decoder,
            and that are left behind each of its layers; `TokenCounts.of` says what tables make of it.
    """

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None
    visual_tokens: Tensor | None = None


class PrunedModelMixin(BaseWeightsMixin, FeaturesMixin):
    """Modifications of a stock model without head: only the visual tokens that a method keeps reach the decoder.

    A family says how its pictures are encoded (`encode_images`), which arguments belong to that (`visual_arguments`),
    and how many tokens an image has; one that takes videos too has `encode_videos`: see `VisualItemsMixin`. With
    `sparse_method=None` the stock forward runs, where there is one (`has_stock`). A forward takes one snapshot of the
    method, which pictures encoded for it carry on: `set_sparsity`, called meanwhile, is for later ones.

    Attributes:
        as_passed: see `rows_asked`.
        fixed_layout: set it to true where every prompt has stock placeholders, as many pictures of one size in each:
            nothing is read from the prompts then, as `torch.compile(model, fullgraph=True)` needs it.
    """

    config: Any
    sparsifier: Any = None
    language_model: Any
    training: bool
    as_passed: bool | None = None
    fixed_layout: bool = False
    visual_arguments: ClassVar[tuple[str, ...]] = ()
    has_stock: ClassVar[bool] = True

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
        prompt_length: int | Tensor | None = None,
        as_passed: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SparseModelOutput:
        """Arguments as the stock class's, and

        Args:
            visual_mask: `(batch, length)` bool, which rows of `inputs_embeds` are image features of the dense model,
                all of each image. Needed for `inputs_embeds` without `pixel_values`.
            mm_encoder_outputs: `{"image": ...}`, what `get_image_features` gave, of this model or of a stock one.
            output_selection: whether to return the stages.
            prefill_chunk_size: tokens that the decoder takes at a time; None for all. Not with a decoder method.
            prompt_length: `(batch,)` int64, or one int: how many columns of each row, padding on the left included, are
                its prompt, which ends behind the last image; None for all. What follows, an answer that is scored or
                learnt, has no part in the choice of tokens: it does not rate, and is no question.
            as_passed: whether `last_hidden_state` has a row for each token as passed, or for those that are left, which
                `columns` names. A dropped token has the row in front, which predicts what follows. See `rows_asked`.
            position_ids: of the tokens as passed; where placeholders are dropped, each is less by those before it.
            cache, past_key_values: two names of one argument.

        Raises:
            ValueError: if placeholders and images do not match, and for what arguments or the method exclude.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        cache = the_cache(past_key_values, cache)
        encoded = {name: given for name, given in (mm_encoder_outputs or {}).items() if given is not None}
        snapshots = [x.snapshot[0] for x in encoded.values() if getattr(x, "snapshot", None) is not None]
        method = snapshots[0] if snapshots else self.sparsifier
        visual = {"pixel_values": pixel_values} | {k: kwargs.pop(k) for k in self.visual_arguments if k in kwargs}
        if method is None and self.has_stock and not remembered(cache) and prefill_chunk_size is None:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            given |= {"inputs_embeds": inputs_embeds, CACHE: cache}
            return self._forward_stock(given, visual, encoded, output_selection, kwargs)
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
        request = Request(
            method, input_ids, embeds, attention_mask, position_ids, cache, visual_mask, encoded, visual,
            output_selection, prefill_chunk_size, prompt_length,
        )  # fmt: skip
        images = self.select(request, self.encode(request))
        inputs = self.place(request, images)
        outputs = self.record(request, images, inputs, self.decode(request, images, inputs, kwargs))
        if self.rows_asked(as_passed, prompt_length) and outputs.columns is not None:
            rows = rows_as_passed(outputs.columns, embeds.shape[1]).to(outputs.last_hidden_state.device)
            states = rows_at(outputs.last_hidden_state, rows)
            outputs = replace(outputs, last_hidden_state=states, columns=None)  # type: ignore[call-arg]
        return outputs

    def rows_asked(self, as_passed: bool | None, prompt_length: Any) -> bool:
        """Whether outputs have a row for each token as passed: as the call says, else as the model's attribute does.

        None leaves it to the use: so it is in training, and where somebody says where prompts end, as labels do, for
        losses and log-probabilities outside the model are of the caller's columns. Set `model.model.as_passed = True`
        for other programs that expect the stock length, such as the evaluation of a loss of their own.
        """
        asked = self.as_passed if as_passed is None else as_passed
        return (self.training or prompt_length is not None) if asked is None else asked

    def _forward_stock(
        self, given: Any, visual: dict[str, Any], encoded: Any, output_selection: bool, kwargs: dict[str, Any]
    ) -> SparseModelOutput:
        known = {k: v for k, v in visual.items() if k != "question_ids"}
        encoded = {name: self.stock_features(x, name) for name, x in encoded.items()} or None
        stock = super().forward(**given, **known, mm_encoder_outputs=encoded, return_dict=True, **kwargs)  # type: ignore[misc]
        shared = {name: stock[name] for name in NAMES if name in stock}
        if not output_selection:
            return SparseModelOutput(**shared)
        marks = [self.placeholders(given["input_ids"], given["inputs_embeds"], name) for name in self.modalities]
        entering = torch.stack(marks).any(0).sum(-1).tolist()
        return SparseModelOutput(**shared, selection=(), visual_tokens=self.counted(entering, ()))

    def counted(self, entering: Sequence[int], stages: Sequence[Selection]) -> Tensor:
        """See `SparseModelOutput.visual_tokens`."""
        return count_visual_tokens(entering, stages, self.config.text_config.num_hidden_layers)

    def embed(self, input_ids: Tensor) -> Tensor:
        """The embeddings of ids, `(batch, length, channels)`."""
        embeds: Tensor = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
        return embeds

    def stock_features(self, given: Any, modality: str) -> Any:
        """Features of a dense model in the form that the stock forward takes."""
        return given

    def encode(self, request: Request) -> dict[str, ImageFeatures]:
        """First: pictures become features, by the tower, or as the caller has them; for each modality there is."""
        arguments, found = dict(request.visual), {}
        pixels = {name: arguments.pop(source, None) for name, (source, _) in self.modalities.items()}
        for modality, (source, _) in self.modalities.items():
            given = request.encoded.get(modality)
            if pixels[modality] is not None:
                if given is not None or request.visual_mask is not None:
                    raise ValueError(
                        f"{source}, mm_encoder_outputs, and a visual_mask, which marks image features inside "
                        "inputs_embeds, exclude each other: pass one of them."
                    )
                encode = getattr(self, f"encode_{modality}s")
                found[modality] = encode(request.method, pixels[modality], **arguments)
            elif given is not None:
                images, asked = self.adopt(given, request.method), arguments.get("question_ids")
                found[modality] = images if asked is None else replace(images, question_ids=asked)
        return found or self.encode_merged(request)

    def select(self, request: Request, seen: dict[str, ImageFeatures]) -> ImageFeatures | None:
        """Second: finds where the images are in the prompts; a method that looks at the question chooses now."""
        embeds, marked = request.embeds, request.visual_mask
        mask = newest_mask(request.attention_mask, embeds.shape[1])
        if not seen:
            if marked is not None:
                request.layout = PromptLayout.of(marked, mask, request.prompt_length)
                items = self.merged_sizes(request.layout.visual, request.layout.visual_counts)
                request.images = [len(prompt) for prompt in items]
                request.sizes = [size for prompt in items for size in prompt]
            return None
        if marked is not None and len(seen) > 1:
            raise ValueError("visual_mask does not tell images from videos: pass input_ids and no visual_mask.")
        marks = [
            self.placeholders(request.input_ids, embeds, name) if marked is None else marked for name in self.modalities
        ]
        counts = self.fixed_counts(request, seen) if self.fixed_layout or is_torchdynamo_exporting() else None
        request.layout = layout = PromptLayout.of(torch.stack(marks).any(0), mask, request.prompt_length, counts)
        asks = request.method is not None and request.method.looks_at_question
        if self.training and request.prompt_length is None and asks:
            logger.warning_once(
                f"{request.method.name} looks at the question, and in this pass nothing says where prompts end, so "
                "that answers in them choose the tokens that predict them: pass labels, or, where the loss is not the "
                "model's own, prompt_length, (batch,) int64, which a data collator can add."
            )
        which = None
        if marked is None and len(marks) > 1:
            which = by_prompt(torch.stack(marks).int().argmax(0)[layout.visual].tolist(), layout.visual_counts)
        images = self.in_order(request, seen, which)
        if not images.vision:
            return images
        question = question_of(embeds, layout, request.images, None)
        if images.question_ids is not None:
            rows = torch.tensor([row for row, n in enumerate(request.images) for _ in range(n)])
            question = replace(question, ids=images.question_ids[rows.to(images.question_ids.device)])
        return self.reduced(request.method, images, question)

    def place(self, request: Request, images: ImageFeatures | None) -> DecoderInputs:
        """Third: tokens take the place of placeholders; those that none is left for go."""
        inputs = DecoderInputs(request.embeds, request.attention_mask, self.positions(request))
        layout, cache = request.layout, request.cache
        if images is not None and layout is not None:
            features = images.features
            if request.method is not None:
                check_unpacked(request.method, inputs, cache, [len(x) for x in features] != request.written)
            places = images.places if self.gathers_positions else None
            inputs, request.layout = place_features(inputs, layout, features, request.written, cache, places)
        held = remembered(cache).get(0)
        if held is not None and inputs.shortened is None:
            inputs = translate(inputs, held, cache)
        sizes = None
        if images is not None and images.tokens and images.tokens[0].token_sizes is not None:
            sizes = torch.cat([x.token_sizes[0] for x in images.tokens])  # type: ignore[index]
        if sizes is not None or (held is not None and held.bias is not None):
            inputs = weigh(inputs, request.layout, sizes, cache, self.config.text_config)
        return inputs

    def positions(self, request: Request) -> Tensor | None:
        """Position ids of the tokens as passed; None where the decoder counts."""
        return request.position_ids

    def decode(
        self, request: Request, images: ImageFeatures | None, inputs: DecoderInputs, kwargs: dict[str, Any]
    ) -> Any:
        """Fourth: runs the decoder, at once or in chunks."""
        layout, method = request.layout, request.decoder
        if method is not None and layout is not None and request.decoder_prunes:
            if request.prefill_chunk_size is not None:
                raise ValueError(
                    f"prefill_chunk_size: {method.name} prunes a prompt as a whole between layers; None is allowed, or "
                    "an encoder method."
                )
            numbers, drawn = None, None if images is None else images.fingerprints
            if images is not None and images.tokens and request.encoder is not None:
                made = [[e.new_tokens for e in self.encoders_for(request.method, n)] for n in request.sizes]
                numbers = numbers_by_prompt(images.tokens, request.images, made)
            if drawn is not None:
                drawn = torch.stack([part.sum() for part in drawn.split(request.images)])
            pruning = DecoderPruning(
                method, layout, request.images, numbers, drawn, request.output_selection, self.prompt_budgets(request),
                self.gathers_positions,
            )  # fmt: skip
            if method.trim_cache and any(layout.answer_counts):
                return decode_apart(self.language_model, pruning, inputs, request.cache, kwargs)
            kwargs = kwargs | {"pruning": pruning}
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
            positions = None if positions is None else positions[..., start:end]
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
            # A trimmed layer 0 already says what it holds, of what the decoder was given.
            trimmed = request.decoder_prunes and request.decoder.trim_cache
            held = replace(remembered(cache)[0], length=inputs.shortened.length) if trimmed else inputs.shortened
            remember(cache, 0, held)
        stages: tuple[Selection, ...] = getattr(outputs, "selection", None) or ()
        columns = getattr(outputs, "columns", None)
        if inputs.columns is not None:
            # The decoder counts in what it was given.
            columns = inputs.columns if columns is None else of_caller(columns, inputs.columns)
            stages = tuple(replace(stage, raters=of_caller(stage.raters, inputs.columns)) for stage in stages)  # type: ignore[arg-type]
        elif columns is None and request.layout is not None and request.layout.valid is not None:
            valid = request.layout.valid
            every = torch.arange(valid.shape[1], device=valid.device)
            columns = torch.where(valid, every, PADDING)
        if request.output_selection and images is not None and images.tokens and request.encoder is not None:
            vision = self.config.vision_config
            layer = request.encoder.feature_layer % (getattr(vision, "depth", None) or vision.num_hidden_layers)
            stages = (stage_of_encoder(layer, images.tokens, request.images), *stages)
        counts = None
        if request.output_selection:
            entering = [0] * len(request.embeds) if request.layout is None else request.layout.visual_counts
            counts = self.counted(entering, stages)
        seen: Any = images
        if images is not None and IMAGES == "image_hidden_states":
            seen = torch.cat(images.features) if images.features else None
        return SparseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            columns=columns,
            selection=stages if request.output_selection else None,
            visual_tokens=counts,
            **{CACHE: cache, IMAGES: seen},
        )
