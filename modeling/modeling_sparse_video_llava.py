"""Video-LLaVA whose visual tokens are pruned: images and videos, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import VideoLlavaForConditionalGeneration, VideoLlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.video_llava.modeling_video_llava import VideoLlavaMultiModalProjector

from .configuration_sparse_llava import build_sparsifier
from .configuration_sparse_video_llava import SparseVideoLlavaConfig
from .modeling_sparse_clip import SparseCLIPVisionModel, register_weight_names
from .modeling_sparse_text import sparse_decoder
from .pruning_head import PrunedHeadMixin
from .pruning_items import ImageFeatures
from .pruning_model import PrunedModelMixin
from .pruning_ops import image_fingerprints
from .pruning_stock import features_getter
from .pruning_types import VisualTokens

# What the stock class calls pictures: transformers 5.24 has the usual name, 5.18 one of its own.
PIXELS = "pixel_values" if "pixel_values" in signature(VideoLlavaModel.forward).parameters else "pixel_values_images"

register_weight_names({"sparse_video_llava": "video_llava", "SparseVideoLlavaModel": "VideoLlavaModel"})


class SparseVideoLlavaModel(PrunedModelMixin, VideoLlavaModel):
    """Video-LLaVA without language-model head, pruned.

    Modifications: both towers and the decoder are the sparse classes. CLS of each frame is one of its visual tokens: a
    method inside the tower keeps it beside the patches that it chooses, methods behind it may drop it. These choose
    from all frames of a video at once. With `sparse_method=None` it runs the stock forward.
    """

    config_class = SparseVideoLlavaConfig
    config: SparseVideoLlavaConfig
    visual_arguments = (
        "pixel_values_videos", "vision_feature_layer", "vision_feature_select_strategy", "question_ids",
    )  # fmt: skip
    modalities = {  # noqa: RUF012
        "image": ("pixel_values", "image_token_id"),
        "video": ("pixel_values_videos", "video_token_id"),
    }

    def __init__(self, config: SparseVideoLlavaConfig) -> None:
        # Skips VideoLlavaModel.__init__, which would build the stock parts first.
        super(VideoLlavaModel, self).__init__(config)
        self.sparsifier = build_sparsifier(config)
        self.video_tower = SparseCLIPVisionModel(config.vision_config)
        self.image_tower = SparseCLIPVisionModel(config.vision_config)
        self.multi_modal_projector = VideoLlavaMultiModalProjector(config)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = sparse_decoder(config.text_config)
        self.post_init()

    @property
    def patches_per_image(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @property
    def dense_tokens_per_image(self) -> int:
        return self.patches_per_image + (self.config.vision_feature_select_strategy == "full")

    def _forward_stock(self, given: Any, visual: dict[str, Any], *args: Any) -> Any:
        return super()._forward_stock(
            given, {PIXELS if k == "pixel_values" else k: x for k, x in visual.items()}, *args
        )

    def sizes_of(self, tokens: int) -> dict[str, Any]:
        frames, odd = divmod(tokens, self.patches_per_image + 1)
        return {"frames": None, "patches": tokens} if odd else {"frames": frames, "patches": self.patches_per_image}

    def merged_sizes(self, mask: Tensor, counts: Sequence[int]) -> list[list[int]]:
        """Images, where a prompt has as many tokens as some of them; else one video."""
        size = self.dense_tokens_per_image
        return [[count] if count % size else [size] * (count // size) for count in counts]

    def grid_of(self, patches: int) -> tuple[int, int]:
        return super().grid_of(patches) if patches == self.patches_per_image else (1, patches)

    get_video_features = features_getter(VideoLlavaModel.get_video_features, "video")
    _get_image_features = features_getter(VideoLlavaModel.get_image_features)

    def get_image_features(
        self, pixel_values: Tensor | None = None, pixel_values_images: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `features_getter`; what pixels are called has changed between releases."""
        pixels = pixel_values if pixel_values_images is None else pixel_values_images
        features: BaseModelOutputWithPooling = self._get_image_features(pixels, **kwargs)
        return features

    def encode_images(self, method: Any, pixel_values: Tensor, **kwargs: Any) -> ImageFeatures:
        strategy = kwargs.pop("vision_feature_select_strategy", None) or self.config.vision_feature_select_strategy
        pictures = pixel_values[:, None]
        return self._encode(method, self.image_tower, pictures, with_cls=strategy == "full", **kwargs)

    def encode_videos(self, method: Any, pixel_values: Tensor, **kwargs: Any) -> ImageFeatures:
        """As `encode_images`, of `(videos, frames, 3, height, width)`, or a list of `(frames, 3, height, width)`."""
        if not torch.is_tensor(pixel_values):
            return ImageFeatures.joined([self.encode_videos(method, video[None], **kwargs) for video in pixel_values])
        kwargs.pop("vision_feature_select_strategy", None)
        return self._encode(method, self.video_tower, pixel_values, with_cls=True, **kwargs)

    def _encode(
        self,
        method: Any,
        tower: Any,
        pixels: Tensor,
        with_cls: bool,
        question_ids: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
    ) -> ImageFeatures:
        """Encodes `(items, frames, 3, height, width)`.

        Args:
            with_cls: whether CLS of each frame is one of its tokens.
        """
        items, frames = pixels.shape[:2]
        own = self.config.vision_feature_layer
        encoder = None if method is None else method.encoder
        if encoder is not None and vision_feature_layer not in (None, own):
            given = f"vision_feature_layer={vision_feature_layer!r}"
            raise ValueError(f"{given}: {encoder.name} takes its own features; leave it out.")
        size = frames * (self.patches_per_image + with_cls)
        drawn = image_fingerprints(pixels) if method is not None and method.draws else None
        known: dict[str, Any] = {"fingerprints": drawn, "question_ids": question_ids, "snapshot": (method,)}
        known["dense"] = [size] * items
        if encoder is None or encoder.place == "projector":
            asked = own if vision_feature_layer is None else vision_feature_layer
            count = len(tower.encoder.layers) + 1
            chosen = {"depths": [layer % count for layer in ([asked] if isinstance(asked, int) else asked)]}
            if encoder is not None:
                chosen = {"sparsifier": encoder}
            outputs = tower(pixels.flatten(0, 1), with_cls=with_cls, return_dict=True, **chosen)
            projected = self.multi_modal_projector(outputs.last_hidden_state).reshape(items, size, -1)
            images = ImageFeatures(pooler_output=list(projected), **known)
            if encoder is None:
                return images
            vision = outputs.vision.joined(frames) if with_cls else outputs.vision
            images.vision = replace(vision.to(projected.device), projected=projected).split()
            return self.reduced(method, images)
        tokens = [VisualTokens.joined(item) for item in self._reduced_frames(method, tower, pixels, with_cls)]
        return ImageFeatures(pooler_output=[x.features[0] for x in tokens], tokens=tokens, **known)

    def _reduced_frames(self, method: Any, tower: Any, pixels: Tensor, with_cls: bool) -> list[list[VisualTokens]]:
        """The tokens of each frame of each item; frames whose share of the budget is the same are encoded together."""
        items, frames = pixels.shape[:2]
        encoders = self.encoders_for(method, frames * (self.patches_per_image + with_cls))
        found: list[dict[int, VisualTokens]] = [{} for _ in range(items)]
        for budgets in dict.fromkeys(encoder.budgets for encoder in encoders):
            same = [frame for frame, encoder in enumerate(encoders) if encoder.budgets == budgets]
            outputs = tower(
                pixels[:, same].flatten(0, 1), sparsifier=encoders[same[0]], with_cls=with_cls, return_dict=True
            )
            projected = self.multi_modal_projector(outputs.last_hidden_state)
            parts = replace(outputs.tokens.to(projected.device), features=projected).split()
            for place, part in enumerate(parts):
                found[place // len(same)][same[place % len(same)]] = part
        return [[item[frame] for frame in range(frames)] for item in found]

    def adopt(self, given: Any, method: Any) -> ImageFeatures:
        """As `PrunedModelMixin.adopt`; of videos, features of each as a whole.

        Raises:
            ValueError: also for features of frames, of which nothing says how many make a video.
        """
        frame = self.patches_per_image + 1
        ours = isinstance(given, ImageFeatures) or self.dense_tokens_per_image == frame
        if not ours and any(len(item) == frame for item in given.pooler_output):
            raise ValueError(
                "mm_encoder_outputs: these are features of frames, and how many of them make a video is not said: pass "
                "pixel_values_videos, what this model's get_video_features gives, or (videos, tokens, channels)."
            )
        return super().adopt(given, method)

    def stock_features(self, given: Any, modality: str) -> Any:
        if not isinstance(given, ImageFeatures):
            return given
        return BaseModelOutputWithPooling(pooler_output=torch.stack(given.features))


class SparseVideoLlavaForConditionalGeneration(PrunedHeadMixin, VideoLlavaForConditionalGeneration):
    """Video-LLaVA, pruned: the class that users load; see `PrunedHeadMixin`."""

    config_class = SparseVideoLlavaConfig
    config: SparseVideoLlavaConfig
    model_class = SparseVideoLlavaModel
    other_names = {"pixel_values_images": "pixel_values"}  # noqa: RUF012

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `SparseVideoLlavaModel.get_video_features`."""
        features: BaseModelOutputWithPooling = self.model.get_video_features(pixel_values_videos, **kwargs)
        return features
