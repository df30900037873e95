"""What a model sees of a picture, by its processor's settings alone, against the pixels that the processor makes."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from family_cases import gemini_processor, next_processor, onevision_processor
from PIL import Image
from tiny_qwen import processor as qwen_processor

from llava_sparse.evaluation.report_parts import thumbnail
from llava_sparse.preprocessing import Part, parts, recorded

SIZES = [(600, 200), (90, 300), (100, 52), (40, 90), (57, 57)]
RED = (255, 0, 0)


def clip(**changes: Any) -> Any:
    processor = tiny.processor()
    processor.image_processor = type(processor.image_processor)(
        **{"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, **changes}
    )
    return processor


def padding() -> Any:
    """As LLaVA-1.5's authors prepare pictures: to a square of the mean colour first."""
    kind = getattr(transformers, "LlavaImageProcessorPil", None) or transformers.LlavaImageProcessor
    processor = tiny.processor()
    crop = {"height": 56, "width": 56}
    processor.image_processor = kind(do_pad=True, size={"shortest_edge": 56}, crop_size=crop)
    return processor


def pixels(processor: Any, picture: Image.Image) -> list[np.ndarray]:
    """What a processor makes of a picture, as pictures: the whole one, and the grid of its tiles."""
    images = processor.image_processor
    if isinstance(processor, transformers.Qwen2_5_VLProcessor):
        made = images(picture, return_tensors="pt")
        _, height, width = made["image_grid_thw"][0].tolist()
        patches = made["pixel_values"].reshape(height // 2, width // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
        tiles = patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, 14 * height, 14 * width)
    elif hasattr(processor, "image_grid"):
        tiles = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"][0].roll(1, 0)
    else:
        tiles = images(picture, return_tensors="pt")["pixel_values"]
        tiles = tiles[0] if tiles.dim() == 5 else tiles
    mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
    seen = ((tiles.movedim(1, -1) * std + mean) * 255).round().clamp(0, 255).numpy()
    if len(seen) == 1:
        return list(seen)
    width = parts(recorded(processor), picture.size)[1].size[0]
    grid = seen[1:].reshape(-1, width // 56, 56, 56, 3).swapaxes(1, 2).reshape(-1, width, 3)
    return [seen[0], grid]


@pytest.mark.parametrize(
    ("make", "far"),
    [
        (clip, 0.1),
        (lambda: clip(do_center_crop=False, size={"height": 56, "width": 56}), 0.1),
        (next_processor, 0.1),
        (onevision_processor, 0.1),
        (lambda: qwen_processor(transformers.Qwen2_5_VLProcessor), 0.1),
        # Padded before they are resized, which mixes colours along the edges.
        (padding, 2.5),
        (gemini_processor, 2.5),
    ],
    ids=["crop", "squash", "LLaVA-NeXT", "OneVision", "Qwen", "pad", "Mini-Gemini"],
)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_drawn_is_what_the_model_sees(make, far, size):
    """A box of the picture is red where the model sees red; where it sees none of it, there is no box."""
    processor = make()
    settings = json.loads(json.dumps(recorded(processor)))
    width, height = size
    y, x = np.mgrid[:height, :width]
    picture = np.stack([0 * x, 255 * x / width, 255 * y / height], -1).astype(np.uint8)
    box = (width // 5, height // 4, width // 2, height // 2)
    picture[box[1] : box[3], box[0] : box[2]] = RED
    found, made = parts(settings, size), pixels(processor, Image.fromarray(picture))
    assert len(found) == len(made)
    for part, seen in zip(found, made, strict=True):
        drawn = part.see(Image.fromarray(picture))
        assert drawn.shape == seen.shape
        assert np.abs(drawn.astype(int) - seen).mean() < far
        rows, columns = np.nonzero((seen[..., 0] > 128) & (seen[..., 1] < 100) & (seen[..., 2] < 100))
        place = part.place(box)
        if place is None or min(place[2] - place[0], place[3] - place[1]) < 2:
            assert len(rows) <= 2 * max(seen.shape)
        else:
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.subtract(edges, place)).max() < 2


@pytest.mark.parametrize("make", [clip, lambda: clip(do_center_crop=False, size={"height": 56, "width": 56}), padding])
def test_thumbnails_show_what_the_model_sees(make, tmp_path):
    """A wide picture, red at its left end: cropped away, squashed, or with padding above and below."""
    picture = np.full((200, 600, 3), 128, np.uint8)
    picture[:, :150] = RED
    Image.fromarray(picture).save(tmp_path / "wide.png")
    processor = make()
    uri = thumbnail(tmp_path, "wide.png", [], recorded(processor))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    (seen,) = pixels(processor, Image.fromarray(picture))
    share = [((x[..., 0] > 200) & (x[..., 1] < 90)).mean() for x in (shown, seen)]
    assert abs(share[0] - share[1]) < 0.02


def test_the_side_is_the_models_own():
    """448 pixels, a picture twice as wide: the middle half is seen, and boxes are cut where it ends."""
    size = {"size": {"shortest_edge": 448}, "crop_size": {"height": 448, "width": 448}, "do_center_crop": True}
    (seen,) = parts(size, (896, 448))
    assert seen.box == (224, 0, 672, 448) and seen.size == (448, 448)
    assert seen.place((200, 100, 300, 500)) == (0, 100, 76, 448)
    assert seen.place((0, 0, 224, 448)) is None


def test_parts():
    part = Part((-10, 0, 30, 40), (80, 80), RED)
    assert part.cut(20, 40, 40, 20) == Part((0, 20, 20, 30), (40, 20), RED)
    seen = part.see(Image.new("RGB", (30, 40)))
    assert (seen[:, :20] == RED).all() and not seen[:, 20:].any()
    with pytest.raises(ValueError, match="size None of an image processor"):
        parts({}, (4, 4))
