"""Qwen2.5-VL whose visual tokens are pruned: pictures of any size, videos, positions in three axes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2_5_VLTextModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from .configuration_sparse_qwen2_5_vl import SparseQwen2_5_VLConfig
from .modeling_sparse_clip import register_weight_names
from .modeling_sparse_text import PrunedDecoderMixin
from .pruning_mrope import MRopeHeadMixin, MRopeModelMixin, ReceivingTowerMixin
from .pruning_stock import features_getter

PARTS = ("Model", "ForConditionalGeneration")
register_weight_names({f"SparseQwen2_5_VL{part}": f"Qwen2_5_VL{part}" for part in PARTS})


class SparseQwen2_5_VisionTransformerPretrainedModel(ReceivingTowerMixin, Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's tower, which can say how much attention tokens receive."""

    def raster_order(self, grid_thw: Tensor) -> Tensor:
        """Blocks go window by window."""
        window, _ = get_vision_window_index(
            grid_thw,
            spatial_merge_size=self.spatial_merge_size,
            window_size=self.window_size,
            patch_size=self.patch_size,
        )
        return window.argsort()


class SparseQwen2_5_VLTextModel(PrunedDecoderMixin, Qwen2_5_VLTextModel):
    """Qwen2.5-VL's decoder, which can drop visual tokens between layers."""

    position_axes = 3


class SparseQwen2_5_VLModel(MRopeModelMixin, Qwen2_5_VLModel):
    """Qwen2.5-VL without language-model head, pruned: see `MRopeModelMixin`."""

    config_class = SparseQwen2_5_VLConfig
    config: SparseQwen2_5_VLConfig

    get_image_features = features_getter(Qwen2_5_VLModel.get_image_features)
    get_video_features = features_getter(Qwen2_5_VLModel.get_video_features, "video")

    def __init__(self, config: Any) -> None:
        # Skips Qwen2_5_VLModel.__init__, which would build the stock parts first.
        super(Qwen2_5_VLModel, self).__init__(config)
        self.build(config, SparseQwen2_5_VisionTransformerPretrainedModel, SparseQwen2_5_VLTextModel)


class SparseQwen2_5_VLForConditionalGeneration(MRopeHeadMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, pruned: the class that users load; see `MRopeHeadMixin`."""

    config_class = SparseQwen2_5_VLConfig
    config: SparseQwen2_5_VLConfig
    model_class = SparseQwen2_5_VLModel
