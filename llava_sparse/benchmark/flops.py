"""Arithmetic of a prefill: counted by formula, and as torch sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


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


def vision_flops(config: Any, lengths: Sequence[int]) -> float:
    """Of a CLIP tower and its patch embedding, for one image.

    Args:
        lengths: tokens with CLS that enter each layer, and those that leave the last one.
    """
    d, m = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    embedding = 2 * patches * config.num_channels * config.patch_size**2 * d
    layers = sum(8 * n * d * d + 4 * n * n * d + 4 * left * d * m for n, left in pairwise(lengths))
    return float(embedding + layers)


def projector_flops(config: Any, tokens: int) -> float:
    """Of LLaVA's two matrices, for `tokens` visual tokens."""
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
    return 2.0 * tokens * (vision * text + text * text)


def prefill_flops(model: Any, lengths: Sequence[int]) -> dict[str, float]:
    """By formula, for one prompt with one image.

    Args:
        lengths: tokens at each decoder layer.

    Of a selection, what grows with the square of a size: see the methods' `flops`. Stock LLaVA runs the tower's layers
    behind its feature layer and throws them away; a pruned model stops.
    """
    config, vision = model.config, model.config.vision_config
    depth = vision.num_hidden_layers
    patches = (vision.image_size // vision.patch_size) ** 2
    sparsifier = getattr(model.model, "sparsifier", None)
    encoder = getattr(sparsifier, "encoder", None)
    used, selection, projected = depth, 0.0, patches + (config.vision_feature_select_strategy == "full")
    if sparsifier is not None:
        chosen = config.vision_feature_layer
        layers = [chosen] if isinstance(chosen, int) else list(chosen)
        used = max(layer % (depth + 1) for layer in layers) if encoder is None else encoder.feature_layer % depth + 1
    tower = [patches + 1] * (used + 1)
    if encoder is not None:
        selection = encoder.flops(patches, vision.hidden_size, config.text_config.hidden_size)
        projected = patches if encoder.inside is None else encoder.inside.tokens
        tower = encoder.tower_tokens(used, depth, patches)
    return {
        "vision tower": vision_flops(vision, tower),
        "projector": projector_flops(config, projected),
        "selection": selection,
        "decoder": decoder_flops(config.text_config, lengths),
    }


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def measured_flops(call: Callable[[], Any]) -> float:
    """What torch counts in a call: matrix products, convolutions and attention."""
    # torch does not know the CPU's fused attention.
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        call()
    return float(counter.get_total_flops())
