"""Published models, their sizes as `config.json` has them: what recipes, the benchmark and tables of memory share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .families import FAMILIES, Family

Settings = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        title: as papers call it; checkpoint: on the Hub.
        config, processor: what config.json and processor_config.json hold besides the `sparse_*` settings; a processor
            that needs more files than that is None.
    """

    title: str
    checkpoint: str
    config: Settings
    processor: Settings | None = None

    @property
    def family(self) -> Family:
        """The family of models that it is of."""
        return FAMILIES[self.config["model_type"].removeprefix("sparse_")]


def model(
    model_type: str, title: str, checkpoint: str, config: Settings, processor: Settings | None = None
) -> Published:
    """A published model of a family."""
    family = FAMILIES[model_type]
    known = {
        "architectures": [f"Sparse{family.prefix}ForConditionalGeneration"],
        "dtype": "float16",
        "model_type": family.sparse_type,
        "tie_word_embeddings": False,
    }
    return Published(title, checkpoint, known | config, processor)


# --- Parts ---------------------------------------------------------------------------------------------------------

LLAMA_7B: Settings = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
}
LLAMA_13B: Settings = LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B: Settings = LLAMA_7B | {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
}
QWEN2_7B: Settings = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "vocab_size": 152064,
}
MROPE: Settings = {"rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1000000.0, "rope_type": "default"}}
QWEN3_8B: Settings = {
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
        "rope_theta": 5000000.0,
        "rope_type": "default",
    },
    "vocab_size": 151936,
}
CLIP_LARGE: Settings = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
SIGLIP: Settings = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN2_VISION: Settings = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
}
QWEN2_5_VISION: Settings = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "tokens_per_second": 2,
    "window_size": 112,
}
QWEN3_VISION: Settings = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 4096,
    "patch_size": 16,
}
IMAGES: Settings = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
PROCESSOR: Settings = {
    "image_processor": IMAGES,
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
}
FEATURES: Settings = {
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
LLAVA: Settings = FEATURES | {
    "multimodal_projector_bias": True,
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": LLAMA_7B | {"vocab_size": 32064},
    "vision_config": CLIP_LARGE,
}
TILES: Settings = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
QWEN: Settings = {
    "dtype": "bfloat16",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


# --- Models --------------------------------------------------------------------------------------------------------


def llava(title: str, checkpoint: str, text: Settings) -> Published:
    """A LLaVA-1.5."""
    parts = LLAVA | {"image_seq_length": 576, "text_config": text | {"vocab_size": 32064}}
    return model("llava", title, checkpoint, parts, PROCESSOR | {"processor_class": "SparseLlavaProcessor"})


def llava_next(title: str, checkpoint: str, text: Settings) -> Published:
    """A LLaVA-NeXT."""
    return model("llava_next", title, checkpoint, LLAVA | TILES | {"text_config": text | {"vocab_size": 32064}})


def gemini(title: str, checkpoint: str, grid: int) -> Published:
    """A Mini-Gemini, of a picture as it is or, HD, in tiles."""
    aux = {"image_global": grid > 1, "image_grid": grid, "image_size_aux": 768 * grid}
    parts = FEATURES | {
        "aux_depths": [3, 3, 27, 3],
        "aux_hidden_sizes": [192, 384, 768, 1536],
        "dtype": "bfloat16",
        "text_config": LLAMA_7B | {"vocab_size": 32000},
        "vision_config": CLIP_LARGE,
    }
    processor = PROCESSOR | aux | {"processor_class": "SparseMiniGeminiProcessor"}
    return model("mini_gemini", title, checkpoint, parts | aux, processor)


def qwen(model_type: str, title: str, checkpoint: str, text: Settings, vision: Settings) -> Published:
    """A Qwen-VL."""
    parts = {"text_config": text | {"model_type": f"{model_type}_text"}, "vision_config": vision}
    return model(model_type, title, checkpoint, QWEN | parts)


LLAVA_NEXT_VIDEO = {"image_token_index": 32001, "pad_token_id": 32002, "video_token_index": 32000}
VIDEO_LLAVA = {
    "image_seq_length": 256,
    "pad_token_id": 32002,
    "video_seq_length": 2056,
    "video_token_index": 32001,
    "vision_config": CLIP_LARGE | {"image_size": 224},
}
ONEVISION: Settings = {
    "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    "image_token_index": 151646,
    "text_config": QWEN2_7B | {"vocab_size": 152000},
    "video_token_index": 151647,
    "vision_config": SIGLIP,
}
MODELS = {
    "llava-1.5-7b": llava("LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf", LLAMA_7B),
    "llava-1.5-13b": llava("LLaVA-1.5-13B", "llava-hf/llava-1.5-13b-hf", LLAMA_13B),
    "llava-next-7b": llava_next("LLaVA-NeXT-7B (Vicuna)", "llava-hf/llava-v1.6-vicuna-7b-hf", LLAMA_7B),
    "llava-next-mistral-7b": llava_next("LLaVA-NeXT-7B (Mistral)", "llava-hf/llava-v1.6-mistral-7b-hf", MISTRAL_7B),
    "llava-next-video-7b": model(
        "llava_next_video", "LLaVA-NeXT-Video-7B", "llava-hf/LLaVA-NeXT-Video-7B-hf", LLAVA | TILES | LLAVA_NEXT_VIDEO
    ),
    "llava-onevision-qwen2-7b": model(
        "llava_onevision", "LLaVA-OneVision-7B", "llava-hf/llava-onevision-qwen2-7b-ov-hf", ONEVISION
    ),
    "video-llava-7b": model(
        "video_llava", "Video-LLaVA-7B", "LanguageBind/Video-LLaVA-7B-hf", LLAVA | VIDEO_LLAVA
    ),
    "mgm-7b": gemini("MGM-7B", "YanweiLi/MGM-7B", grid=1),
    "mgm-7b-hd": gemini("MGM-7B-HD", "YanweiLi/MGM-7B-HD", grid=2),
    "qwen2-vl-7b": qwen("qwen2_vl", "Qwen2-VL-7B", "Qwen/Qwen2-VL-7B-Instruct", QWEN2_7B | MROPE, QWEN2_VISION),
    "qwen2.5-vl-7b": qwen(
        "qwen2_5_vl", "Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct",
        QWEN2_7B | MROPE | {"max_position_embeddings": 128000}, QWEN2_5_VISION,
    ),
    "qwen3-vl-8b": qwen("qwen3_vl", "Qwen3-VL-8B", "Qwen/Qwen3-VL-8B-Instruct", QWEN3_8B, QWEN3_VISION),
}  # fmt: skip


# --- Small ones ----------------------------------------------------------------------------------------------------

# Bound by arithmetic on a CPU, and with about the 7B's share of work in the tower. Of one family: that of the model.
_TEXT: Settings = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
}
_VISION: Settings = {"hidden_size": 256, "intermediate_size": 1024}
_CLIP: Settings = _VISION | {"num_attention_heads": 4, "num_hidden_layers": 8}
_QWEN: Settings = _VISION | {"depth": 8, "num_heads": 4, "out_hidden_size": 1024}
_SMALL: dict[str, tuple[str, Settings, Settings]] = {
    "small": ("llava-1.5-7b", _CLIP, {}),
    "small-llava-next": ("llava-next-7b", _CLIP, {}),
    "small-llava-next-video": ("llava-next-video-7b", _CLIP, {}),
    "small-llava-onevision": ("llava-onevision-qwen2-7b", _CLIP, {}),
    "small-video-llava": ("video-llava-7b", _CLIP, {}),
    "small-mgm": ("mgm-7b", _CLIP, {"aux_hidden_sizes": [48, 96, 192, 384], "aux_depths": [1, 1, 3, 1]}),
    "small-mgm-hd": ("mgm-7b-hd", _CLIP, {"aux_hidden_sizes": [48, 96, 192, 384], "aux_depths": [1, 1, 3, 1]}),
    "small-qwen2-vl": ("qwen2-vl-7b", {"depth": 8, "embed_dim": 256, "hidden_size": 1024, "num_heads": 4}, {}),
    "small-qwen2.5-vl": ("qwen2.5-vl-7b", _QWEN | {"fullatt_block_indexes": [3, 7]}, {}),
    "small-qwen3-vl": ("qwen3-vl-8b", _QWEN | {"deepstack_visual_indexes": [1, 3, 5]}, {}),
}


def resized(name: str, text: Settings, vision: Settings, **more: Any) -> Published:
    """A published model with other sizes of its parts."""
    of = MODELS[name]
    parts = {"text_config": of.config["text_config"] | text, "vision_config": of.config["vision_config"] | vision}
    return replace(of, config=of.config | parts | more)


SMALL = {small: resized(name, _TEXT, vision, **more) for small, (name, vision, more) in _SMALL.items()}
