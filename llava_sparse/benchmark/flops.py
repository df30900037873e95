"""Arithmetic of a prefill: counted by formula, and as torch sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .inputs import dense_tokens


def decoder_flops(config: Any, lengths: Sequence[int]) -> float:
    """Of a LLaMA decoder and the logits of one token; the tokens at each layer are `lengths`.

    The paper (arXiv 2410.04417, equation 12) counts 4 n d^2 + 2 n^2 d + 2 n d m a layer: multiply-adds, a multilayer
    perceptron of two matrices, as many key as query heads. Here, in operations (two a multiply-add), with LLaMA's three
    matrices and h query and k key-value heads of size s: 2 n d (2 h s + 2 k s) + 4 n^2 h s + 6 n d m. Attention is
    counted whole, as torch counts it, though a causal kernel does half of it.
    """
    d, m = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or d // config.num_attention_heads
    query = config.num_attention_heads * size
    keys = config.num_key_value_heads * size
    layers = sum(2 * n * d * (2 * query + 2 * keys) + 4 * n * n * query + 6 * n * d * m for n in lengths)
    return float(layers + 2 * d * config.vocab_size)


def causal_savings(config: Any, lengths: Sequence[int]) -> float:
    """Operations of `decoder_flops` that a causal kernel leaves out: the attention of tokens to those behind them."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(sum(2 * n * (n - 1) * config.num_attention_heads * size for n in lengths))


def vision_flops(config: Any, lengths: Sequence[int]) -> float:
    """Of a CLIP or SigLIP tower and its patch embedding, for one image.

    Args:
        lengths: tokens, with CLS where there is one, that enter each layer, and those that leave the last one.
    """
    d, m = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    embedding = 2 * patches * config.num_channels * config.patch_size**2 * d
    layers = sum(8 * n * d * d + 4 * n * n * d + 4 * left * d * m for n, left in pairwise(lengths))
    return float(embedding + layers)


def merging_flops(config: Any, rows: int, columns: int) -> float:
    """Of a Qwen-VL's tower, for one picture of so many patches, with what merges these into tokens behind it."""
    n, d = rows * columns, config.hidden_size
    merge, out = config.spatial_merge_size**2, getattr(config, "out_hidden_size", config.hidden_size)
    if hasattr(config, "embed_dim"):
        d, inner = config.embed_dim, 4 * config.embed_dim * int(config.embed_dim * config.mlp_ratio)
    else:
        # Qwen2.5-VL's multilayer perceptron has three matrices.
        matrices = 3 if hasattr(config, "window_size") else 2
        inner = 2 * matrices * d * config.intermediate_size
    pairs = [n * n] * config.depth
    if hasattr(config, "window_size"):
        inside = _pairs_in_windows(config, rows) * _pairs_in_windows(config, columns)
        pairs = [n * n if block in config.fullatt_block_indexes else inside for block in range(config.depth)]
    embedding = 2 * n * config.in_channels * config.temporal_patch_size * config.patch_size**2 * d
    mergers = 1 + len(getattr(config, "deepstack_visual_indexes", ()))
    merging = mergers * 2 * (n / merge) * (merge * d) * (merge * d + out)
    return float(embedding + config.depth * n * (8 * d * d + inner) + 4 * d * sum(pairs) + merging)


