"""Qwen3-VL whose visual tokens are pruned, and with them the features that its first decoder layers are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from .configuration_sparse_qwen3_vl import SparseQwen3VLConfig
from .modeling_sparse_text import PrunedDecoderMixin
from .pruning_inputs import DecoderInputs
from .pruning_items import ImageFeatures, Request
from .pruning_mrope import MRopeHeadMixin, MRopeModelMixin, ReceivingTowerMixin
from .pruning_stock import features_getter


class SparseQwen3VLVisionModel(ReceivingTowerMixin, Qwen3VLVisionModel):
    """Qwen3-VL's tower, which can say how much attention tokens receive."""


class SparseQwen3VLTextModel(PrunedDecoderMixin, Qwen3VLTextModel):
    """Qwen3-VL's decoder, which can drop visual tokens between layers.

    Features of earlier tower layers (deepstack) are added to the output of its first layers, before that is pruned;
    tokens that a decoder method has merged are given none in the layers behind.
    """

    position_axes = 3

    def _forward_pruned(
        self,
        inputs_embeds: Tensor,
        *args: Any,
        visual_pos_masks: Tensor | None = None,
        deepstack_visual_embeds: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        added = []
        if visual_pos_masks is not None:
            nothing, there = torch.zeros_like(inputs_embeds), visual_pos_masks[..., None].to(inputs_embeds.device)
            added = [nothing.masked_scatter(there, x.to(nothing)) for x in deepstack_visual_embeds or ()]
        return super()._forward_pruned(inputs_embeds, *args, added=added, **kwargs)


class SparseQwen3VLModel(MRopeModelMixin, Qwen3VLModel):
    """Qwen3-VL without language-model head, pruned: see `MRopeModelMixin`.

    A token that an encoder method leaves has the deepstack features of the place where it stands.
    """

    config_class = SparseQwen3VLConfig
    config: SparseQwen3VLConfig

    get_image_features = features_getter(Qwen3VLModel.get_image_features)
    get_video_features = features_getter(Qwen3VLModel.get_video_features, "video")

    def __init__(self, config: Any) -> None:
        # Skips Qwen3VLModel.__init__, which would build the stock parts first.
        super(Qwen3VLModel, self).__init__(config)
        self.build(config, SparseQwen3VLVisionModel, SparseQwen3VLTextModel)

    def encode_merged(self, request: Request) -> dict[str, ImageFeatures]:
        if request.visual_mask is not None and bool(request.visual_mask.any()):
            raise ValueError(
                "visual_mask: this decoder is given features of earlier tower layers too, which inputs_embeds do not "
                "hold: pass pixel_values or mm_encoder_outputs."
            )
        return super().encode_merged(request)

    def decode(
        self, request: Request, images: ImageFeatures | None, inputs: DecoderInputs, kwargs: dict[str, Any]
    ) -> Any:
        if images is not None and images.deepstack_features is not None and request.layout is not None:
            kept = [
                torch.cat([x[place] for x, place in zip(layer, images.places, strict=True)])
                for layer in images.deepstack_features
            ]
            kwargs = {**kwargs, "visual_pos_masks": request.layout.visual, "deepstack_visual_embeds": kept}
        return super().decode(request, images, inputs, kwargs)

    def _decode_chunk(self, inputs: DecoderInputs, cache: Any, start: int, end: int, kwargs: dict[str, Any]) -> Any:
        there = kwargs.get("visual_pos_masks")
        if there is not None and end - start < there.shape[1]:
            columns = torch.arange(there.shape[1], device=there.device)
            inside = ((columns >= start) & (columns < end)).expand_as(there)[there]
            chunk = [x[inside.to(x.device)] for x in kwargs["deepstack_visual_embeds"]]
            kwargs = {**kwargs, "visual_pos_masks": there[:, start:end], "deepstack_visual_embeds": chunk}
        return super()._decode_chunk(inputs, cache, start, end, kwargs)


class SparseQwen3VLForConditionalGeneration(MRopeHeadMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, pruned: the class that users load; see `MRopeHeadMixin`."""

    config_class = SparseQwen3VLConfig
    config: SparseQwen3VLConfig
    model_class = SparseQwen3VLModel
