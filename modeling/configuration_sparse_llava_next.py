"""Configuration of LLaVA-NeXT with the five `sparse_*` fields."""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextConfig

from .configuration_sparse_llava import SparseFieldsMixin

PACKINGS = ("unpadded", "tiles")


def most_tiles(config: Any) -> int:
    """Tiles of the largest picture that a configuration's pinpoints allow, with the one that is all of it."""
    side = config.vision_config.image_size
    return 1 + max((height // side) * (width // side) for height, width in config.image_grid_pinpoints)


class SparseLlavaNextConfig(SparseFieldsMixin, LlavaNextConfig):
    """`LlavaNextConfig` with the `sparse_*` fields.

    `sparse_budget` is of a picture over all its tiles: an integer at most all of its tokens, a ratio one of those that
    it has in the dense model. A method that chooses tile by tile gets an equal share for each tile, rounded down;
    `sparse_budgets` of such a method are of a tile. What they are checked against, and expanded to, is the largest
    picture that `image_grid_pinpoints` allow.

    Two protocols of counting are in use. transformers' (default): `image_packing="unpadded"`, what is padding goes, and
    a newline stands behind every row. The published tables': `image_packing="tiles"`, all patches of all tiles without
    newlines, with `image_grid_pinpoints=[[672, 672]]`, so that every picture has 5 tiles, 2,880 tokens. The processor
    takes the same two settings.
    """

    model_type = "sparse_llava_next"

    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None
    image_packing: str = "unpadded"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.image_packing not in PACKINGS:
            raise ValueError(f"`image_packing` must be one of {', '.join(PACKINGS)}, got {self.image_packing!r}.")
        super().__post_init__(**kwargs)

    @property
    def tiles_per_image(self) -> int:
        """Tiles of the largest picture, with the one that is all of it."""
        return most_tiles(self)
