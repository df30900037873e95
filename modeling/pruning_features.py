"""Features that the caller has, and what a method behind the projector makes of any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .pruning_items import ImageFeatures, Request, VisualItemsMixin
from .pruning_ops import autocast_disabled
from .pruning_types import Question, VisionFeatures, VisualTokens, concatenated


class FeaturesMixin(VisualItemsMixin):
    """What of a `PrunedModelMixin` takes features over and lets a method reduce them."""

    def encode_merged(self, request: Request) -> dict[str, ImageFeatures]:
        """Features that the caller has merged into `inputs_embeds`, where a method behind the projector reduces them.

        Raises:
            ValueError: for embeddings that may hold features, and for a method that works before the projector.
        """
        held = request.cache is not None and int(request.cache.get_seq_length()) > 0
        if request.visual_mask is None and request.input_ids is None and request.method is not None and not held:
            raise ValueError(
                "inputs_embeds may hold image features, and nothing tells them from text: pass visual_mask, "
                "(batch, length) bool, true for image features; all false for text alone. Or pass pixel_values."
            )
        encoder = request.encoder
        if request.visual_mask is None or encoder is None:
            return {}
        if encoder.place != "projector":
            raise ValueError(f"visual_mask: {encoder.name} prunes in the encoder; pass pixel_values instead.")
        mask = request.visual_mask.bool()
        merged = request.embeds[mask.to(request.embeds.device)]
        counts = mask.sum(-1).tolist()
        sizes = [n for count, own in zip(counts, self.merged_sizes(mask, counts), strict=True) if count for n in own]
        if len(merged) != sum(sizes):
            size = self.dense_tokens_per_image
            raise ValueError(f"visual_mask marks {len(merged)} image features; a multiple of {size} is allowed.")
        features = list(merged.split(sizes)) if sizes else []
        return {"image": self.adopt(BaseModelOutputWithPooling(pooler_output=features), request.method)}

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
        stacked = getattr(given, "deepstack_features", None)
        if encoder is None:
            return ImageFeatures(pooler_output=features, dense=dense, deepstack_features=stacked)
        tile_by_tile = encoder.unit == "tile" and self.dense_tokens_per_image is None and not self.gathers_positions
        if encoder.place == "projector" and not tile_by_tile:
            vision = [VisionFeatures(x[None], self.grid_of(len(x)), projected=x[None]) for x in features]
            images = ImageFeatures(pooler_output=features, dense=dense, vision=vision, deepstack_features=stacked)
            return self.reduced(method, images)
        where = "chooses tile by tile" if encoder.place == "projector" else "works in the vision tower"
        raise ValueError(
            f"mm_encoder_outputs: {encoder.name} {where}, and these are features of all patches behind it: pass "
            "pixel_values, or what this model's get_image_features gives for them."
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
        same: dict[Any, list[int]] = {}
        for item, (x, size) in enumerate(zip(images.vision, images.sizes, strict=True)):
            same.setdefault((size, x.grid), []).append(item)
        tokens: dict[int, VisualTokens] = {}
        for (size, _), group in same.items():
            x = concatenated([images.vision[item] for item in group])
            encoder = self.method_for(method, size).encoder
            tiles = len(x.features) // len(group)
            rows = torch.tensor(group).repeat_interleave(tiles)
            asked = None if question is None else question.rows(rows).to(x.features.device)
            with autocast_disabled(x.features):
                parts = encoder.reduce(replace(x, question=asked)).split([tiles] * len(group))
            for item, part in zip(group, parts, strict=True):
                grid = None if images.grids is None else images.grids[item]
                tokens[item] = part if grid is None else self.pack(part, grid)
        chosen: Any = replace(images, tokens=[tokens[item] for item in sorted(tokens)], vision=None)
        chosen.pooler_output = [x.features[0] for x in chosen.tokens]
        return chosen

    def pack(self, tiles: VisualTokens, grid: tuple[int, int]) -> VisualTokens:
        """The tokens of a picture's tiles, an item each, as one; the first is the whole picture, the others a grid."""
        raise NotImplementedError
