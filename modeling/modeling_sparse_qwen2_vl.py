"""Qwen2-VL whose visual tokens are pruned: pictures of any size, videos, positions in three axes."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLForConditionalGeneration, Qwen2VLModel, Qwen2VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from .configuration_sparse_qwen2_vl import SparseQwen2VLConfig
from .modeling_sparse_clip import register_weight_names
from .modeling_sparse_text import PrunedDecoderMixin
from .pruning_mrope import MRopeHeadMixin, MRopeModelMixin, ReceivingTowerMixin
from .pruning_stock import features_getter

PARTS = ("Model", "ForConditionalGeneration")
register_weight_names({f"SparseQwen2VL{part}": f"Qwen2VL{part}" for part in PARTS})


class SparseQwen2VisionTransformerPretrainedModel(ReceivingTowerMixin, Qwen2VisionTransformerPretrainedModel):
    """Qwen2-VL's tower, which can say how much attention tokens receive."""


class SparseQwen2VLTextModel(PrunedDecoderMixin, Qwen2VLTextModel):
    """Qwen2-VL's decoder, which can drop visual tokens between layers."""

    position_axes = 3


class SparseQwen2VLModel(MRopeModelMixin, Qwen2VLModel):
    """Qwen2-VL without language-model head, pruned: see `MRopeModelMixin`."""

    config_class = SparseQwen2VLConfig
    config: SparseQwen2VLConfig

    get_image_features = features_getter(Qwen2VLModel.get_image_features)
    get_video_features = features_getter(Qwen2VLModel.get_video_features, "video")

    def __init__(self, config: Any) -> None:
        # Skips Qwen2VLModel.__init__, which would build the stock parts first.
        super(Qwen2VLModel, self).__init__(config)
        self.build(config, SparseQwen2VisionTransformerPretrainedModel, SparseQwen2VLTextModel)


class SparseQwen2VLForConditionalGeneration(MRopeHeadMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL, pruned: the class that users load; see `MRopeHeadMixin`."""

    config_class = SparseQwen2VLConfig
    config: SparseQwen2VLConfig
    model_class = SparseQwen2VLModel
