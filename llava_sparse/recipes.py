"""Writes hub_configs/: a folder for every family, method and budget. `python -m llava_sparse.recipes hub_configs`"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .modeling.configuration_sparse_llava import geometry_of
from .modeling.pruning_registry import METHODS, entering
from .modeling.pruning_settings import Sparsity
from .published import MODELS

ALL = (
    "cdpruner", "delegate", "divprune", "fastv", "pool", "pyramiddrop", "random", "random_decoder", "scope",
    "sparsevlm", "tome", "uniform", "visionzip", "vispruner",
)  # fmt: skip
FOUR = ("delegate", "divprune", "sparsevlm", "visionzip")
FIVE = ("cdpruner", *FOUR)
# Of each model what its papers keep of a picture, or of a video. VisionZip's of Qwen2.5-VL are ratios, as all are where
# no paper says any; LLaVA-OneVision and LLaVA-NeXT-Video are two of these. VisionZip works in neither: SigLIP has no
# CLS, and LLaVA-NeXT-Video pools frames behind the tower.
BUDGETS: dict[str, dict[str, tuple[float, ...]]] = {
    "llava-1.5-7b": dict.fromkeys(ALL, (64, 128, 192)),
    "llava-1.5-13b": dict.fromkeys(FOUR, (64, 128, 192)),
    "llava-next-7b": dict.fromkeys(FOUR, (160, 320, 640)),
    "llava-next-mistral-7b": dict.fromkeys(FOUR, (160, 320, 640)),
    "llava-next-video-7b": dict.fromkeys(FOUR[:3], (0.1, 0.25)),
    "llava-onevision-qwen2-7b": dict.fromkeys(FOUR[:3], (0.1, 0.25)),
    # SparseVLM 194, VisionZip 136 of 2,048; the others for comparison.
    "video-llava-7b": dict.fromkeys((*FIVE, "fastv"), (194,)) | {"visionzip": (136, 194)},
    "mgm-7b": dict.fromkeys(FIVE, (64, 128, 192)),
    "mgm-7b-hd": dict.fromkeys(FIVE, (160, 320, 640)),
    "qwen2-vl-7b": dict.fromkeys(FOUR, (0.5, 0.7)),
    "qwen2.5-vl-7b": dict.fromkeys(FOUR, (0.5, 0.7)),
    "qwen3-vl-8b": dict.fromkeys(FOUR, (0.5, 0.7)),
}

# What VisionZip's papers call ratios, [dominant, contextual].
SPLIT = {0.5: [0.45, 0.05], 0.7: [0.65, 0.05]}

CARD = """---
library_name: transformers
base_model: {checkpoint}
tags: [llava-sparse, {method}]
---
# {title} with {method} at {amount}

The method {summary}. {stages} No training; the weights are those of `{checkpoint}`.

```python
import llava_sparse
from transformers import AutoConfig, AutoModelForImageTextToText

config = AutoConfig.from_pretrained("hub_configs/{name}")
model = AutoModelForImageTextToText.from_pretrained("{checkpoint}", config=config)
```

is the same as `from_pretrained("{checkpoint}", sparse_method="{method}", {given})`.
{placeholders}

Method: {paper}. This recipe states settings, not measurements.
"""


def settings_of(method: str, budget: float) -> dict[str, Any]:
    """The `sparse_*` settings of a recipe."""
    if method == "visionzip" and budget in SPLIT:
        return {"sparse_method": method, "sparse_budgets": SPLIT[budget]}
    return {"sparse_method": method, "sparse_budget": budget}


def recipe(name: str, method: str, budget: float) -> dict[str, str]:
    """The files of a recipe, by name.

    Args:
        name: a key of `MODELS`; method: a name of `list_methods()`; budget: visual tokens, or a ratio of them.
    """
    of, cls = MODELS[name], METHODS[method]
    settings = settings_of(method, budget)
    config = of.family.sparse("Config").from_dict(of.config, **settings)
    geometry = geometry_of(config)
    tokens = None
    # Of pictures of any size, or in so many tiles as fit, it depends on the picture.
    if of.processor is not None or geometry.frames is not None:
        tokens = entering(Sparsity.read(settings), geometry.patches, tiles=geometry.tiles, frames=geometry.frames)
    card = CARD.format(
        checkpoint=of.checkpoint,
        title=of.title,
        method=method,
        amount=f"{budget} visual tokens" if isinstance(budget, int) else f"{100 * budget:.0f} % of the visual tokens",
        summary=cls.summary,
        stages=_stages(cls, config, geometry, of.processor is not None),
        name=f"{name}-{method}-{budget}",
        given=", ".join(f"{key}={value}" for key, value in settings.items() if key != "sparse_method"),
        placeholders=_placeholders(cls, of, geometry, tokens),
        paper=re.sub(r"\(arXiv ([\d.]+)\)", r"(arXiv [\1](https://arxiv.org/abs/\1))", cls.paper),
    )
    files = {"config.json": of.config | settings}
    if of.processor is not None:
        files["processor_config.json"] = of.processor | settings | ({} if tokens is None else {"sparse_tokens": tokens})
    return {"README.md": card} | {file: json.dumps(x, indent=2, sort_keys=True) + "\n" for file, x in files.items()}


def _stages(cls: Any, config: Any, geometry: Any, alike: bool) -> str:
    """Where a method acts, and what it keeps there; `alike` are pictures that all have as many tokens."""
    layers, budgets = config.sparse_layers, config.sparse_budgets
    if len(layers) >= 5:
        return "Layers of the encoder: all."
    kept = "as many tokens as the data says" if budgets is None else f"tokens {budgets}"
    if geometry.dynamic:
        kept += f" of a picture of {geometry.patches}"
    elif geometry.tiles > 1 and cls.kind == "encoder" and cls.unit == "tile":
        kept += " of a tile"
    elif geometry.tiles > 1 and not alike:
        kept += " of the largest picture"
    received = "This tower has no CLS: the attention that a patch receives takes its place."
    told = f" {received}" if cls.kind == "encoder" and cls.needs_attention and not geometry.has_cls else ""
    return f"Layers {layers} of the {cls.kind}, {kept}.{told}"


def _placeholders(cls: Any, of: Any, geometry: Any, tokens: int | None) -> str:
    if tokens is not None:
        what = "image" if geometry.frames is None else "video"
        return f"The processor writes {tokens} {what} placeholders; a stock processor works too."
    if cls.kind == "encoder" and not geometry.dynamic:
        return "Any processor of the model works, stock or sparse."
    return "Image placeholders are those of the dense model: any processor of the model works."


def recipes() -> Iterator[tuple[str, dict[str, str]]]:
    """All of them: the name of each folder, and its files."""
    for name, methods in BUDGETS.items():
        for method, budgets in methods.items():
            for budget in budgets:
                yield f"{name}-{method}-{budget}", recipe(name, method, budget)


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
