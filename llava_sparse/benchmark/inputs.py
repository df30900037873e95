"""Prompts with a random picture each, or a video, for a model of any family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_sparse.modeling.pruning_cache import CACHE
from llava_sparse.modeling.pruning_record import count_visual_tokens
from llava_sparse.modeling.pruning_types import TokenCounts

FRAMES = 8
# Patches along the side of a picture that may be of any size: 1,008 pixels of 14, 1,152 of 16; 1,296 merged tokens.
GRID = 72


def make_inputs(
    model: Any, batch_size: int, text_tokens: int, seed: int = 0, grid: int | None = None
) -> dict[str, Tensor]:
    """Prompts of one random picture, or video, and `text_tokens` random words each, four of them before it.

    Args:
        grid: patches along the side of a picture, of a family whose pictures are of any size; None for `GRID`.

    Returns:
        `input_ids` and `attention_mask` `(batch, text_tokens + placeholders)`, and what the family calls pictures.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    token, count, shown = _PICTURES[config.model_type.removeprefix("sparse_")](
        config, batch_size, generator, grid or GRID
    )
    special = {token} | {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
    allowed = torch.tensor([word for word in range(config.text_config.vocab_size) if word not in special])
    words = allowed[torch.randint(len(allowed), (batch_size, text_tokens), generator=generator)]
    before = min(4, text_tokens - 1)
    if hasattr(config, "vision_start_token_id"):
        words[:, before - 1], words[:, before] = config.vision_start_token_id, config.vision_end_token_id
    ids = torch.cat([words[:, :before], torch.full((batch_size, count), token), words[:, before:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | shown
    if "image_grid_thw" in shown:
        inputs["mm_token_type_ids"] = (ids == token).long()
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def dense_tokens(config: Any, inputs: dict[str, Tensor]) -> list[int]:
    """The visual tokens of each prompt of `make_inputs` in the dense model."""
    token = config.video_token_id if "pixel_values_videos" in inputs else config.image_token_id
    counts: list[int] = (inputs["input_ids"] == token).sum(-1).tolist()
    return counts


@torch.inference_mode()
def recorded_prefill(model: Any, inputs: dict[str, Tensor]) -> tuple[list[int], int, TokenCounts]:
    """A prefill of prompts of `make_inputs`, with the record of what was kept.

    Returns:
        the tokens that each layer of the cache holds, the cache's bytes, and the visual tokens as tables count them.
    """
    pruned = getattr(model.model, "sparsifier", None) is not None
    asked = {"output_selection": True} if pruned else {}
    outputs = model(**inputs, use_cache=True, logits_to_keep=1, **asked)
    layers = getattr(outputs, CACHE).layers
    if pruned:
        counted = outputs.visual_tokens
    else:
        counted = count_visual_tokens(dense_tokens(model.config, inputs), (), len(layers))
    size = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    return [layer.keys.shape[2] for layer in layers], size, TokenCounts.of(counted)


# Of each family, by configuration: the placeholder, how many of them a picture needs, and tensors of the picture.


def _picture(config: Any, batch: int, generator: Any, grid: int) -> Any:
    side = config.vision_config.image_size
    count = (side // config.vision_config.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    return config.image_token_id, count, {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}


def _tiles(config: Any, batch: int, generator: Any, grid: int) -> Any:
    """A picture in the size of 2 x 2 tiles, or of the first pinpoint: nothing of it is padding."""
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    square, pinpoints = [2 * side] * 2, [list(pinpoint) for pinpoint in config.image_grid_pinpoints]
    height, width = square if square in pinpoints else pinpoints[0]
    rows, columns = patches * height // side, patches * width // side
    tiles = 1 + rows * columns // patches**2
    packed = getattr(config, "image_packing", "unpadded") == "tiles"
    # LLaVA-OneVision scales large pictures down behind the projector.
    most = int(getattr(config, "vision_aspect_ratio", "anyres_max_9").removeprefix("anyres_max_"))
    ratio = ((tiles - 1) / most) ** 0.5
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    count = tiles * patches**2 if packed else patches**2 + rows * (columns + 1)
    return config.image_token_id, count, {
        "pixel_values": torch.randn(batch, tiles, 3, side, side, generator=generator),
        "image_sizes": torch.tensor([[height, width]] * batch),
    }  # fmt: skip


def _mined(config: Any, batch: int, generator: Any, grid: int) -> Any:
    side, tiles = config.vision_config.image_size, config.image_grid**2 + config.image_global
    shape = (batch, 3, side, side) if tiles == 1 else (batch, tiles, 3, side, side)
    return config.image_token_id, tiles * (side // config.vision_config.patch_size) ** 2, {
        "pixel_values": torch.randn(shape, generator=generator),
        "pixel_values_aux": torch.randn(batch, 3, *[config.image_size_aux] * 2, generator=generator),
    }  # fmt: skip


def _video(config: Any, batch: int, generator: Any, grid: int) -> Any:
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    stride = getattr(config, "spatial_pool_stride", None)
    frame = patches**2 + 1 if stride is None else (patches // stride) ** 2
    pixels = torch.randn(batch, FRAMES, 3, side, side, generator=generator)
    return config.video_token_id, FRAMES * frame, {"pixel_values_videos": pixels}


def _any_size(config: Any, batch: int, generator: Any, grid: int) -> Any:
    vision = config.vision_config
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return config.image_token_id, (grid // vision.spatial_merge_size) ** 2, {
        "pixel_values": torch.randn(batch * grid**2, channels, generator=generator),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * batch),
    }  # fmt: skip


_PICTURES = {
    "llava": _picture,
    "llava_next": _tiles,
    "llava_onevision": _tiles,
    "llava_next_video": _video,
    "video_llava": _video,
    "mini_gemini": _mined,
    "qwen2_vl": _any_size,
    "qwen2_5_vl": _any_size,
    "qwen3_vl": _any_size,
}
