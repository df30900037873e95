"""LLaVA-OneVision whose visual tokens are pruned: a picture in tiles, several pictures, videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector
from transformers.utils.generic import can_return_tuple

from .configuration_sparse_llava import build_sparsifier
from .configuration_sparse_llava_onevision import SparseLlavaOnevisionConfig
from .modeling_sparse_clip import register_weight_names, vision_tower
from .modeling_sparse_text import sparse_decoder
from .pruning_cache import the_cache
from .pruning_generation import PrunedGenerationMixin
from .pruning_head import PrunedHeadMixin, SparseCausalLMOutput
from .pruning_items import ImageFeatures
from .pruning_tiles import OF_PICTURES, TilesMixin

register_weight_names({"sparse_llava_onevision": "llava_onevision", "SparseLlavaOnevisionModel": "LlavaOnevisionModel"})


class SparseLlavaOnevisionModel(TilesMixin, LlavaOnevisionModel):
    """LLaVA-OneVision without language-model head, pruned.

    Modifications: the decoder is the sparse class; a prompt's only picture is in tiles, as of `TilesMixin`, each of
    several is one tile. Methods behind the projector choose from all pooled tokens of a video at once. With
    `sparse_method=None` it runs the stock forward.
    """

    config_class = SparseLlavaOnevisionConfig
    config: SparseLlavaOnevisionConfig
    visual_arguments = (
        "pixel_values_videos", "vision_feature_layer", "vision_feature_select_strategy", "question_ids", *OF_PICTURES,
    )  # fmt: skip
    modalities = {  # noqa: RUF012
        "image": ("pixel_values", "image_token_id"),
        "video": ("pixel_values_videos", "video_token_id"),
    }

    def __init__(self, config: SparseLlavaOnevisionConfig) -> None:
        # Skips LlavaOnevisionModel.__init__, which would build the stock parts first.
        super(LlavaOnevisionModel, self).__init__(config)
        self.sparsifier = build_sparsifier(config)
        self.vision_tower = vision_tower(config.vision_config)
        self.multi_modal_projector = LlavaOnevisionMultiModalProjector(config)
        width = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(width, dtype=self.dtype) / width**0.5)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = sparse_decoder(config.text_config)
        self.post_init()

    def dense_tokens(self, image_size: Any, grid: tuple[int, int]) -> int:
        if grid == (0, 0):
            return self.side**2 + 1
        rows, columns = self.unpadded(image_size, grid)
        most = self.config.tiles_per_image - 1
        ratio = (rows * columns / (most * self.side**2)) ** 0.5
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return self.side**2 + rows * (columns + 1)

    def pack_dense(self, tiles: Sequence[Tensor], image_sizes: Any, given: dict[str, Any]) -> list[Tensor]:
        aspect = given.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        newline = self.image_newline
        return self.pack_image_features(tiles, image_sizes, image_newline=newline, vision_aspect_ratio=aspect)[0]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: Tensor | None = None,
        question_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes and projects images; arguments as the stock class's, and

        Args:
            question_ids: `(prompts, n)` int64, the question in CLIP's vocabulary, -1 for padding, for a method that
                reads it with a CLIP text tower.

        Returns:
            `ImageFeatures`, which `forward` and `generate` take as `mm_encoder_outputs={"image": ...}`; of a dense
            model the stock output.
        """
        given: dict[str, Any] = {
            "image_sizes": image_sizes,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "vision_aspect_ratio": vision_aspect_ratio,
            "batch_num_images": batch_num_images,
        }
        method = self.sparsifier
        if method is None:
            return super().get_image_features(pixel_values=pixel_values, return_dict=True, **given, **kwargs)
        return self.encode_images(method, pixel_values, question_ids=question_ids, **given, **kwargs)

    def video_features(self, pixel_values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        frames = self.apply_pooling(self.projected_features(pixel_values.flatten(0, 1), **given))
        newline = self.image_newline[None].to(frames.device, frames.dtype)
        return [torch.cat([x, newline]) for x in frames.reshape(len(pixel_values), -1, frames.shape[-1])]

    def stock_features(self, given: Any, modality: str) -> Any:
        if modality != "video" or not isinstance(given, ImageFeatures):
            return given
        return BaseModelOutputWithPooling(pooler_output=torch.stack(given.features))


class SparseLlavaOnevisionForConditionalGeneration(
    PrunedGenerationMixin, PrunedHeadMixin, LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision, pruned: the class that users load.

    Modifications: the model is `SparseLlavaOnevisionModel`; labels follow the tokens that are left; generation keeps
    counting in the tokens that the caller passed.
    """

    config_class = SparseLlavaOnevisionConfig
    config: SparseLlavaOnevisionConfig

    def __init__(self, config: SparseLlavaOnevisionConfig) -> None:
        # Skips LlavaOnevisionForConditionalGeneration.__init__, which would build the stock model first.
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = SparseLlavaOnevisionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_sizes_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        visual_mask: Tensor | None = None,
        output_selection: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SparseCausalLMOutput:
        """Arguments as the stock class's, those of `PrunedModelMixin.forward`, and

        Args:
            labels: `(batch, length)` over the tokens as passed, placeholders included.
            logits_to_keep: counts from the end of what is left; a tensor indexes what is left.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "pixel_values_videos": pixel_values_videos,
            "image_sizes_videos": image_sizes_videos,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "vision_aspect_ratio": vision_aspect_ratio,
            "batch_num_images": batch_num_images,
            "mm_encoder_outputs": mm_encoder_outputs,
            "visual_mask": visual_mask,
            "output_selection": output_selection,
            "cache": the_cache(past_key_values, cache),
        }
        return self.pruned_forward(inputs, labels, logits_to_keep, **kwargs)
