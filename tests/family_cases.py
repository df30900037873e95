"""The one table of model families that the shared tests cross with methods. A new family adds a row.

A row says how to make a tiny random stock model and its processors, and what stands for a picture; the tests in
`tests/families` do the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tiny
import tiny_qwen
import torch
import transformers
from PIL import Image
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)
from transformers.processing_utils import ProcessorMixin

import llava_sparse
from llava_sparse.modeling.modeling_sparse_video_llava import PIXELS

# Rows of different lengths, with two pictures, one, and none.
TEXTS = [
    "USER: <image> <image> Is there a dog in the image ? ASSISTANT:",
    "USER: Is there a cat ? ASSISTANT:",
    "USER: <image> What red car on the left with two big blue tree ? ASSISTANT:",
]
# One of each place: in the tower, behind the projector (with token sizes), in the decoder.
FAST = ("visionzip", "delegate", "sparsevlm")
METHODS = (
    *FAST, "cdpruner", "divprune", "visionzip+sparsevlm",
    "vispruner", "scope", "tome", "random", "eadp", "fastv", "pyramiddrop", "random_decoder", "divprune+fastv",
    "tome+delegate",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: the stock `model_type`; make: a stock model of its own for each call, with random weights.
        processor: the stock processor, or, with `sparse_*` settings, ours.
        inputs: of a processor, prompts and the number of the first picture, what the processor gives for them, with
            other pictures, of other sizes where the family knows sizes, for each placeholder.
        budget: tokens of a picture, fewer than any has, for all methods.
        save: writes a stock checkpoint, under the key names that those on the Hub have, and its processor to a folder.
        texts: prompts of different lengths and numbers of pictures, one of them without.
        dense_at_all: methods that with `budget=1.0` are the dense model.
        shortens: whether our processor writes fewer placeholders with encoder methods.
        saves_processor: whether its processors can be saved and loaded where torchvision is not installed.
        refused: methods that the family refuses, and words of the message.
        slow: of a family that other tests cross with all methods: the slow tests alone cross it again.
    """

    name: str
    make: Callable[[], Any]
    processor: Callable[..., Any]
    inputs: Callable[[Any, list[str], int], dict[str, torch.Tensor]]
    budget: int
    save: Callable[[Path], Path]
    texts: list[str] = field(default_factory=lambda: TEXTS, hash=False)
    dense_at_all: tuple[str, ...] = ("divprune", "eadp", "fastv", "pyramiddrop")
    shortens: bool = True
    saves_processor: bool = True
    refused: dict[str, str] = field(default_factory=dict, hash=False)
    slow: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def methods(self) -> list[str]:
        return [name for name in METHODS if name not in self.refused]


def shown(texts: list[str], seed: int, picture: Callable[[int], Image.Image]) -> dict[str, list]:
    """A picture for each `<image>` and three frames for each `<video>`, by their number among both."""
    given: dict[str, list] = {"images": [], "videos": []}
    places = re.findall("<image>|<video>", " ".join(texts))
    for number, place in enumerate(places, start=seed):
        if place == "<image>":
            given["images"].append(picture(number))
        else:
            given["videos"].append([tiny.image(100 * number + frame) for frame in range(3)])
    return {name: values for name, values in given.items() if values}


def sparse_or_stock(stock: type, settings: dict[str, Any]) -> type:
    return getattr(llava_sparse, f"Sparse{stock.__name__}") if settings else stock


# --- LLaVA-1.5 ---------------------------------------------------------------------------------------------------

LLAVA = Family(
    name="llava",
    make=tiny.dense_model,
    processor=lambda **settings: tiny.processor(sparse_or_stock(transformers.LlavaProcessor, settings), **settings),
    inputs=lambda processor, texts, seed=0: tiny.inputs(processor, texts, seed),
    budget=6,
    save=tiny.save_checkpoint,
    dense_at_all=("divprune", "eadp", "fastv", "pyramiddrop", "scope", "vispruner", "random", "cdpruner"),
    slow=True,
)

