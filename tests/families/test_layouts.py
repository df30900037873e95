"""Where visual tokens lie: with towers that look at nothing but the patch itself, what changes there changes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from family_cases import FAMILIES, Family
from PIL import Image

import llava_sparse
from llava_sparse.drawing import draw
from llava_sparse.evaluation import LoadedModel
from llava_sparse.layouts import blocks
from llava_sparse.visualize import trace

BY_NAME = {family.name: family for family in FAMILIES}
LOCAL = ("out_proj", "fc2", "attn.proj", "down_proj", "linear_fc2", "vlm_uni_val_projector.1")


def local(model: Any) -> Any:
    """Lets no patch look at others: nothing that attention or a layer finds is added to it."""
    for name, weight in model.named_parameters():
        if "language_model" not in name and "merger" not in name and any(part in name for part in LOCAL):
            weight.data.zero_()
    return model


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def changed(picture: Image.Image, place: tuple[float, float]) -> Image.Image:
    """With a small square of other pixels, around a place from 0 to 1."""
    pixels = np.array(picture)
    y, x = (int(share * side) for share, side in zip(place[::-1], pixels.shape, strict=False))
    pixels[y : y + 3, x : x + 3] ^= 255
    return Image.fromarray(pixels)


def features(model: Any, inputs: Any, video: bool) -> torch.Tensor:
    """`(numbers, channels)`: what the method chooses from, in the order of its numbers."""
    made = {}

    def keep(encode: Any) -> Any:
        def kept(*args: Any, **kwargs: Any) -> Any:
            made["images"] = encode(*args, **kwargs)
            return made["images"]

        return kept

    name = "encode_videos" if video else "encode_images"
    setattr(model.model, name, keep(getattr(model.model, name)))
    model(**inputs, logits_to_keep=1)
    images = made["images"]
    if images.vision:
        return torch.cat([item.projected.flatten(0, 1) for item in images.vision])
    return torch.cat(list(images.pooler_output))


def prompt_of(family: Family, shown: list, video: bool) -> str:
    if family.name.startswith("qwen"):
        return "<|vision_start|> <|image_pad|> <|vision_end|> " * len(shown) + "Is there a dog ?"
    return ("<video> " if video else "<image> " * len(shown)) + "Is there a dog ?"


CASES = [
    *((name, "sparsevlm", 1, False) for name in BY_NAME),
    *((name, "cdpruner", 1, False) for name in ("llava_next", "llava_onevision", "mini_gemini")),
    ("llava_next", "sparsevlm", 2, False),
    ("llava_onevision", "cdpruner", 2, False),
    ("llava_onevision", "sparsevlm", 2, False),
    ("qwen2_5_vl", "sparsevlm", 2, False),
    ("llava_onevision", "sparsevlm", 3, True),
    ("llava_next_video", "sparsevlm", 3, True),
    ("video_llava", "sparsevlm", 3, True),
]


def check(model: Any, processor: Any, shown: list[Image.Image], prompt: str, video: bool = False) -> None:
    """What the model makes of a picture differs in the tokens whose cells differ, and in no others."""
    text = [prompt]
    before = processor(**{"videos" if video else "images": [shown]}, text=text, return_tensors="pt")
    known = features(model, before, video)
    grids = blocks(model, processor, before, shown, video, len(known))
    # Mini-Gemini's own way of shrinking a picture is drawn by another, which spreads a little further.
    faint = 24 if hasattr(processor, "image_grid") else 0
    for place in ((0.3, 0.375), (0.7, 0.6)):
        other = [changed(picture, place) for picture in shown]
        after = processor(**{"videos" if video else "images": [other]}, text=text, return_tensors="pt")
        moved = (features(model, after, video) - known).abs().amax(-1) > 1e-5
        found = set()
        for old, new in zip(grids, blocks(model, processor, after, other, video, len(known)), strict=True):
            assert (old.numbers == new.numbers).all()
            down, across = old.edges
            differs = np.abs(old.pixels.astype(int) - new.pixels).max(-1) > faint
            for row, column in np.argwhere(old.numbers >= 0):
                here = differs[down[row] : down[row + 1], across[column] : across[column + 1]]
                found |= {int(old.numbers[row, column])} if here.any() else set()
        assert found and set(moved.nonzero().flatten().tolist()) == found


@pytest.mark.parametrize(("name", "method", "count", "video"), CASES)
@torch.no_grad()
def test_what_changes_in_a_cell_changes_its_token(name, method, count, video):
    family = BY_NAME[name]
    processor, model = family.processor(), llava_sparse.sparsify(local(family.make()), method, family.budget)
    # Of OneVision, a picture so small that its features are not scaled down, which mixes neighbours.
    sizes = ((112, 56), (60, 130)) if name == "llava_onevision" else ((112, 84), (60, 130))
    shown = [noise(n, sizes[0 if video else n % 2]) for n in range(count)]
    check(model, processor, shown, prompt_of(family, shown, video), video)


@torch.no_grad()
def test_all_patches_of_all_tiles():
    """LLaVA-NeXT as its tables count: without unpadding and newlines, rows over the whole grid."""
    family = BY_NAME["llava_next"]
    model = llava_sparse.sparsify(local(family.make()), "sparsevlm", family.budget)
    model.config.image_packing = model.model.config.image_packing = "tiles"
    processor = family.processor(sparse_method="sparsevlm", sparse_budget=family.budget, image_packing="tiles")
    check(model, processor, [noise(1, (60, 130))], "<image> Is there a dog ?")


@pytest.mark.parametrize(
    ("name", "method", "count", "video", "kinds"),
    [
        ("llava_next", "visionzip+sparsevlm", 1, False, "CLS"),
        ("llava_next", "sparsevlm", 2, False, "newline"),
        ("video_llava", "visionzip+sparsevlm", 3, True, "CLS"),
        ("mini_gemini", "visionzip", 1, False, "5 CLS"),
        ("qwen2_5_vl", "visionzip", 2, False, "merged"),
    ],
)
def test_drawings_count_what_is_left(name, method, count, video, kinds, monkeypatch):
    """Also what has no place in a picture; blocks are those of `test_what_changes_in_a_cell_changes_its_token`."""
    monkeypatch.setattr("llava_sparse.visualize.ask", lambda *_, **__: "Yes")
    family = BY_NAME[name]
    loaded = LoadedModel(family.make(), family.processor(), name, True)
    shown = [noise(n, (112, 84)) for n in range(count)]
    prompt = prompt_of(family, shown, video)
    token = "<|image_pad|>" if name.startswith("qwen") else "<video>" if video else "<image>"
    prompt = prompt.replace(token, "<image>").replace("Is there a dog ?", "{question}")
    found = trace(loaded, shown, "Is there a dog ?", method, 40 if video else family.budget, prompt, video)
    model = loaded.with_method(method, 40 if video else family.budget)
    inputs = loaded.processor(
        **{"videos" if video else "images": [shown]},
        text=[prompt.replace("<image>", token).replace("{question}", "Is there a dog ?")],
        return_tensors="pt",
    )
    outputs = model(**inputs, output_selection=True, as_passed=False)
    text = int((inputs["input_ids"] != loaded.processor.tokenizer.convert_tokens_to_ids(token)).sum())
    assert found.stages[-1].tokens == outputs.logits.shape[1] - text
    assert found.tokens == inputs["input_ids"].shape[1] - text
    figure = draw("Is there a dog ?", [found])
    assert any(kinds in axes.get_title(loc="left") for axes in figure.axes)
    assert len(figure.axes) == 1 + len(found.stages)
