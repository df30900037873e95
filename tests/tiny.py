"""Builds tiny random LLaVA models, a tokenizer, a processor and pictures."""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from cases import CASES
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

__all__ = ["CASES", "PATCHES", "config", "dense_model", "image", "inputs", "processor", "save_checkpoint"]

PATCHES = 16
SIDE = 56
LAYERS = 6
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PLAIN = """USER: ASSISTANT: Is there a an in the image ? . , Yes No What dog cat car tree red blue big small of on with
two three left right up down"""
WORDS = SPECIAL + PLAIN.split()
QUESTIONS = [
    "USER: <image> Is there a dog in the image ? ASSISTANT:",
    "USER: <image> What red car on the left with two big blue tree ? ASSISTANT:",
    "USER: <image> No ? ASSISTANT:",
]


def text_config(backbone: str = "llama"):
    common = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    return {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[backbone](**common)


def vision_config():
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=14,
        initializer_range=0.15,
    )


def config(backbone: str = "llama", **changes) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(backbone),
        image_token_index=4,
        image_seq_length=PATCHES,
        **changes,
    )


def dense_model(backbone: str = "llama", seed: int = 0, **changes) -> LlavaForConditionalGeneration:
    """A model of its own for each caller; copying one takes half the time of making it."""
    model, state = _made(backbone, seed) if not changes else _make(backbone, seed, **changes)
    torch.set_rng_state(state)
    return model if changes else copy.deepcopy(model)


def _make(backbone: str, seed: int, **changes) -> tuple[LlavaForConditionalGeneration, torch.Tensor]:
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(backbone, **changes)).eval()
    for projection in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(projection.weight, std=0.2)
    for part in model.model.vision_tower.encoder.layers:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            torch.nn.init.normal_(getattr(part.self_attn, name).weight, std=0.25)
    model.generation_config.pad_token_id = 0
    return model, torch.get_rng_state()


# Never handed out itself.
_made = lru_cache(_make)


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def processor(cls=LlavaProcessor, side: int = SIDE, **kwargs):
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return cls(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:",
        **kwargs,
    )


def image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def inputs(processor, texts: list[str] | str, seed: int = 0, **kwargs) -> dict[str, torch.Tensor]:
    """Processor output for prompts, a different picture for each `<image>` in them."""
    texts = [texts] if isinstance(texts, str) else texts
    count = sum(text.count("<image>") for text in texts)
    pictures = [image(seed + i) for i in range(count)] or None
    return dict(processor(images=pictures, text=texts, return_tensors="pt", padding=True, **kwargs))


def save_checkpoint(folder: Path, backbone: str = "llama") -> Path:
    """Writes a stock checkpoint under the key names that LLaVA checkpoints on the Hub have."""
    return save_under_old_names(dense_model(backbone), processor(), folder)


def save_under_old_names(model, processor, folder: Path) -> Path:
    """Writes a stock model of the LLaVA kind, under the names of before transformers 5, and its processor, if any."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    renamed = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^model\.language_model\.", "language_model.model.", key)
        key = re.sub(r"^lm_head\.", "language_model.lm_head.", key)
        key = re.sub(r"^model\.(vision|image|video)_tower\.", r"\1_tower.vision_model.", key)
        renamed[key.removeprefix("model.")] = value.contiguous()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
