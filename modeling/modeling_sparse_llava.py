"""LLaVA whose visual tokens are pruned, in everything transformers does with a LLaVA."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
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
from .modeling_sparse_clip import SparseCLIPVisionModel
from .modeling_sparse_llama import SPARSE_DECODERS
from .placeholders import DecoderInputs, insert_features, newest_mask, translate
from .pruned_cache import remember, remembered
from .sparsifier import DecoderSparsifier, EncoderSparsifier, Selection, Sparsifier
from .stages import stage_by_prompt
from .token_layout import PADDING, PromptLayout

IGNORED_LABEL = -100


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
        output_selection: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes and projects images.

        Returns:
            stock output with `pooler_output`, a list of `(tokens, channels)` per image; an encoder method's features
            replace those of `vision_feature_layer`.
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
        if isinstance(sparsifier, EncoderSparsifier):
            outputs = self.vision_tower(
                pixel_values, sparsifier=sparsifier, output_selection=output_selection, return_dict=True, **kwargs
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
        output_selection: bool = False,
        **kwargs: Any,
    ) -> SparseLlavaModelOutput:
        """As LLaVA's.

        Args:
            visual_mask: `(batch, length)` bool, which rows of `inputs_embeds` are visual tokens, for embeddings that
                hold image features already; not together with `pixel_values`.
            fingerprints: with `visual_mask`, `(batch,)` int64: the sum of the method's `fingerprints` of each prompt's
                images. Without them, a method that draws from the images draws the same for all prompts.
            output_selection: whether to return the stages.
            position_ids: where placeholders are left over and dropped, positions are counted anew from the mask.

        Raises:
            ValueError: if placeholders and images do not match, naming the counts that would.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        features_from = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        held = remembered(past_key_values)
        if self.sparsifier is None and not held:
            stock = super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **features_from,
                **kwargs,
            )
            return SparseLlavaModelOutput(**stock, selection=() if output_selection else None)
        self._check_inputs(pixel_values, visual_mask, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if (image_sizes := kwargs.pop("image_sizes", None)) is not None:
            features_from["image_sizes"] = image_sizes

        inputs = DecoderInputs(inputs_embeds, attention_mask, position_ids)
        layout, features = None, None
        stages: tuple[Selection, ...] = ()
        if pixel_values is not None:
            outputs = self.get_image_features(
                pixel_values,
                **({"output_selection": True} if output_selection else {}),
                **features_from,
                return_dict=True,
            )
            features = _stacked(outputs.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            layout = PromptLayout.of(
                self.placeholders(input_ids, inputs_embeds), newest_mask(attention_mask, inputs_embeds.shape[1])
            )
            is_encoder = isinstance(self.sparsifier, EncoderSparsifier)
            dense_tokens = self.dense_tokens_per_image if is_encoder else features.shape[1]
            inputs, layout, images = insert_features(inputs, layout, features, dense_tokens, past_key_values)
            if isinstance(self.sparsifier, DecoderSparsifier):
                drawn = self.sparsifier.fingerprints(pixel_values)
                fingerprints = None if drawn is None else torch.stack([part.sum() for part in drawn.split(images)])
            stages = tuple(
                stage_by_prompt(stage, images, self.patches_per_image)
                for stage in getattr(outputs, "selection", None) or ()
            )
        elif visual_mask is not None:
            layout = PromptLayout.of(visual_mask, newest_mask(attention_mask, inputs_embeds.shape[1]))
        if 0 in held and inputs.shortened is None:
            inputs = translate(inputs, held[0], past_key_values)

        decoder_arguments: dict[str, Any] = {}
        if isinstance(self.sparsifier, DecoderSparsifier) and layout is not None and any(layout.visual_counts):
            decoder_arguments = {
                "layout": layout,
                "tokens_per_image": self.dense_tokens_per_image if features is None else features.shape[1],
                "sparsifier": self.sparsifier,
                "fingerprints": fingerprints,
                "output_selection": output_selection,
            }
        outputs = self.language_model(
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs.embeds,
            **decoder_arguments,
            **kwargs,
        )
        if inputs.shortened is not None and outputs.past_key_values is not None:
            remember(outputs.past_key_values, 0, inputs.shortened)
        return SparseLlavaModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if features is None else features.flatten(0, 1),
            columns=getattr(outputs, "columns", None) if inputs.columns is None else inputs.columns,
            selection=stages + (getattr(outputs, "selection", None) or ()) if output_selection else None,
        )

    def _check_inputs(self, pixel_values: Tensor | None, visual_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        if kwargs.pop("mm_encoder_outputs", None):
            raise ValueError("mm_encoder_outputs: pass pixel_values instead; a pruned model encodes images itself.")
        if visual_mask is not None and pixel_values is not None:
            raise ValueError("visual_mask marks image features inside inputs_embeds: do not pass pixel_values too.")
        if visual_mask is not None and isinstance(self.sparsifier, EncoderSparsifier):
            raise ValueError(f"visual_mask: {self.sparsifier.name} prunes in the encoder; pass pixel_values instead.")

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """`(batch, length)` bool: where the image placeholders are."""
        token = self.config.image_token_id
        if input_ids is not None:
            return input_ids == token
        assert inputs_embeds is not None
        embedding = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == embedding).all(-1)


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
        budget: int | None = None,
        *,
        layers: Sequence[int] | None = None,
        budgets: Sequence[int] | None = None,
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
        output_selection: bool = False,
        **kwargs: Any,
    ) -> SparseLlavaOutput:
        """As LLaVA's; see `SparseLlavaModel.forward` for `visual_mask` and `output_selection`.

        Args:
            labels: `(batch, length)` over the tokens as passed, placeholders included.
            logits_to_keep: counts from the end of what is left; a tensor indexes what is left.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            visual_mask=visual_mask,
            output_selection=output_selection,
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
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            columns=outputs.columns,
            selection=outputs.selection,
        )


def _as_list(values: Sequence[int] | None) -> list[int] | None:
    return list(values) if isinstance(values, tuple) else values  # type: ignore[return-value]
