"""Writes hub_configs/: a folder for every family, method and budget. `python -m llava_sparse.recipes hub_configs`"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .families import FAMILIES as KNOWN
from .modeling.pruning_registry import METHODS, entering
from .modeling.pruning_settings import Sparsity

BUDGETS = (64, 128, 192)
RECIPES = (
    "cdpruner", "delegate", "divprune", "fastv", "pool", "pyramiddrop", "random", "random_decoder", "scope",
    "sparsevlm", "tome", "uniform", "visionzip", "vispruner",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A published model whose weights the recipes are for.

    Attributes:
        title: as papers call it; checkpoint: on the Hub; patches: of a picture, a tile, or a frame.
        config, processor: what config.json and processor_config.json hold besides the settings; a processor that needs
            more files than that is None.
        budgets: of each method that there is a recipe for; sizes: further ones of `Geometry`.
    """

    title: str
    checkpoint: str
    patches: int
    config: dict[str, Any]
    processor: dict[str, Any] | None
    budgets: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict.fromkeys(RECIPES, BUDGETS))
    sizes: dict[str, int] = field(default_factory=dict)


LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
}
CLIP_LARGE = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
IMAGES = {
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


def gemini(title: str, checkpoint: str, grid: int, budgets: tuple[int, ...]) -> Family:
    """A Mini-Gemini, of a picture as it is or, HD, in tiles."""
    aux = {"image_global": grid > 1, "image_grid": grid, "image_size_aux": 768 * grid}
    return Family(
        title=title,
        checkpoint=checkpoint,
        patches=576,
        sizes={"tiles": grid**2 + (grid > 1)},
        budgets=dict.fromkeys(("visionzip", "sparsevlm", "cdpruner", "divprune", "delegate"), budgets),
        config=aux
        | {
            "architectures": ["SparseMiniGeminiForConditionalGeneration"],
            "aux_depths": [3, 3, 27, 3],
            "aux_hidden_sizes": [192, 384, 768, 1536],
            "dtype": "bfloat16",
            "image_token_index": 32000,
            "model_type": "sparse_mini_gemini",
            "text_config": LLAMA_7B | {"vocab_size": 32000},
            "tie_word_embeddings": False,
            "vision_config": CLIP_LARGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        processor=aux
        | {
            "image_processor": IMAGES,
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "SparseMiniGeminiProcessor",
            "vision_feature_select_strategy": "default",
        },
    )


FAMILIES = {
    "llava-1.5-7b": Family(
        title="LLaVA-1.5-7B",
        checkpoint="llava-hf/llava-1.5-7b-hf",
        patches=576,
        config={
            "architectures": ["SparseLlavaForConditionalGeneration"],
            "dtype": "float16",
            "image_seq_length": 576,
            "image_token_index": 32000,
            "model_type": "sparse_llava",
            "multimodal_projector_bias": True,
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": LLAMA_7B | {"vocab_size": 32064},
            "tie_word_embeddings": False,
            "vision_config": CLIP_LARGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        processor={
            "image_processor": IMAGES,
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "SparseLlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    ),
    "video-llava-7b": Family(
        title="Video-LLaVA-7B",
        checkpoint="LanguageBind/Video-LLaVA-7B-hf",
        patches=256,
        sizes={"frames": 8},
        # What the papers keep of 2,048 tokens: SparseVLM 194, VisionZip 136; the others for comparison.
        budgets={
            "sparsevlm": (194,),
            "visionzip": (136, 194),
            "cdpruner": (194,),
            "divprune": (194,),
            "delegate": (194,),
            "fastv": (194,),
        },
        config={
            "architectures": ["SparseVideoLlavaForConditionalGeneration"],
            "dtype": "float16",
            "image_seq_length": 256,
            "image_token_index": 32000,
            "model_type": "sparse_video_llava",
            "multimodal_projector_bias": True,
            "pad_token_id": 32002,
            "projector_hidden_act": "gelu",
            "text_config": LLAMA_7B | {"vocab_size": 32064},
            "tie_word_embeddings": False,
            "video_seq_length": 2056,
            "video_token_index": 32001,
            "vision_config": CLIP_LARGE | {"image_size": 224},
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        processor=None,
    ),
    "mgm-7b": gemini("MGM-7B", "YanweiLi/MGM-7B", grid=1, budgets=BUDGETS),
    "mgm-7b-hd": gemini("MGM-7B-HD", "YanweiLi/MGM-7B-HD", grid=2, budgets=(160, 320, 640)),
}

CARD = """---
library_name: transformers
base_model: {checkpoint}
tags: [llava-sparse, {method}]
---
# {title} with {method} at {budget} visual tokens

The method {summary}. {stages} No training; the weights are those of `{checkpoint}`.

```python
import llava_sparse
from transformers import AutoConfig, AutoModelForImageTextToText

config = AutoConfig.from_pretrained("hub_configs/{name}")
model = AutoModelForImageTextToText.from_pretrained("{checkpoint}", config=config)
```

is the same as `from_pretrained("{checkpoint}", sparse_method="{method}", sparse_budget={budget})`.
{placeholders}

Method: {paper}. This recipe states settings, not measurements.
"""


def recipe(family: str, method: str, budget: int) -> dict[str, str]:
    """The files of a recipe, by name.

    Args:
        family: a key of `FAMILIES`; method: a name of `list_methods()`; budget: visual tokens.
    """
    of, cls = FAMILIES[family], METHODS[method]
    settings = {"sparse_method": method, "sparse_budget": budget}
    config = KNOWN[of.config["model_type"].removeprefix("sparse_")].sparse("Config").from_dict(of.config, **settings)
    tokens = entering(Sparsity.read(settings), of.patches, **of.sizes)
    layers, budgets = config.sparse_layers, config.sparse_budgets
    where = "encoder" if tokens is not None else "decoder"
    kept = "as many tokens as the data says" if budgets is None else f"tokens {budgets}"
    stages = f"Layers {layers} of the {where}, {kept}" if len(layers) < 5 else f"Layers of the {where}: all"
    if tokens is None:
        placeholders = "Image placeholders are those of the dense model: any processor of the model works."
    else:
        what = "video" if "frames" in of.sizes else "image"
        placeholders = f"The processor writes {tokens} {what} placeholders; a stock processor works too."
    paper = re.sub(r"\(arXiv ([\d.]+)\)", r"(arXiv [\1](https://arxiv.org/abs/\1))", cls.paper)
    card = CARD.format(
        checkpoint=of.checkpoint,
        title=of.title,
        method=method,
        budget=budget,
        summary=cls.summary,
        stages=f"{stages}.",
        name=f"{family}-{method}-{budget}",
        placeholders=placeholders,
        paper=paper,
    )
    counted = {} if tokens is None else {"sparse_tokens": tokens}
    files = {"config.json": of.config | settings}
    if of.processor is not None:
        files["processor_config.json"] = of.processor | settings | counted
    return {"README.md": card} | {name: json.dumps(x, indent=2, sort_keys=True) + "\n" for name, x in files.items()}


def recipes() -> Iterator[tuple[str, dict[str, str]]]:
    """All of them: the name of each folder, and its files."""
    for family, of in FAMILIES.items():
        for method, budgets in of.budgets.items():
            for budget in budgets:
                yield f"{family}-{method}-{budget}", recipe(family, method, budget)


def write(folder: Path) -> int:
    """Writes all recipes below `folder`, in place of those that are there, and says how many there are."""
    known = dict(recipes())
    for old in folder.glob("*/config.json"):
        if old.parent.name not in known:
            shutil.rmtree(old.parent)
    for name, files in known.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / name / file).write_text(text)
    return len(known)


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "hub_configs")), "recipes written")
