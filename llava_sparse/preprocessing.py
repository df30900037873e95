"""What a processor makes of a picture, as geometry: which rectangles of it the model sees, and at what size.

It follows from the processor's settings, which a results file can hold, and from the size of the picture alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

# Of processors whose own class, not their image processor, makes tiles: see `SparseMiniGeminiProcessor`.
OWN = ("image_size_aux", "image_grid", "image_global")
BLACK = (0, 0, 0)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Part:
    """A rectangle of a picture, as a model sees it.

    Attributes:
        box: left, top, right, bottom in pixels of the picture; what is beyond the picture is padding.
        size: width and height in pixels of the model.
        fill: the colour of the padding.
    """

    box: Box
    size: tuple[int, int]
    fill: tuple[int, int, int] = BLACK

    def cut(self, left: float, top: float, width: int, height: int) -> Part:
        """A rectangle of this one, given in pixels of the model."""
        (x0, y0, *_), (across, down) = self.box, self._scale
        x, y = x0 + left / across, y0 + top / down
        return Part((x, y, x + width / across, y + height / down), (width, height), self.fill)

    def place(self, box: Sequence[float]) -> Box | None:
        """Where a box of the picture, `(x0, y0, x1, y1)`, lies in pixels of the model; None where it is not seen."""
        (x0, y0, *_), (across, down), (width, height) = self.box, self._scale, self.size
        left, right = (min(max((x - x0) * across, 0), width) for x in box[::2])
        top, bottom = (min(max((y - y0) * down, 0), height) for y in box[1::2])
        return (left, top, right, bottom) if left < right and top < bottom else None

    def see(self, picture: Image.Image, resample: int = Image.Resampling.BICUBIC) -> NDArray[np.uint8]:
        """`(height, width, 3)`, what the model sees of a picture in RGB."""
        seen = Image.new("RGB", self.size, self.fill)
        (x0, y0, x1, y1), (across, down) = self.box, self._scale
        inside = (max(x0, 0), max(y0, 0), min(x1, picture.width), min(y1, picture.height))
        if inside[0] < inside[2] and inside[1] < inside[3]:
            left, top = round((inside[0] - x0) * across), round((inside[1] - y0) * down)
            right, bottom = round((inside[2] - x0) * across), round((inside[3] - y0) * down)
            size = max(1, right - left), max(1, bottom - top)
            seen.paste(picture.resize(size, Image.Resampling(resample), box=inside), (left, top))
        return np.asarray(seen)

    @property
    def _scale(self) -> tuple[float, float]:
        """Pixels of the model for one of the picture, across and down."""
        x0, y0, x1, y1 = self.box
        return self.size[0] / (x1 - x0), self.size[1] / (y1 - y0)


def recorded(processor: Any, video: bool = False) -> dict[str, Any]:
    """The settings of a processor that say what becomes of a picture, or of a video's frames, as JSON can hold them."""
    images = processor.image_processor
    given: Any = getattr(processor, "video_processor", None) if video else images
    settings = (given if hasattr(given, "to_dict") else images).to_dict()
    own = {name: getattr(processor, name) for name in OWN if hasattr(processor, name)}
    found: dict[str, Any] = json.loads(json.dumps(settings | own, default=dict))
    return found


def parts(settings: Mapping[str, Any], size: tuple[int, int], together: bool = False) -> list[Part]:
    """What a model sees of a picture: all of it, or its middle; of one that is cut into tiles also their grid.

    Args:
        settings: as from `recorded`.
        size: width and height of the picture.
        together: whether it is one of several of a prompt, in a family that cuts a prompt's only picture alone.

    Raises:
        ValueError: for settings that say of no size that pictures are brought to.
    """
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    square, fill = _square(size), _mean_colour(settings)
    crop = _sides(settings.get("crop_size"))
    if "image_size_aux" in settings and crop:
        count = settings["image_grid"]
        grid = Part(square, (crop[0] * count, crop[1] * count), fill)
        return [grid] if count == 1 else [Part(square, crop, fill), grid][not settings["image_global"] :]
    if "merge_size" in settings:
        return [Part(whole, _dynamic(settings, size))]
    tile = _sides(settings.get("size"))
    if tile is None:
        raise ValueError(f"size {settings.get('size')!r} of an image processor: a number of pixels is needed.")
    if settings.get("image_grid_pinpoints"):
        return [Part(square, tile)] if together else [Part(whole, tile), _grid(settings, size)]
    seen = Part(whole, size)
    if settings.get("do_pad") and settings.get("image_processor_type", "").startswith("LlavaImageProcessor"):
        seen = Part(square, (max(size),) * 2, fill)
    if settings.get("do_resize", True):
        seen = Part(seen.box, tile if "height" in settings["size"] else _shortest(tile[0], seen.size), seen.fill)
    if crop and settings.get("do_center_crop"):
        left, top = ((side - kept) // 2 for side, kept in zip(seen.size, crop, strict=True))
        seen = seen.cut(left, top, *crop)
    return [seen]


def _sides(size: Any) -> tuple[int, int] | None:
    """Width and height of a setting."""
    if isinstance(size, int):
        return size, size
    height = (size or {}).get("height") or (size or {}).get("shortest_edge")
    return None if not height else (size.get("width") or height, height)


def _square(size: tuple[int, int]) -> Box:
    """The smallest square around a picture."""
    left, top = ((max(size) - side) // 2 for side in size)
    return (-left, -top, max(size) - left, max(size) - top)


def _mean_colour(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """With which LLaVA-1.5 pads."""
    red, green, blue = (int(255 * mean) for mean in settings.get("image_mean") or BLACK)
    return red, green, blue


def _shortest(edge: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size of a picture whose shorter side becomes `edge`."""
    long = int(edge * max(size) / min(size))
    return (edge, long) if size[0] <= size[1] else (long, edge)


def _grid(settings: Mapping[str, Any], size: tuple[int, int]) -> Part:
    """The grid of a picture in tiles: as large as it fits the best pinpoint, in the middle of black."""
    height, width = select_best_resolution(size[::-1], settings["image_grid_pinpoints"])
    scale = min(width / size[0], height / size[1])
    new = min(math.ceil(size[0] * scale), width), min(math.ceil(size[1] * scale), height)
    left, top = (width - new[0]) // 2, (height - new[1]) // 2
    return Part((0, 0, *size), new).cut(-left, -top, width, height)


def _dynamic(settings: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
    """The size of a picture of which a model sees as much as its limits allow, in whole merged patches."""
    unit = settings["patch_size"] * settings["merge_size"]
    limits = settings.get("size") or {}
    least = limits.get("shortest_edge") or settings.get("min_pixels") or 0
    most = limits.get("longest_edge") or settings.get("max_pixels") or math.inf
    width, height = (round(side / unit) * unit for side in size)
    if width * height > most:
        shrink = math.sqrt(size[0] * size[1] / most)
        width, height = (max(unit, math.floor(side / shrink / unit) * unit) for side in size)
    elif width * height < least:
        grow = math.sqrt(least / (size[0] * size[1]))
        width, height = (math.ceil(side * grow / unit) * unit for side in size)
    return width, height