# --- LLaVA-NeXT --------------------------------------------------------------------------------------------------

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
# (width, height): wide, tall, nearly square, and very wide; most of them are padded.
SIZES = [(100, 52), (40, 90), (90, 84), (150, 44)]


def next_model(backbone: str = "llama") -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT around the parts of `tiny.dense_model`."""
    dense = tiny.dense_model(backbone)
    config = LlavaNextConfig(
        vision_config=tiny.vision_config(),
        text_config=tiny.text_config(backbone),
        image_token_index=4,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=tiny.PATCHES,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    told = model.load_state_dict(dense.state_dict(), strict=False)
    assert told.missing_keys == ["model.image_newline"] and not told.unexpected_keys
    model.generation_config.pad_token_id = 0
    return model


def next_processor(**settings: Any) -> Any:
    kind = getattr(transformers, "LlavaNextImageProcessorPil", None) or transformers.LlavaNextImageProcessor
    stock = tiny.processor()
    return sparse_or_stock(LlavaNextProcessor, settings)(
        image_processor=kind(
            size={"shortest_edge": tiny.SIDE},
            crop_size={"height": tiny.SIDE, "width": tiny.SIDE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=tiny.tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=stock.chat_template,
        **settings,
    )


def next_picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SIZES[seed % len(SIZES)], Image.Resampling.BICUBIC)


def next_inputs(processor: Any, texts: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(processor(**shown(texts, seed, next_picture), text=texts, return_tensors="pt", padding=True))


def next_checkpoint(folder: Path, backbone: str = "llama") -> Path:
    return tiny.save_under_old_names(next_model(backbone), next_processor(), folder)


LLAVA_NEXT = Family(
    name="llava_next",
    make=next_model,
    processor=next_processor,
    inputs=next_inputs,
    budget=20,
    save=next_checkpoint,
)

# --- LLaVA-OneVision ---------------------------------------------------------------------------------------------


def onevision_model() -> LlavaOnevisionForConditionalGeneration:
    """SigLIP and Qwen2; pictures of more than two tiles are scaled down behind the projector."""
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=tiny.SIDE,
            patch_size=14, vision_use_head=False, initializer_range=0.15,
        ),
        text_config=tiny.text_config("qwen2"),
        image_token_index=4,
        video_token_index=len(tiny.WORDS),
        image_grid_pinpoints=[[56, 56], *PINPOINTS],
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    for part in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(part.weight, std=0.2)
    model.generation_config.pad_token_id = 0
    return model


class Frames:
    """Stands for the stock video processor, which needs torchvision: frames as the image processor has pictures."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __call__(self, videos: list[list[Image.Image]], **kwargs: Any) -> dict[str, torch.Tensor]:
        pixels = [next(iter(self.images(video, return_tensors="pt").values())) for video in videos]
        # Of an image processor that cuts tiles, the first of each.
        return {"pixel_values_videos": torch.stack([x if x.dim() == 4 else x[:, 0] for x in pixels])}


def onevision_processor(**settings: Any) -> Any:
    kind = getattr(transformers, "LlavaOnevisionImageProcessorPil", None) or transformers.LlavaOnevisionImageProcessor
    images = kind(size={"height": tiny.SIDE, "width": tiny.SIDE}, image_grid_pinpoints=[[56, 56], *PINPOINTS])
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    with patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None):
        return sparse_or_stock(LlavaOnevisionProcessor, settings)(
            image_processor=images,
            tokenizer=tokenizer,
            video_processor=Frames(images),
            num_image_tokens=tiny.PATCHES,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            chat_template=tiny.processor().chat_template,
            **settings,
        )


