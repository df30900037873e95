"""Mini-Gemini (Li et al., arXiv 2403.18814), dense or pruned: tokens of a CLIP tower, each mines a ConvNeXt's features.

transformers has no Mini-Gemini; with `sparse_method=None` this is the dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ConvNextConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.convnext.modeling_convnext import ConvNextModel
from transformers.utils.generic import can_return_tuple

from .configuration_sparse_mini_gemini import SparseMiniGeminiConfig
from .modeling_sparse_llava import SparseLlavaForConditionalGeneration, SparseLlavaModel
from .pruning_items import ImageFeatures
from .pruning_ops import cluster_mean, image_fingerprints, rows_at
from .pruning_types import VisionFeatures, VisualTokens

# Names of published checkpoints, and ours. Saving goes through them from below, and takes a dot for any character.
RENAMED = {
    r"^model\.vision_tower_aux\.": "model.aux_tower.",
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
    r"^model\.layers\.": "model.language_model.layers.",
    r"^model\.norm\.": "model.language_model.norm.",
}
RENAMED_AUX = {
    r"\.norm\.": ".layernorm.",
    r"\.conv_dw\.": ".dwconv.",
    r"\.mlp\.fc1\.": ".pwconv1.",
    r"\.mlp\.fc2\.": ".pwconv2.",
    r"\.gamma": ".layer_scale_parameter",
    r"\.blocks\.": ".layers.",
    r"\.downsample\.": ".downsampling_layer.",
    r"^vision_stages\.": "encoder.stages.",
    r"^vision_stem\.0\.": "embeddings.patch_embeddings.",
    r"^vision_stem\.1\.": "embeddings.layernorm.",
}
for _name, _renamed in {"sparse_mini_gemini": RENAMED, "MiniGeminiAuxTower": RENAMED_AUX}.items():
    _renamings = [WeightRenaming(source_patterns=old, target_patterns=new) for old, new in _renamed.items()]
    register_checkpoint_conversion_mapping(_name, _renamings, overwrite=True)


class MiniGeminiAuxTower(ConvNextModel):
    """ConvNeXt whose stages' outputs are features.

    Modifications: no final norm; returns the outputs of all stages, in the size of the first, a quarter of the
    picture, side by side: `(images, channels of all stages, side, side)`.
    """

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        self.layernorm = nn.Identity()

    def get_correct_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
        """It has no attention, and goes with whatever backend the rest of a model is set to."""
        return "eager"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encodes `(images, 3, height, width)` pixels."""
        maps, hidden = [], self.embeddings(pixel_values)
        for stage in self.encoder.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        size = maps[0].shape[-2:]
        resized = [nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps[1:]]
        return torch.cat([maps[0], *resized], dim=1)


