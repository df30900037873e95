"""Tiny random models of the Qwen-VL families, and prompts with pictures and videos of any size for them."""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.processing_utils import ProcessorMixin

SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
START, END, VIDEO, IMAGE = range(len(tiny.WORDS), len(tiny.WORDS) + len(SPECIAL))
PATCH = 3 * 2 * 14 * 14
LAYERS = 6

TEXT = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.15,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
)
SIZES = dict(depth=3, num_heads=2, patch_size=14, initializer_range=0.15)
KINDS: dict[str, Any] = {
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        dict(hidden_size=32, intermediate_size=64, window_size=56, fullatt_block_indexes=[1, 2], out_hidden_size=64),
    ),
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        dict(embed_dim=32, hidden_size=64, mlp_ratio=2),
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        dict(
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=64,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1, 2],
        ),
    ),
}
TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


@lru_cache
def _made(kind: str, **vision: Any) -> Any:
    torch.manual_seed(0)
    make_config, make, own = KINDS[kind]
    text: dict[str, Any] = dict(TEXT)
    if kind == "qwen3_vl":
        text |= {"head_dim": 16, "rope_parameters": {**TEXT["rope_parameters"], "mrope_interleaved": True}}
    config = make_config(
        text_config=text, vision_config={**SIZES, **own, **vision}, tie_word_embeddings=False, **TOKENS
    )
    model = make(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def dense_model(kind: str = "qwen2_5_vl", attention: str = "sdpa", **vision: Any) -> Any:
    model = copy.deepcopy(_made(kind, **{name: tuple(value) for name, value in vision.items()}))
    model.set_attn_implementation(attention)
    return model


def prompt(parts: list[Any], seed: int = 0, by_frame: bool = False) -> dict[str, torch.Tensor]:
    """A prompt of words, and of grids `(t, h, w)` of patches: pictures where t is 1, else videos."""
    random = torch.Generator().manual_seed(seed)
    ids, grids, pixels = [], {"image": [], "video": []}, {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        kind = "image" if part[0] == 1 else "video"
        patches = part[0] * part[1] * part[2]
        runs = part[0] if by_frame else 1
        ids += [START, *[IMAGE if kind == "image" else VIDEO] * (patches // 4 // runs), END] * runs
        grids[kind].append(part)
        pixels[kind].append(torch.randn(patches, PATCH, generator=random))
    made = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            made |= {name: torch.cat(pixels[kind]), f"{kind}_grid_thw": torch.tensor(grids[kind])}
    return typed(made)


def typed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = inputs["input_ids"]
    return {**inputs, "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def batch(prompts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Several prompts, padded on the left."""
    length = max(x["input_ids"].shape[1] for x in prompts)
    made = {
        name: torch.cat([torch.nn.functional.pad(x[name], (length - x[name].shape[1], 0)) for x in prompts])
        for name in ("input_ids", "attention_mask")
    }
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        found = [x[name] for x in prompts if name in x]
        made |= {name: torch.cat(found)} if found else {}
    return typed(made)


# (width, height)
SIZES_OF_PICTURES = [(168, 84), (84, 112), (56, 140), (112, 112)]


def processor(cls: Any, **settings: Any) -> Any:
    """For pictures alone: the processor of videos needs torchvision."""
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    images = kind(size={"shortest_edge": 16 * 14**2, "longest_edge": 144 * 14**2})
    with patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None):
        return cls(image_processor=images, tokenizer=tokenizer, video_processor=None, **settings)


def from_texts(processor: Any, texts: list[str], seed: int) -> dict[str, torch.Tensor]:
    """What a processor gives for texts, with a picture of another size for each `<image>`."""
    sizes = [SIZES_OF_PICTURES[(seed + i) % 4] for i in range(sum(text.count("<image>") for text in texts))]
    pictures = [tiny.image(seed + i).resize(size, Image.Resampling.BICUBIC) for i, size in enumerate(sizes)] or None
    written = [text.replace("<image>", "<|vision_start|> <|image_pad|> <|vision_end|>") for text in texts]
    return dict(processor(images=pictures, text=written, return_tensors="pt", padding=True))


def save_checkpoint(model: Any, folder: Path) -> Path:
    """Writes a stock model under the key names that those on the Hub have."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    if model.config.model_type != "qwen3_vl":
        weights = {re.sub(r"^model\.language_model\.", "model.", key): value for key, value in weights.items()}
        weights = {re.sub(r"^model\.visual\.", "visual.", key): value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
