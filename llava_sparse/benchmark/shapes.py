"""Models of a published shape with random weights, made on the device: what they cost does not need what they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import llava_sparse
from llava_sparse.evaluation.model import load_model, resolve_device, resolve_dtype
from llava_sparse.evaluation.plan import DENSE
from llava_sparse.modeling.pruning_settings import nearest

_VIT_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
# Text and vision; "small" is bound by arithmetic on a CPU and has about the 7B's share of work in its tower.
SHAPES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "llava-1.5-7b": (
        dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        _VIT_L,
    ),
    "llava-1.5-13b": (
        dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
        _VIT_L,
    ),
    "small": (
        dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8),
        dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4),
    ),
}
VOCABULARY, IMAGE_TOKEN = 32064, 32000
SIDE, PATCH = 336, 14


def build_model(shape: str, dtype: torch.dtype, device: torch.device | str) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights.

    Args:
        shape: one of `SHAPES`.

    Raises:
        ValueError: for another name.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r}{nearest(shape, list(SHAPES))}: allowed: {', '.join(SHAPES)}.")
    text, vision = SHAPES[shape]
    config = LlavaConfig(
        text_config=LlamaConfig(**text, vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=False),
        vision_config=CLIPVisionConfig(**vision, image_size=SIDE, patch_size=PATCH),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            torch.manual_seed(0)
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    # Nothing ends an answer: all runs say as much as they are asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def open_model(model: Any, shape: str | None, dtype: str = "auto", device: str = "auto", **memory: Any) -> Any:
    """A dense LLaVA: a loaded one, without its method if it has one; by Hub id or folder; or of a shape.

    None for both is the reference model; `memory` is what `load_model` takes beside dtype and device.

    Raises:
        ValueError: for a model and a shape, an unknown shape, dtype or device, or what is no LLaVA.
        OSError: if it cannot be read.
    """
    if shape is not None and model is not None:
        raise ValueError("model, shape: one of them is allowed.")
    if shape is not None:
        if any(memory.values()):
            raise ValueError(f"shape: random weights are not quantised or spread; {', '.join(memory)} go with a model.")
        chosen = resolve_device(device)
        kind = resolve_dtype(dtype, chosen)
        return build_model(shape, kind if isinstance(kind, torch.dtype) else torch.bfloat16, chosen)
    if model is None or isinstance(model, str | Path):
        return load_model(model, dtype, device, **memory).with_method(DENSE)
    return llava_sparse.sparsify(model, None) if getattr(model.config, "sparse_method", None) else model


def make_inputs(model: Any, batch_size: int, text_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of one random picture and `text_tokens` random words each, four of them before the picture.

    Returns:
        `input_ids` and `attention_mask` `(batch, text_tokens + placeholders)`, `pixel_values`.
    """
    config = model.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    placeholders = (side // patch) ** 2 + (config.vision_feature_select_strategy == "full")
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(config.text_config.vocab_size, (batch_size, text_tokens), generator=generator)
    words = torch.where(words == config.image_token_id, words.new_tensor(config.image_token_id - 1).abs(), words)
    before = min(4, text_tokens - 1)
    image = torch.full((batch_size, placeholders), config.image_token_id)
    ids = torch.cat([words[:, :before], image, words[:, before:]], dim=1)
    pixels = torch.randn(batch_size, 3, side, side, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
