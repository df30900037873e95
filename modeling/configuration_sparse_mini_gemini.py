"""Configuration of Mini-Gemini, which transformers has not, with the five `sparse_*` fields."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig

from .configuration_sparse_llava import SparseFieldsMixin

# What published configurations, of model_type "mgm", say only by the names of their towers: CLIP ViT-L at 336 pixels.
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
PUBLISHED_TYPES = ("mgm", "mini_gemini")


class SparseMiniGeminiConfig(SparseFieldsMixin, LlavaConfig):
    """`LlavaConfig`, what Mini-Gemini has besides, and the `sparse_*` fields; a `config.json` as published will do too.

    Args:
        aux_hidden_sizes, aux_depths: channels and blocks of the four stages of the ConvNeXt tower (by default those of
            ConvNeXt-L); image_size_aux: pixels along the side of what it sees.
        image_grid: into how many rows, and columns, of tiles the CLIP tower's picture is cut; 1 for none.
        image_global: whether the whole picture, in the size of a tile, comes besides.
        image_token_index: of the placeholder; it need not be in the vocabulary, as published ones are not.
        sparse_method, sparse_budget, sparse_layers, sparse_budgets, sparse_options: see `Sparsity`; budgets are of a
            picture over all its tiles, of which each gets an equal share from a method that chooses tile by tile.

    Raises:
        ValueError: for `image_global` without a grid, and as of every sparse configuration.
    """

    model_type = "sparse_mini_gemini"

    aux_hidden_sizes: Any = (192, 384, 768, 1536)
    aux_depths: Any = (3, 3, 27, 3)
    image_size_aux: int = 768
    image_grid: int = 1
    image_global: bool = False
    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.aux_hidden_sizes, self.aux_depths = list(self.aux_hidden_sizes), list(self.aux_depths)
        if self.image_global and self.image_grid == 1:
            raise ValueError("`image_global`=True needs tiles: `image_grid` must be 2 or more, got 1.")
        super().__post_init__(**kwargs)

    @property
    def tiles_per_image(self) -> int:
        return self.image_grid**2 + self.image_global

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; of a published configuration, whose fields are those of its LLaMA, the parts are made."""
        if config_dict.get("model_type") in PUBLISHED_TYPES:
            config_dict = published_fields(config_dict)
        return super().from_dict(config_dict, **kwargs)


def published_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A published `config.json`, of MGM-7B or MGM-7B-HD, as the fields of `SparseMiniGeminiConfig`."""
    # LLaMA's own module takes a second to import, and only this needs it.
    text = AutoConfig.for_model("llama")
    known = {name: config[name] for name in text.to_dict() if name in config and name != "model_type"}
    own = ("image_size_aux", "image_grid", "image_global", "dtype", "torch_dtype")
    fields = {name: config[name] for name in own if name in config}
    fields |= {name: value for name, value in config.items() if name.startswith("sparse_")}
    return fields | {
        "model_type": SparseMiniGeminiConfig.model_type,
        "text_config": type(text)(**known),
        "vision_config": CLIPVisionConfig(**CLIP_LARGE),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "image_token_index": config["vocab_size"],
    }