TOWER = {name: "works in a CLIP vision tower" for name in METHODS if "visionzip" in name}
TOWER |= dict.fromkeys(("vispruner", "scope", "tome", "random", "tome+delegate"), "works in a CLIP vision tower")
LLAVA_ONEVISION = Family(
    name="llava_onevision",
    make=onevision_model,
    processor=onevision_processor,
    inputs=next_inputs,
    budget=14,
    save=lambda folder: tiny.save_under_old_names(onevision_model(), None, folder),
    texts=[*TEXTS, "USER: <video> What <image> dog ? ASSISTANT:"],
    saves_processor=False,
    refused=TOWER,
)

# --- LLaVA-NeXT-Video --------------------------------------------------------------------------------------------


def next_video_model() -> LlavaNextVideoForConditionalGeneration:
    dense = tiny.dense_model()
    config = LlavaNextVideoConfig(
        vision_config=tiny.vision_config(),
        text_config=tiny.text_config(),
        image_token_index=4,
        video_token_index=len(tiny.WORDS),
        image_grid_pinpoints=PINPOINTS,
    )
    model = LlavaNextVideoForConditionalGeneration(config).eval()
    told = model.load_state_dict(dense.state_dict(), strict=False)
    assert told.missing_keys == ["model.image_newline"] and not told.unexpected_keys
    model.generation_config.pad_token_id = 0
    return model


def next_video_processor(**settings: Any) -> Any:
    stock = next_processor()
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    with patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None):
        return sparse_or_stock(LlavaNextVideoProcessor, settings)(
            video_processor=Frames(stock.image_processor),
            image_processor=stock.image_processor,
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=stock.chat_template,
            **settings,
        )


LLAVA_NEXT_VIDEO = Family(
    name="llava_next_video",
    make=next_video_model,
    processor=next_video_processor,
    inputs=next_inputs,
    budget=20,
    save=lambda folder: tiny.save_under_old_names(next_video_model(), None, folder),
    saves_processor=False,
    slow=True,
)

# --- Video-LLaVA -------------------------------------------------------------------------------------------------


def video_model(backbone: str = "llama") -> VideoLlavaForConditionalGeneration:
    """A Video-LLaVA around the decoder and the projector of `tiny.dense_model`; its towers differ."""
    dense = tiny.dense_model(backbone)
    torch.manual_seed(2)
    config = VideoLlavaConfig(
        vision_config=tiny.vision_config(),
        text_config=tiny.text_config(backbone),
        image_token_index=4,
        video_token_index=len(tiny.WORDS),
    )
    config.text_config.max_position_embeddings = 1024
    model = VideoLlavaForConditionalGeneration(config).eval()
    told = model.load_state_dict(dense.state_dict(), strict=False)
    assert all("_tower." in key for key in (*told.missing_keys, *told.unexpected_keys))
    for tower in (model.model.image_tower, model.model.video_tower):
        for layer in tower.encoder.layers:
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                torch.nn.init.normal_(getattr(layer.self_attn, name).weight, std=0.25)
    model.generation_config.pad_token_id = 0
    return model


def video_processor(**settings: Any) -> Any:
    size = {"shortest_edge": tiny.SIDE}
    images = VideoLlavaImageProcessor(size=size, crop_size={"height": tiny.SIDE, "width": tiny.SIDE})
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    with patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None):
        return sparse_or_stock(VideoLlavaProcessor, settings)(
            image_processor=images, video_processor=Frames(images), tokenizer=tokenizer, **settings
        )