def tiles_of(features: Tensor, grid: int) -> Tensor:
    """Cuts `(images, channels, side, side)` by rows: `(images, grid * grid, channels, side / grid, side / grid)`."""
    side = features.shape[-1] // grid
    return features.unflatten(3, (grid, side)).unflatten(2, (grid, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


class SparseMiniGeminiModel(SparseLlavaModel):
    """Mini-Gemini without language-model head, dense or pruned.

    Every token of the CLIP tower asks the high-resolution features of its own square of the picture ("patch info
    mining"), and what it finds is added to it. Methods choose from, and merge, tokens that have mined; a token made of
    several inside the tower gets the mean of what these find. CLS, which VisionZip keeps, has no square.
    Of a picture in tiles the whole one comes first, then the others by rows, tile by tile.
    """

    config_class = SparseMiniGeminiConfig
    config: SparseMiniGeminiConfig
    visual_arguments: ClassVar[tuple[str, ...]] = ("pixel_values_aux", *SparseLlavaModel.visual_arguments)
    has_stock = False

    def __init__(self, config: SparseMiniGeminiConfig) -> None:
        super().__init__(config)
        sizes, depths = config.aux_hidden_sizes, config.aux_depths
        aux = ConvNextConfig(hidden_sizes=sizes, depths=depths, num_stages=len(sizes), hidden_act="gelu")
        low, high = config.vision_config.hidden_size, sum(sizes)
        self.aux_tower = MiniGeminiAuxTower(aux)
        self.vlm_uni_query_projector = nn.Sequential(nn.LayerNorm(low), nn.Linear(low, low))
        self.vlm_uni_aux_projector = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.vlm_uni_val_projector = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.post_init()

    @property
    def tiles(self) -> int:
        return self.config.tiles_per_image

    @property
    def has_tiles(self) -> bool:
        return self.tiles > 1

    @property
    def dense_tokens_per_image(self) -> int:
        return self.patches_per_image * self.tiles

    def sizes_of(self, size: Any) -> dict[str, Any]:
        tokens = size if isinstance(size, int) else size[0]
        usual = tokens == self.dense_tokens_per_image
        return {"patches": self.patches_per_image, "tiles": self.tiles} if usual else {"patches": tokens, "tiles": 1}

    def embed(self, input_ids: Tensor) -> Tensor:
        # The vocabulary need not have the placeholder.
        return super().embed(input_ids.masked_fill(input_ids == self.config.image_token_id, 0))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_values_aux: Tensor | None = None,
        question_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageFeatures:
        """Encodes and projects images.

        Args:
            pixel_values: `(images, 3, S, S)`, or, in tiles, `(images, tiles, 3, S, S)`, of which the whole picture is
                the last; pixel_values_aux: `(images, 3, S', S')`.
            question_ids: `(prompts, n)` int64, the question in CLIP's vocabulary, -1 for padding, for a method that
                reads it with a CLIP text tower.

        Returns:
            `ImageFeatures`, which `forward` and `generate` take as `mm_encoder_outputs={"image": ...}`.
        """
        return self.encode_images(self.sparsifier, pixel_values, question_ids, pixel_values_aux, **kwargs)

    def encode_images(
        self,
        method: Any,
        pixel_values: Tensor,
        question_ids: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageFeatures:
        for name in [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(f"{name}: Mini-Gemini takes its features as its configuration says; leave it out.")
        images, tiles = len(pixel_values), self.tiles
        pixels = self._tiles_first(pixel_values, pixel_values_aux)
        drawn = image_fingerprints(pixel_values) if method is not None and method.draws else None
        known: dict[str, Any] = {"fingerprints": drawn, "question_ids": question_ids, "snapshot": (method,)}
        known |= {"dense": [self.dense_tokens_per_image] * images}
        refine = self._miner(self.aux_features(pixel_values_aux))  # type: ignore[arg-type]
        encoder = None if method is None else method.encoder
        if encoder is None:
            layer = self.config.vision_feature_layer % (len(self.vision_tower.encoder.layers) + 1)
            hidden = self.vision_tower(pixels, depths=[layer], with_cls=False, return_dict=True).last_hidden_state
            low = refine(VisionFeatures(hidden, (1, hidden.shape[1]))).features
            features = self.multi_modal_projector(low).unflatten(0, (images, tiles)).flatten(1, 2)
            return ImageFeatures(pooler_output=list(features), **known)
        known["grids"] = [(self.config.image_grid,) * 2] * images
        outputs = self.vision_tower(pixels, sparsifier=encoder, refine=refine, return_dict=True)
        projected = self.multi_modal_projector(outputs.last_hidden_state)
        if outputs.tokens is not None:
            parts = replace(outputs.tokens.to(projected.device), features=projected).split([tiles] * images)
            tokens = [self.pack(part, grid) for part, grid in zip(parts, known["grids"], strict=True)]
            return ImageFeatures(pooler_output=[x.features[0] for x in tokens], tokens=tokens, **known)
        vision, by_tile = outputs.vision.to(projected.device), encoder.unit == "tile"
        if not by_tile and tiles > 1:
            vision, projected = vision.joined(tiles), projected.unflatten(0, (images, tiles)).flatten(1, 2)
        items = replace(vision, projected=projected).split([tiles if by_tile else 1] * images)
        features = [item.projected.flatten(0, 1) for item in items]
        return self.reduced(method, ImageFeatures(pooler_output=features, vision=items, **known))

    def pack(self, tiles: VisualTokens, grid: tuple[int, int]) -> VisualTokens:
        return VisualTokens.joined(tiles.split())

    def _tiles_first(self, pixel_values: Tensor, pixel_values_aux: Tensor | None) -> Tensor:
        """`(images * tiles, 3, S, S)`, the whole picture before its tiles.

        Raises:
            ValueError: for pixels that are not of the shapes that the configuration says.
        """
        tiles, aux = self.tiles, None if pixel_values_aux is None else tuple(pixel_values_aux.shape)
        pixels = pixel_values[:, None] if pixel_values.dim() == 4 else pixel_values
        if pixels.shape[1] != tiles or aux is None or aux[0] != len(pixels):
            shape = "(images, 3, S, S)" if tiles == 1 else f"(images, {tiles}, 3, S, S)"
            raise ValueError(
                f"Mini-Gemini needs pixel_values {shape} and pixel_values_aux (images, 3, S', S'), got "
                f"{tuple(pixel_values.shape)} and {aux}."
            )
        return (pixels.roll(1, dims=1) if self.config.image_global else pixels).flatten(0, 1)

    def aux_features(self, pixel_values_aux: Tensor) -> Tensor:
        """High-resolution features of each tile, `(images * tiles, channels, side, side)`; the whole one's shrunk."""
        features, grid = self.aux_tower(pixel_values_aux), self.config.image_grid
        if grid == 1:
            return features
        tiles = tiles_of(features, grid)
        if self.config.image_global:
            whole = nn.functional.interpolate(features, scale_factor=1 / grid, mode="bilinear", align_corners=False)
            tiles = torch.cat([whole[:, None], tiles], dim=1)
        return tiles.flatten(0, 1)

    def mine(self, tokens: Tensor, high: Tensor) -> Tensor:
        """What every token finds in its square: attention with one head over the vectors there.

        Args:
            tokens: `(tiles, P, C)`, P a square number; high: `(tiles, C', side, side)`.

        Returns:
            `(tiles, P, C)`.
        """
        squares = tiles_of(high, int(tokens.shape[1] ** 0.5)).flatten(3).transpose(2, 3)
        query = self.vlm_uni_query_projector(tokens)[:, :, None]
        key, value = self.vlm_uni_aux_projector(squares), self.vlm_uni_val_projector(squares)
        logits = query @ key.transpose(2, 3) / key.shape[-1] ** 0.5
        # As published.
        logits = logits.masked_fill(logits.isnan(), 0)
        return (logits.softmax(-1) @ value)[:, :, 0]

    def _miner(self, high: Tensor) -> Callable[[VisionFeatures], VisionFeatures]:
        """Lets the patches of tiles mine their features `high`."""

        def refine(vision: VisionFeatures) -> VisionFeatures:
            tokens, sources = vision.features, vision.sources
            if sources is None:
                return replace(vision, features=tokens + self.mine(tokens, high))
            found = self.mine(rows_at(tokens, sources), high)
            return replace(vision, features=tokens + cluster_mean(found, sources, tokens.shape[1], epsilon=0.0))

        return refine


class SparseMiniGeminiForConditionalGeneration(SparseLlavaForConditionalGeneration):
    """Mini-Gemini, dense or pruned: the class that users load.

    Published checkpoints load into it under their own names, see `RENAMED` and `RENAMED_AUX`. `forward` and `generate`
    also take `pixel_values_aux`, see `SparseMiniGeminiModel.get_image_features`.
    """

    config_class = SparseMiniGeminiConfig
    config: SparseMiniGeminiConfig
    model_class = SparseMiniGeminiModel

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_values_aux: Tensor | None = None,
        question_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageFeatures:
        """See `SparseMiniGeminiModel.get_image_features`."""
        features: ImageFeatures = self.model.get_image_features(pixel_values, pixel_values_aux, question_ids, **kwargs)
        return features
