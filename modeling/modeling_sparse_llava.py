"""LLaVA whose visual tokens are pruned, in everything transformers does with a LLaVA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .configuration_sparse_llava import SparseLlavaConfig, build_sparsifier
from .modeling_sparse_clip import ProjectedFeaturesMixin, SparseTowerMixin, register_weight_names, vision_tower
from .modeling_sparse_text import sparse_decoder
from .pruning_head import PrunedHeadMixin
from .pruning_items import ImageFeatures
from .pruning_model import PrunedModelMixin
from .pruning_ops import image_fingerprints
from .pruning_stock import features_getter

register_weight_names({"sparse_llava": "llava", "SparseLlavaModel": "LlavaModel"})


class SparseLlavaModel(PrunedModelMixin, ProjectedFeaturesMixin, LlavaModel):
    """LLaVA without language-model head, pruned.

    Modifications: vision tower and decoder are the sparse classes; placeholders that no visual token is left for are
    dropped from the inputs. With `sparse_method=None` it runs the stock forward.
    """

    config_class = SparseLlavaConfig
    config: SparseLlavaConfig
    visual_arguments: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer", "vision_feature_select_strategy", "image_sizes", "question_ids",
    )  # fmt: skip

    def __init__(self, config: SparseLlavaConfig) -> None:
        # Skips LlavaModel.__init__, which would build the stock parts first.
        super(LlavaModel, self).__init__(config)
        self.sparsifier = build_sparsifier(config)
        self.vision_tower = vision_tower(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = sparse_decoder(config.text_config)
        self.post_init()

    @property
    def patches_per_image(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @property
    def dense_tokens_per_image(self) -> int:
        """Placeholders that a stock processor writes for an image: its patches, and CLS where it is taken."""
        embeddings = getattr(self.vision_tower, "embeddings", None)
        has_cls = any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))
        # "default" leaves the first token out, whatever it is.
        return self.patches_per_image + has_cls - (self.config.vision_feature_select_strategy == "default")

    get_image_features = features_getter(LlavaModel.get_image_features)

    def encode_images(
        self, method: Any, pixel_values: Tensor, question_ids: Tensor | None = None, **kwargs: Any
    ) -> ImageFeatures:
        encoder = None if method is None else method.encoder
        drawn = image_fingerprints(pixel_values) if method is not None and method.draws else None
        known: dict[str, Any] = {"fingerprints": drawn, "question_ids": question_ids, "snapshot": (method,)}
        if encoder is None:
            features = self._all_features(pixel_values, **kwargs)
            return ImageFeatures(pooler_output=features, dense=[len(image) for image in features], **known)
        self.refuse_features(encoder, kwargs)
        if not self.reduces_inside(encoder):
            features = BaseModelOutputWithPooling(pooler_output=self._all_features(pixel_values, **kwargs))
            return replace(self.adopt(features, method), **known)
        kwargs.pop("image_sizes", None)
        outputs = self.vision_tower(pixel_values, sparsifier=encoder, return_dict=True, **kwargs)
        projected = self.multi_modal_projector(outputs.last_hidden_state)
        # Pictures may have another size than the configuration says.
        patches = (outputs.vision or outputs.tokens).patches
        dense = [self.dense_tokens_per_image - self.patches_per_image + patches] * len(projected)
        if outputs.vision is not None:
            vision = replace(outputs.vision.to(projected.device), projected=projected).split()
            images = ImageFeatures(pooler_output=list(projected), dense=dense, vision=vision, **known)
            return self.reduced(method, images)
        tokens = replace(outputs.tokens.to(projected.device), features=projected).split()
        return ImageFeatures(pooler_output=list(projected), dense=dense, tokens=tokens, **known)

    def _all_features(self, pixel_values: Tensor, **kwargs: Any) -> list[Tensor]:
        """Projected features of all patches of each image."""
        if not isinstance(self.vision_tower, SparseTowerMixin) or kwargs.get("image_sizes") is not None:
            outputs = super().get_image_features(pixel_values=pixel_values, return_dict=True, **kwargs)
            return list(outputs.pooler_output)
        kwargs.pop("image_sizes", None)
        return list(self.projected_features(pixel_values, **kwargs))


class SparseLlavaForConditionalGeneration(PrunedHeadMixin, LlavaForConditionalGeneration):
    """LLaVA, pruned: the class that users load; see `PrunedHeadMixin`."""

    config_class = SparseLlavaConfig
    config: SparseLlavaConfig
    model_class = SparseLlavaModel
