"""Training-free pruning of visual tokens for LLaVA models in transformers.

Importing this package registers its classes with transformers' Auto classes, so that
`AutoModel.from_pretrained("llava-hf/llava-1.5-7b-hf", sparse_method="visionzip", sparse_budget=64)` gives the pruned
model; loading a LLaVA without `sparse_*` settings is left as it is.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import transformers

from ._registration import register

__version__ = "0.1.0"
NEWEST_TESTED = "5.24"

_HOMES = {
    "Selection": "modeling.sparsifier",
    "SparseCLIPVisionConfig": "modeling.configuration_sparse_llava",
    "SparseCLIPVisionModel": "modeling.modeling_sparse_clip",
    "SparseLlamaModel": "modeling.modeling_sparse_llama",
    "SparseLlavaConfig": "modeling.configuration_sparse_llava",
    "SparseLlavaForConditionalGeneration": "modeling.modeling_sparse_llava",
    "SparseLlavaModel": "modeling.modeling_sparse_llava",
    "SparseLlavaProcessor": "processing.processing_sparse_llava",
    "list_methods": "modeling.methods",
    "register_method": "plugins",
    "sparsify": "conversion",
}

__all__ = ["__version__", "register", *sorted(_HOMES)]

if TYPE_CHECKING:
    from .conversion import sparsify
    from .modeling.configuration_sparse_llava import SparseCLIPVisionConfig, SparseLlavaConfig
    from .modeling.methods import list_methods
    from .modeling.modeling_sparse_clip import SparseCLIPVisionModel
    from .modeling.modeling_sparse_llama import SparseLlamaModel
    from .modeling.modeling_sparse_llava import SparseLlavaForConditionalGeneration, SparseLlavaModel
    from .modeling.sparsifier import Selection
    from .plugins import register_method
    from .processing.processing_sparse_llava import SparseLlavaProcessor


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: model classes cost seconds that a configuration does not need."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))


def _check_version(version: str = transformers.__version__) -> None:
    """Warns where transformers is newer than what this release was tested with."""
    if tuple(map(int, version.split(".")[:2])) > tuple(map(int, NEWEST_TESTED.split("."))):
        warnings.warn(
            f"llava-sparse {__version__} has not been tested with transformers {version}, only up to {NEWEST_TESTED}: "
            "a newer llava-sparse may be there; else, where something fails, install "
            f"'transformers<={NEWEST_TESTED}.99'.",
            stacklevel=3,
        )


_check_version()
register()