def _pairs_in_windows(config: Any, patches: int) -> int:
    """Of one side of a picture: the squares of the windows' lengths, summed."""
    whole, rest = divmod(patches, config.window_size // config.patch_size)
    return whole * (config.window_size // config.patch_size) ** 2 + rest**2


def mining_flops(config: Any, tiles: int) -> float:
    """Of Mini-Gemini's ConvNeXt, for one picture, and of what the tokens of its `tiles` find there."""
    side, before, total = config.image_size_aux // 4, 3, 0
    for stage, (width, depth) in enumerate(zip(config.aux_hidden_sizes, config.aux_depths, strict=True)):
        side //= 1 if stage == 0 else 2
        total += 2 * side**2 * (16 if stage == 0 else 4) * before * width
        total += depth * side**2 * (2 * 49 * width + 16 * width**2)
        before = width
    vision, high = config.vision_config, sum(config.aux_hidden_sizes)
    patches, d = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    # Every tile has a square of its own, a grid's part of the picture; the whole one is shrunk to that size.
    found = (config.image_size_aux // 4 // config.image_grid) ** 2
    return float(total + tiles * (2 * patches * d * d + 4 * found * high * d + 4 * found * d))


def projector_flops(config: Any, tokens: int) -> float:
    """Of LLaVA's two matrices, for `tokens` visual tokens."""
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
    return 2.0 * tokens * (vision * text + text * text)


def prefill_flops(model: Any, inputs: dict[str, Tensor], lengths: Sequence[int]) -> dict[str, float]:
    """By formula, for one prompt of `make_inputs`.

    Args:
        inputs: of one prompt or more, of which the shapes count; lengths: tokens at each decoder layer.

    Of a selection, what grows with the square of a size: see the methods' `flops`. Stock LLaVA runs the tower's layers
    behind its feature layer and throws them away; a pruned model stops.
    """
    config, batch = model.config, len(inputs["input_ids"])
    tokens = dense_tokens(config, inputs)[0]
    decoder = decoder_flops(config.text_config, lengths)
    if "image_grid_thw" in inputs:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        tower = merging_flops(config.vision_config, rows, columns)
        selection = sum(x.flops(tokens, 0, config.text_config.hidden_size) for x in encoders_of(model, inputs, tokens))
        if any(x.needs_attention for x in encoders_of(model, inputs, tokens)):
            # Queries, keys and values of the last block once more, and their product.
            n, d = rows * columns, getattr(config.vision_config, "embed_dim", config.vision_config.hidden_size)
            selection += 6 * n * d * d + 2 * n * n * d
        return {"vision tower": tower, "projector": 0.0, "selection": selection, "decoder": decoder}
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
    units = pixels.shape[:-3].numel() // batch  # type: ignore[union-attr]
    return _of_towers(model, inputs, tokens, units) | {"decoder": decoder}


def _of_towers(model: Any, inputs: dict[str, Tensor], tokens: int, units: int) -> dict[str, float]:
    """Of a tower that sees `units` pictures, tiles or frames of a prompt, of `tokens` visual tokens when dense."""
    config, vision = model.config, model.config.vision_config
    depth, patches = vision.num_hidden_layers, (vision.image_size // vision.patch_size) ** 2
    encoders = encoders_of(model, inputs, tokens)
    clip, full = "clip" in vision.model_type, config.vision_feature_select_strategy == "full"
    used = depth
    if clip and (getattr(model.model, "sparsifier", None) is not None or not getattr(model.model, "has_stock", True)):
        chosen = config.vision_feature_layer
        used = max(layer % (depth + 1) for layer in ([chosen] if isinstance(chosen, int) else chosen))
        used = encoders[0].feature_layer % depth + 1 if encoders else used
    through = encoders[0].tower_tokens(used, depth, patches) if encoders and clip else [patches + clip] * (used + 1)
    towers, selection = units * vision_flops(vision, through), 0.0
    projected = units * (patches + (clip and (full or "pixel_values_videos" in inputs)))
    if encoders:
        # Of a picture, or of each of its tiles or frames.
        seen = patches if len(encoders) == units else tokens
        selection = sum(x.flops(seen, vision.hidden_size, config.text_config.hidden_size) for x in encoders)
        inside = [x.inside for x in encoders if x.inside is not None]
        if inside:
            apart = "pixel_values_videos" in inputs
            projected = sum(x.tokens + (apart and not x.keeps_cls) for x in inside)
    if hasattr(config, "spatial_pool_stride") and "pixel_values_videos" in inputs:
        projected = tokens
    if "pixel_values_aux" in inputs:
        towers += mining_flops(config, units)
    return {"vision tower": towers, "projector": projector_flops(config, projected), "selection": selection}


def encoders_of(model: Any, inputs: dict[str, Tensor], tokens: int) -> list[Any]:
    """What reduces the picture of a prompt, of so many tokens when dense: an encoder method for each of its parts."""
    method = getattr(model.model, "sparsifier", None)
    if method is None or method.encoder is None:
        return []
    sizes = inputs.get("image_sizes")
    size = tokens if sizes is None else (tokens, model.model.tile_grids(sizes[:1])[0])
    encoders: list[Any] = model.model.encoders_for(method, size)
    return encoders


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def measured_flops(call: Callable[[], Any]) -> float:
    """What torch counts in a call: matrix products, convolutions and attention."""
    # torch does not know the CPU's fused attention.
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        call()
    return float(counter.get_total_flops())
