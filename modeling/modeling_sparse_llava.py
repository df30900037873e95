"""LLaVA whose visual tokens are pruned, in everything transformers does with a LLaVA."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, LlavaForConditionalGeneration, LlavaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
)
from transformers.utils.generic import can_return_tuple

from .configuration_sparse_llava import SparseLlavaConfig, build_sparsifier
from .generation import PrunedGenerationMixin
from .modeling_sparse_clip import SparseCLIPVisionModel, SparseCLIPVisionOutput
from .modeling_sparse_llama import SPARSE_DECODERS
from .placeholders import DecoderInputs, images_per_prompt, insert_features, newest_mask, question_of, translate, weigh
from .pruned_cache import CACHE, remember, remembered, the_cache
from .sparsifier import EncoderSparsifier, Images, Question, Reduced, Selection, Sparsifier
from .stages import numbers_by_prompt, stage_by_prompt
from .tensors import exact
from .token_layout import PADDING, PromptLayout

IGNORED_LABEL = -100
# transformers 5.24 keeps the whole output of the image encoder, older ones its features.
IMAGES = next(
    name for name in ("image_outputs", "image_hidden_states") if name in LlavaModelOutputWithPast.__dataclass_fields__
)


def register_weight_names() -> None:
    """Lets transformers rename the weights of published LLaVA checkpoints for the classes here; idempotent."""
    for sparse, stock in {
        "sparse_llava": "llava",
        "SparseLlavaModel": "LlavaModel",
        "SparseCLIPVisionModel": "CLIPVisionModel",
    }.items():
        register_checkpoint_conversion_mapping(sparse, get_checkpoint_conversion_mapping(stock), overwrite=True)


register_weight_names()


@dataclass
class SparseLlavaModelOutput(LlavaModelOutputWithPast):
    """Adds to the stock output.

    Attributes:
        columns: `(batch, new_length)` int64, the input column of each row of `last_hidden_state`, -1 for merged
            tokens, -2 for padding; None where nothing was dropped.
        selection: the stages, one `Selection` each, if they were asked for.
    """

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None


@dataclass
class SparseLlavaOutput(LlavaCausalLMOutputWithPast):
    """Adds to the stock output; see `SparseLlavaModelOutput`. `logits` has `new_length` rows."""

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None


class SparseLlavaModel(LlavaModel):
    """LLaVA without language-model head, pruned.

    Modifications: vision tower and decoder are the sparse classes; placeholders that no visual token is left for are
    dropped from the inputs. With `sparse_method=None` it runs the stock forward.
    """

    config_class = SparseLlavaConfig
    config: SparseLlavaConfig

    def __init__(self, config: SparseLlavaConfig) -> None:
        # Skips LlavaModel.__init__, which would build the stock parts first.
        super(LlavaModel, self).__init__(config)
        self.sparsifier: Sparsifier | None = build_sparsifier(config)
        if config.vision_config.model_type == "clip_vision_model":
            self.vision_tower = SparseCLIPVisionModel(config.vision_config)
        else:
            self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        decoder = SPARSE_DECODERS.get(config.text_config.model_type)
        self.language_model = (
            AutoModel.from_config(config.text_config) if decoder is None else decoder(config.text_config)
        )
        self.post_init()

    @property
    def patches_per_image(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @property
    def dense_tokens_per_image(self) -> int:
        """Placeholders that a stock processor writes for an image."""
        return self.patches_per_image + (self.config.vision_feature_select_strategy == "full")

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question: Question | None = None,
        output_selection: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes and projects images.

        Args:
            question: for an encoder method that looks at it.

        Returns:
            stock output with `pooler_output`, a list of `(tokens, channels)` per image; an encoder method's features
            replace those of `vision_feature_layer`.

        Raises:
            ValueError: if the method needs a question and there is none.
        """
        sparsifier = self.sparsifier
        if sparsifier is None or not isinstance(self.vision_tower, SparseCLIPVisionModel):
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
                **kwargs,
            )
        encoder = sparsifier.encoder
        if encoder is not None and encoder.place == "projector":
            images = self.encode_images(pixel_values, **kwargs)
            reduced = self.reduce_images(images, question)
            layer = encoder.feature_layer % len(self.vision_tower.encoder.layers)
            return SparseCLIPVisionOutput(
                last_hidden_state=images.hidden[:, 1:],
                pooler_output=list(reduced.features),
                numbers=reduced.numbers,
                weights=reduced.weights,
                selection=(reduced.selection(layer),) if output_selection else None,
            )
        if encoder is not None:
            outputs = self.vision_tower(
                pixel_values, sparsifier=encoder, output_selection=output_selection, return_dict=True, **kwargs
            )
            features = outputs.last_hidden_state
        else:
            chosen = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
            count = len(self.vision_tower.encoder.layers) + 1
            depths = [layer % count for layer in ([chosen] if isinstance(chosen, int) else chosen)]
            outputs = self.vision_tower(pixel_values, depths=depths, return_dict=True, **kwargs)
            strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
            features = outputs.last_hidden_state[:, 1 if strategy == "default" else 0 :]
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return outputs

    def encode_images(self, pixel_values: Tensor, **kwargs: Any) -> Images:
        """What a method behind the projector sees of `(images, 3, height, width)` pixels, before any question."""
        assert self.sparsifier is not None
        images = self.vision_tower(pixel_values, sparsifier=self.sparsifier.encoder, return_dict=True, **kwargs).images
        projected = self.multi_modal_projector(images.hidden[:, 1:])
        return replace(images.to(projected.device), projected=projected)

    def reduce_images(self, images: Images, question: Question | None = None) -> Reduced:
        """The tokens that a method behind the projector leaves, given what is asked about each image.

        Raises:
            ValueError: if the method needs a question and there is none.
        """
        encoder = None if self.sparsifier is None else self.sparsifier.encoder
        assert encoder is not None
        assert images.projected is not None
        if encoder.looks_at_question and question is None:
            raise ValueError(
                f"{encoder.name} looks at the question: call the model with the whole prompt, not "
                "get_image_features with pixels alone."
            )
        with exact(images.projected):
            return encoder.reduce(replace(images, question=question))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        visual_mask: Tensor | None = None,
        fingerprints: Tensor | None = None,
        numbers: Tensor | None = None,
        weights: Tensor | None = None,
        question_ids: Tensor | None = None,
        output_selection: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SparseLlavaModelOutput:
        """As LLaVA's.

        Args:
            visual_mask: `(batch, length)` bool, which rows of `inputs_embeds` are visual tokens, for embeddings that
                hold image features already; not together with `pixel_values`.
            fingerprints: with `visual_mask`, `(batch,)` int64: the sum of the method's `fingerprints` of each prompt's
                images. Without them, a method that draws from the images draws the same for all prompts.
            numbers: with `visual_mask` and a composition, `(batch, V)` int64: what the visual tokens are, as
                `get_image_features` numbers them.
            weights: with `visual_mask` and a method that weighs its tokens, `(batch, V)`: as `get_image_features` has
                them; of padding, any.
            question_ids: `(batch, n)` int64, the question in CLIP's vocabulary, -1 for padding, for a method that
                reads it with a CLIP text tower.
            output_selection: whether to return the stages.
            position_ids: where placeholders are left over and dropped, positions are counted anew from the mask.

        Raises:
            ValueError: if placeholders and images do not match, naming the counts that would.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        features_from: dict[str, Any] = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        cache = the_cache(past_key_values, cache)
        held = remembered(cache)
        if self.sparsifier is None and not held:
            stock = super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **{CACHE: cache},
                **features_from,
                **kwargs,
            )
            return SparseLlavaModelOutput(**stock, selection=() if output_selection else None)
        self._check_inputs(pixel_values, visual_mask, weights, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if (image_sizes := kwargs.pop("image_sizes", None)) is not None:
            features_from["image_sizes"] = image_sizes

        inputs = DecoderInputs(inputs_embeds, attention_mask, position_ids)
        layout, features, encoded = None, None, None
        encoder, decoder = (
            (None, None) if self.sparsifier is None else (self.sparsifier.encoder, self.sparsifier.decoder)
        )
        stages: tuple[Selection, ...] = ()
        if pixel_values is not None:
            layout = PromptLayout.of(
                self.placeholders(input_ids, inputs_embeds), newest_mask(attention_mask, inputs_embeds.shape[1])
            )
            if encoder is not None and encoder.looks_at_question:
                images = images_per_prompt(layout, len(pixel_values), encoder.tokens, self.dense_tokens_per_image)
                features_from["question"] = question_of(inputs_embeds, layout, images, question_ids)
            encoded = self.get_image_features(
                pixel_values,
                **({"output_selection": True} if output_selection else {}),
                **features_from,
                return_dict=True,
            )
            features = _stacked(encoded.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            dense_tokens = features.shape[1] if encoder is None else self.dense_tokens_per_image
            inputs, layout, images = insert_features(inputs, layout, features, dense_tokens, cache)
            if decoder is not None:
                drawn = decoder.fingerprints(pixel_values)
                fingerprints = None if drawn is None else torch.stack([part.sum() for part in drawn.split(images)])
            if encoder is not None and decoder is not None:
                numbers = numbers_by_prompt(encoded.numbers, images, self.patches_per_image, encoder.new_tokens)
            weights = getattr(encoded, "weights", None)
            stages = tuple(
                stage_by_prompt(stage, images, self.patches_per_image)
                for stage in getattr(encoded, "selection", None) or ()
            )
        elif visual_mask is not None:
            layout = PromptLayout.of(visual_mask, newest_mask(attention_mask, inputs_embeds.shape[1]))
        if 0 in held and inputs.shortened is None:
            inputs = translate(inputs, held[0], cache)
        if weights is not None or (0 in held and held[0].bias is not None):
            inputs = weigh(inputs, layout, weights, cache, self.config.text_config)

        decoder_arguments: dict[str, Any] = {}
        if decoder is not None and layout is not None and any(layout.visual_counts):
            entering = self.dense_tokens_per_image if encoder is None else encoder.tokens
            decoder_arguments = {
                "layout": layout,
                "tokens_per_image": entering if features is None else features.shape[1],
                "numbers": None
                if numbers is None or encoder is None
                else (numbers, self.patches_per_image + encoder.new_tokens + 1),
                "sparsifier": decoder,
                "fingerprints": fingerprints,
                "output_selection": output_selection,
            }
        outputs = self.language_model(
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            inputs_embeds=inputs.embeds,
            **{CACHE: cache},
            **decoder_arguments,
            **kwargs,
        )
        if inputs.shortened is not None and getattr(outputs, CACHE) is not None:
            remember(getattr(outputs, CACHE), 0, inputs.shortened)
        pruned, columns = getattr(outputs, "selection", None) or (), getattr(outputs, "columns", None)
        if inputs.columns is not None:
            # The decoder counts in what it was given.
            columns = inputs.columns if columns is None else _of_caller(columns, inputs.columns)
            pruned = tuple(replace(stage, raters=_of_caller(stage.raters, inputs.columns)) for stage in pruned)
        return SparseLlavaModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
            **_image_output(encoded),
            columns=columns,
            selection=stages + pruned if output_selection else None,
        )

    def _check_inputs(
        self, pixel_values: Tensor | None, visual_mask: Tensor | None, weights: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        if kwargs.pop("mm_encoder_outputs", None):
            raise ValueError("mm_encoder_outputs: pass pixel_values instead; a pruned model encodes images itself.")
        if visual_mask is not None and pixel_values is not None:
            raise ValueError("visual_mask marks image features inside inputs_embeds: do not pass pixel_values too.")
        if visual_mask is not None and weights is None and isinstance(self.sparsifier, EncoderSparsifier):
            raise ValueError(f"visual_mask: {self.sparsifier.name} prunes in the encoder; pass pixel_values instead.")

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """`(batch, length)` bool: where the image placeholders are."""
        token = self.config.image_token_id
        if input_ids is not None:
            return input_ids == token
        assert inputs_embeds is not None
        embedding = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == embedding).all(-1)


def _image_output(encoded: BaseModelOutputWithPooling | None) -> dict[str, Any]:
    """The field of the stock output that holds the features of all images."""
    if encoded is None or IMAGES == "image_outputs":
        return {IMAGES: encoded}
    return {IMAGES: torch.cat(list(encoded.pooler_output))}


def _of_caller(columns: Tensor, known: Tensor) -> Tensor:
    """Columns `(batch, n)` of the decoder's input as the caller's, which are `known`; negative ones stay."""
    columns = columns.to(known.device)
    return torch.where(columns < 0, columns, known.gather(1, columns.clamp(min=0)))


def _stacked(features: Sequence[Tensor]) -> Tensor:
    """Features of all images, `(images, tokens, channels)`."""
    if len({len(image) for image in features}) > 1:
        raise ValueError("The images have different numbers of visual tokens: pruning needs the same number for each.")
    return torch.stack(list(features))


class SparseLlavaForConditionalGeneration(PrunedGenerationMixin, LlavaForConditionalGeneration):
    """LLaVA, pruned: the class that users load.

    Modifications: the model is `SparseLlavaModel`; labels follow the tokens that are left; generation keeps counting in
    the tokens that the caller passed.
    """

    config_class = SparseLlavaConfig
    config: SparseLlavaConfig

    def __init__(self, config: SparseLlavaConfig) -> None:
        # Skips LlavaForConditionalGeneration.__init__, which would build the stock model first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = SparseLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_sparsity(
        self,
        method: str | None = None,
        budget: float | Any = None,
        *,
        layers: Any = None,
        budgets: Any = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Switches the method without touching the weights; `set_sparsity(None)` makes the model dense.

        Args: the configuration's fields `sparse_method`, `sparse_budget`, `sparse_layers`, `sparse_budgets`,
            `sparse_options`.

        Raises:
            ValueError: for an invalid combination; the model stays as it was.
        """
        trial = copy.copy(self.config)
        given = (method, budget, _as_list(layers), _as_list(budgets), options)
        for config in (trial, self.config):
            for name, value in zip(
                ("sparse_method", "sparse_budget", "sparse_layers", "sparse_budgets", "sparse_options"),
                given,
                strict=True,
            ):
                setattr(config, name, value)
            config.expand_sparsity()
        self.model.sparsifier = build_sparsifier(self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        visual_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        output_selection: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SparseLlavaOutput:
        """As LLaVA's; see `SparseLlavaModel.forward` for `visual_mask`, `question_ids` and `output_selection`.

        Args:
            labels: `(batch, length)` over the tokens as passed, placeholders included.
            logits_to_keep: counts from the end of what is left; a tensor indexes what is left.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            visual_mask=visual_mask,
            question_ids=question_ids,
            output_selection=output_selection,
            **{CACHE: the_cache(past_key_values, cache)},
            **kwargs,
        )
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
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return SparseLlavaOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: getattr(outputs, name) for name in (CACHE, IMAGES)},
            columns=outputs.columns,
            selection=outputs.selection,
        )


def _as_list(values: Any) -> Any:
    return [_as_list(value) for value in values] if isinstance(values, tuple | list) else values
