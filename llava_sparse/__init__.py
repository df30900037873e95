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

from .auto import register
from .families import FAMILIES
from .modeling.configuration_sparse_llava import SparseCLIPVisionConfig
from .modeling.pruning_registry import list_methods, register_method
from .modeling.pruning_types import Selection, TokenCounts

__version__ = "0.1.0"
NEWEST_TESTED = "5.24"

# Public names whose modules cost seconds that a configuration does not need; None for a module of that name.
_LATER: dict[str, str | None] = {
    "SparseCLIPVisionModel": "modeling.modeling_sparse_clip",
    "SparseLlamaModel": "modeling.modeling_sparse_text",
    "hub": None,
    "sparsify": "convert",
}
for _family in FAMILIES.values():
    _LATER |= _family.names

__all__ = [
    "Selection",
    "SparseCLIPVisionConfig",
    "TokenCounts",
    "__version__",
    "list_methods",
    "register",
    "register_method",
    *sorted(_LATER),
]

if TYPE_CHECKING:
    from . import hub
    from .convert import sparsify
    from .modeling.configuration_sparse_llava import SparseLlavaConfig
    from .modeling.modeling_sparse_clip import SparseCLIPVisionModel
    from .modeling.modeling_sparse_llava import SparseLlavaForConditionalGeneration, SparseLlavaModel
    from .modeling.modeling_sparse_text import SparseLlamaModel
    from .processing import SparseLlavaProcessor


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _LATER[name]
    value = importlib.import_module(f"{__name__}.{home or name}")
    value = value if home is None else getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LATER))


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
