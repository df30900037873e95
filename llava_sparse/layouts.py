"""Where the visual tokens of a prompt lie in what the model sees: the numbers of `Selection`, for every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import unpad_image

from .drawing import Array, Block
from .preprocessing import Part, parts, recorded

PACKED = ("llava_next", "llava_next_video", "llava_onevision")


def blocks(
    model: Any, processor: Any, inputs: Mapping[str, Any], shown: Sequence[Image.Image], video: bool, numbers: int
) -> list[Block]:
    """The grids of visual tokens of a prompt, numbered as its method numbers them.

    Args:
        model: dense or pruned; processor: of it, `inputs` are what it gave for the prompt.
        shown: pictures in RGB, or the frames of one video.
        numbers: how many the method gives, of a dense model its visual tokens.

    Raises:
        ValueError: if what the processor's settings say does not add up to so many.
    """
    made = _Blocks(model, recorded(processor, video))
    if made.kind.startswith("qwen"):
        made.merged(inputs["video_grid_thw" if video else "image_grid_thw"].tolist(), shown, video)
    elif video:
        made.frames(shown, numbers)
    else:
        for picture in shown:
            made.picture(picture, together=made.kind == "llava_onevision" and len(shown) > 1)
    if made.next != numbers:
        raise ValueError(
            f"{made.kind}: the processor's settings lay out {made.next} visual tokens, the model has {numbers}; such a "
            "processor is not known, and nothing is drawn."
        )
    return made.blocks


class _Blocks:
    """Blocks in the order in which their tokens are numbered; `next` is the number that follows."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        config, method = model.config, getattr(model.model, "sparsifier", None)
        self.config, self.settings = config, settings
        self.kind: str = config.model_type.removeprefix("sparse_")
        self.patch: int = config.vision_config.patch_size
        self.encoder = None if method is None else method.encoder
        # Whether CLS, where the tower has one, is a token, too.
        full = getattr(config, "vision_feature_select_strategy", "") == "full"
        self.full = full and config.vision_config.model_type.startswith("clip")
        self.blocks: list[Block] = []
        self.next = 0

    def take(self, count: int) -> Array:
        """The next numbers."""
        self.next += count
        return np.arange(self.next - count, self.next)

    def add(self, part: Part, picture: Image.Image, numbers: Array, ends: Array | None = None) -> None:
        (x0, y0, x1, y1), (width, height) = part.box, picture.size
        inside = max(0, min(x1, width) - max(x0, 0)) * max(0, min(y1, height) - max(y0, 0))
        seen = part.see(picture, self.settings.get("resample", Image.Resampling.BICUBIC))
        self.blocks.append(Block(seen, numbers, ends, inside / (width * height)))

    def tiles(self, part: Part, picture: Image.Image) -> None:
        """Patches of a part, tile after tile; of one tile, row by row."""
        side = self.config.vision_config.image_size // self.patch
        columns, rows = (size // self.patch for size in part.size)
        row, column = np.mgrid[:rows, :columns]
        tile = row // side * (columns // side) + column // side
        numbers = tile * side**2 + row % side * side + column % side
        self.add(part, picture, self.take(rows * columns)[numbers])

    def picture(self, picture: Image.Image, together: bool) -> None:
        found = parts(self.settings, picture.size, together)
        by_tile = self.encoder is not None and self.encoder.unit == "tile"
        if self.kind not in PACKED or by_tile:
            self.take(self.full and (self.encoder is None or self.kind == "video_llava"))
            for part in found:
                self.tiles(part, picture)
            return
        self.take(self.full and self.kind != "llava_onevision")
        self.tiles(found[0], picture)
        if together:
            self.end()
        for part in found[1:]:
            self.packed(part, picture)

    def end(self) -> None:
        """A newline behind the last row."""
        last = self.blocks[-1]
        ends = np.full(len(last.numbers), -1)
        ends[-1:] = self.take(1)
        self.blocks[-1] = Block(last.pixels, last.numbers, ends, last.share)

    def packed(self, grid: Part, picture: Image.Image) -> None:
        """The grid of a picture's tiles as the dense model has it: without padding, a newline behind every row."""
        columns, rows = (size // self.patch for size in grid.size)
        if getattr(self.config, "image_packing", None) == "tiles":
            self.add(grid, picture, self.take(rows * columns).reshape(rows, columns))
            tile = self.config.vision_config.image_size // self.patch
            self.take(self.full * (rows // tile) * (columns // tile))
            return
        whole = torch.empty(1, rows, columns, device="meta")
        _, high, wide = unpad_image(whole, (picture.height, picture.width)).shape
        left, top = (columns - wide) // 2 * self.patch, (rows - high) // 2 * self.patch
        seen = grid.cut(left, top, wide * self.patch, high * self.patch)
        if self.kind == "llava_onevision":
            most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
            side = self.config.vision_config.image_size // self.patch
            ratio = (high * wide / (most * side**2)) ** 0.5
            if ratio > 1.1:
                high, wide = int(high // ratio), int(wide // ratio)
        numbers = self.take(high * (wide + 1)).reshape(high, wide + 1)
        self.add(seen, picture, numbers[:, :-1], numbers[:, -1])

    def frames(self, frames: Sequence[Image.Image], numbers: int) -> None:
        """Frames of a video: Video-LLaVA's have a CLS each; the others' are pooled, and one newline may follow."""
        cls = self.kind == "video_llava"
        side = isqrt(numbers // len(frames) - cls)
        for frame in frames:
            self.take(cls)
            part = parts(self.settings, frame.size)[0]
            self.add(part, frame, self.take(side * side).reshape(side, side))
        if self.kind == "llava_onevision":
            self.end()

    def merged(self, grids: list[list[int]], shown: Sequence[Image.Image], video: bool) -> None:
        """Patches that a tower of the Qwen kind has merged, of pictures, or of a video's frames, some at a time."""
        merge = self.config.vision_config.spatial_merge_size
        for number, (times, height, width) in enumerate(grids):
            size, rows, columns = (width * self.patch, height * self.patch), height // merge, width // merge
            for time in range(times):
                picture = shown[(2 * time + 1) * len(shown) // (2 * times)] if video else shown[number]
                part = Part((0, 0, *picture.size), size)
                self.add(part, picture, self.take(rows * columns).reshape(rows, columns))