def video_inputs(processor: Any, texts: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """What the processor calls an image's pixels is not always what the model of the same release does."""
    inputs = next_inputs(processor, texts, seed)
    return {
        PIXELS if name.startswith("pixel_values") and "video" not in name else name: x for name, x in inputs.items()
    }


VIDEO_LLAVA = Family(
    name="video_llava",
    make=video_model,
    processor=video_processor,
    inputs=video_inputs,
    budget=16,
    save=lambda folder: tiny.save_under_old_names(video_model(), None, folder),
    texts=[*TEXTS, "USER: <image> Is <video> a dog ? ASSISTANT:", "USER: <video> What tree ? ASSISTANT:"],
    dense_at_all=("divprune", "eadp", "fastv", "pyramiddrop", "scope", "random", "cdpruner"),
    saves_processor=False,
    refused={"tome+delegate": "each frame keeps its CLS beside what tome leaves"},
)

# --- Mini-Gemini -------------------------------------------------------------------------------------------------

# In four tiles and as a whole, each of 16 patches; every patch mines 4 x 4 vectors.
GEMINI = {"image_size_aux": 128, "image_grid": 2, "image_global": True}


def gemini_model(backbone: str = "llama", **changes: Any) -> Any:
    """A dense Mini-Gemini around the parts of `tiny.dense_model`."""
    torch.manual_seed(1)
    config = llava_sparse.SparseMiniGeminiConfig(
        vision_config=tiny.vision_config(),
        text_config=tiny.text_config(backbone),
        image_token_index=4,
        aux_hidden_sizes=[8, 12, 16, 20],
        aux_depths=[1, 1, 2, 1],
        **(GEMINI | changes),
    )
    model = llava_sparse.SparseMiniGeminiForConditionalGeneration(config).eval()
    told = model.load_state_dict(tiny.dense_model(backbone).state_dict(), strict=False)
    assert not told.unexpected_keys and all("aux" in key or "vlm_uni" in key for key in told.missing_keys)
    for part in (model.model.vlm_uni_query_projector, model.model.vlm_uni_aux_projector):
        torch.nn.init.normal_(part[1].weight, std=0.3)
    torch.nn.init.normal_(model.model.vlm_uni_val_projector[1].weight, std=0.1)
    model.generation_config.pad_token_id = 0
    return model


def gemini_processor(**settings: Any) -> Any:
    return tiny.processor(llava_sparse.SparseMiniGeminiProcessor, **(GEMINI | settings))


def gemini_checkpoint(folder: Path, backbone: str = "llama") -> Path:
    """Under published key names, to which saving turns them back."""
    gemini_model(backbone).save_pretrained(folder)
    gemini_processor().save_pretrained(folder)
    return folder


MINI_GEMINI = Family(
    name="mini_gemini",
    make=gemini_model,
    processor=gemini_processor,
    inputs=next_inputs,
    budget=20,
    save=gemini_checkpoint,
    dense_at_all=("divprune", "eadp", "fastv", "pyramiddrop", "scope", "vispruner", "random", "cdpruner"),
)

# --- Qwen-VL -----------------------------------------------------------------------------------------------------


def qwen(name: str, prefix: str) -> Family:
    stock = getattr(transformers, f"{prefix}Processor")
    needs_cls = "which '.*_vision' is not made for; supported: cdpruner"
    return Family(
        name=name,
        make=lambda: tiny_qwen.dense_model(name),
        processor=lambda **settings: tiny_qwen.processor(sparse_or_stock(stock, settings), **settings),
        inputs=lambda processor, texts, seed=0: tiny_qwen.from_texts(processor, texts, seed),
        budget=6,
        save=lambda folder: tiny_qwen.save_checkpoint(tiny_qwen.dense_model(name), folder),
        dense_at_all=("visionzip", "divprune", "eadp", "fastv", "pyramiddrop", "random", "cdpruner", "delegate"),
        shortens=False,
        saves_processor=False,
        slow=True,
        refused=dict.fromkeys(("tome", "scope", "vispruner", "tome+delegate"), needs_cls),
    )


FAMILIES = [
    LLAVA,
    LLAVA_NEXT,
    LLAVA_NEXT_VIDEO,
    LLAVA_ONEVISION,
    VIDEO_LLAVA,
    MINI_GEMINI,
    qwen("qwen2_vl", "Qwen2VL"),
    qwen("qwen2_5_vl", "Qwen2_5_VL"),
    qwen("qwen3_vl", "Qwen3VL"),
]
