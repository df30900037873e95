"""Registration with transformers' Auto classes."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import transformers
from transformers import AutoConfig, LlavaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .modeling.configuration_sparse_llava import SparseCLIPVisionConfig, SparseLlavaConfig

logger = transformers.logging.get_logger(__name__)


class _OnFirstUse:
    """An entry for an Auto class's table that imports its class when it is first used."""

    def __init__(self, module: str, name: str, config_class: type) -> None:
        self.__name__ = name
        self.config_class = config_class
        self._module = module

    def _load(self) -> Any:
        return getattr(importlib.import_module(self._module, __package__), self.__name__)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self._load(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs an action once, right after a module has been imported for the first time."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module = module
        self.action = action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                self.action()

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


def _after_import(module: str, action: Callable[[], None]) -> None:
    """Runs `action` now if `module` is imported, else as soon as it is."""
    if module in sys.modules:
        action()
    elif not any(isinstance(finder, _AfterImport) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(module, action))


def _register_processor() -> None:
    processor = _OnFirstUse(".processing.processing_sparse_llava", "SparseLlavaProcessor", SparseLlavaConfig)
    transformers.AutoProcessor.register(SparseLlavaConfig, processor, exist_ok=True)


class _LooksLikeLlavaConfig(type(LlavaConfig)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, LlavaConfig)


class LlavaConfigChoice(LlavaConfig, metaclass=_LooksLikeLlavaConfig):
    """What `model_type: llava` stands for: `SparseLlavaConfig` where a `sparse_*` setting is given, else `LlavaConfig`.

    Never instantiated: both ways of making one return an instance of the class that is meant.
    """

    def __new__(cls, **kwargs: Any) -> Any:
        return _chosen({}, kwargs)(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return _chosen(config_dict, kwargs).from_dict(config_dict, **kwargs)


def _chosen(saved: dict[str, Any], given: dict[str, Any]) -> Any:
    """The class that is meant; settings without a method are dropped from what was saved, as from None arguments."""
    sparse = saved.get("sparse_method") is not None
    sparse |= any(key.startswith("sparse_") and value is not None for key, value in given.items())
    for settings in () if sparse else (saved, given):
        for key in [key for key in settings if key.startswith("sparse_")]:
            del settings[key]
    return SparseLlavaConfig if sparse else LlavaConfig


def _no_method(config: LlavaConfig) -> None:
    """A plain LLaVA can be asked for its method too. It is no field, and never saved."""


def _ignore_method(config: LlavaConfig, method: str | None) -> None:
    if method is not None:
        logger.warning(
            f"sparse_method={method!r} is ignored: a stock LLaVA class is dense. For the pruned model load with "
            "AutoModelForImageTextToText or llava_sparse.SparseLlavaForConditionalGeneration."
        )


def register() -> None:
    """Registers configurations, models and processor with the Auto classes; calling it again changes nothing."""
    AutoConfig.register("sparse_llava", SparseLlavaConfig, exist_ok=True)
    AutoConfig.register("sparse_clip_vision_model", SparseCLIPVisionConfig, exist_ok=True)
    CONFIG_MAPPING.register("llava", LlavaConfigChoice, exist_ok=True)
    LlavaConfig.sparse_method = property(_no_method, _ignore_method)

    modeling = ".modeling.modeling_sparse_llava"
    llava = _OnFirstUse(modeling, "SparseLlavaForConditionalGeneration", SparseLlavaConfig)
    tower = _OnFirstUse(".modeling.modeling_sparse_clip", "SparseCLIPVisionModel", SparseCLIPVisionConfig)
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        auto = getattr(transformers, name, None)
        if auto is not None:
            auto.register(SparseLlavaConfig, llava, exist_ok=True)
    transformers.AutoModel.register(SparseCLIPVisionConfig, tower, exist_ok=True)
    # AutoProcessor alone takes as long to import as all the rest.
    _after_import("transformers.models.auto.processing_auto", _register_processor)
