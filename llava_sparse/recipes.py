"""Writes hub_configs/: a folder for every family, method and budget. `python -m llava_sparse.recipes hub_configs`"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .modeling.configuration_sparse_llava import SparseLlavaConfig
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
        title: as papers call it; checkpoint: on the Hub; patches: of a picture.
        config, processor: what config.json and processor_config.json hold besides the settings.
    """

    title: str
    checkpoint: str
    patches: int
    config: dict[str, Any]
    processor: dict[str, Any]


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
            "text_config": {
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "num_key_value_heads": 32,
                "rms_norm_eps": 1e-05,
                "vocab_size": 32064,
            },
            "tie_word_embeddings": False,
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        processor={
            "image_processor": {
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
            },
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "SparseLlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
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
    config = SparseLlavaConfig.from_dict(of.config, **settings)
    tokens = entering(Sparsity.read(settings), of.patches)
    layers, budgets = config.sparse_layers, config.sparse_budgets
    where = "encoder" if tokens is not None else "decoder"
    stages = f"Layers {layers} of the {where}, tokens {budgets}" if len(layers) < 5 else f"Layers of the {where}: all"
    if tokens is None:
        placeholders = "Image placeholders are those of the dense model: any processor of the model works."
    else:
        placeholders = f"The processor writes {tokens} image placeholders; a stock processor works too."
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
    files = {"config.json": of.config | settings, "processor_config.json": of.processor | settings | counted}
    return {"README.md": card} | {name: json.dumps(x, indent=2, sort_keys=True) + "\n" for name, x in files.items()}


def recipes() -> Iterator[tuple[str, dict[str, str]]]:
    """All of them: the name of each folder, and its files."""
    for family in FAMILIES:
        for method in RECIPES:
            for budget in BUDGETS:
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
