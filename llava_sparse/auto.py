"""Registration with transformers' Auto classes."""

from __future__ import annotations

import sys
from typing import Any

import transformers
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .modeling.configuration_sparse_llava import SparseCLIPVisionConfig, SparseFieldsMixin, SparseLlavaConfig

AUTO = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
SUPPORTED = "LLaVA-1.5 (model_type 'llava')"
HOW = (
    "AutoModelForImageTextToText.from_pretrained(path, sparse_method=..., sparse_budget=...) or "
    "llava_sparse.SparseLlavaForConditionalGeneration.from_pretrained(...)"
)
_registered = False
logger = transformers.logging.get_logger(__name__)


class LlavaConfigChoice(LlavaConfig):
    """What `model_type: llava` stands for: `SparseLlavaConfig` where a `sparse_*` setting is given, else `LlavaConfig`.

    Never instantiated: both ways of making one return an instance of the class that is meant.
    """

    def __new__(cls, **kwargs: Any) -> Any:
        return _chosen({}, kwargs)(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        register_models()
        return _chosen(config_dict, kwargs).from_dict(config_dict, **kwargs)


def _chosen(saved: dict[str, Any], given: dict[str, Any]) -> Any:
    """The class that is meant; settings without a method are dropped from what was saved, as from None arguments."""
    sparse = saved.get("sparse_method") is not None
    sparse |= any(key.startswith("sparse_") and value is not None for key, value in given.items())
    for settings in () if sparse else (saved, given):
        for key in [key for key in settings if key.startswith("sparse_")]:
            del settings[key]
    return SparseLlavaConfig if sparse else LlavaConfig


def _no_method(config: PreTrainedConfig) -> None:
    """Any model can be asked for its method. It is no field of stock configurations, and never saved."""


def _refuse_method(config: PreTrainedConfig, method: str | None) -> None:
    """What a class that does not prune answers to `from_pretrained(..., sparse_method=...)`."""
    # A tokenizer beside no config.json makes a bare one of its own keywords.
    if method is None or type(config) is PreTrainedConfig:
        return
    if isinstance(config, LlavaConfig) and config.__dict__.get("model_type") == SparseLlavaConfig.model_type:
        logger.warning(
            f"sparse_method={method!r} of this folder is ignored: a stock LLaVA class is dense. For the pruned model "
            f"load with {HOW}."
        )
    else:
        raise ValueError(
            f"sparse_method={method!r}: a {type(config).__name__} does not prune. Supported is {SUPPORTED}; load it "
            f"with {HOW}."
        )


def _with_sparse_keywords(stock: Any) -> Any:
    """A stock LLaVA class as the Auto classes load it: `sparse_*` keywords work beside a configuration object too."""

    def from_pretrained(cls: Any, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        sparse = {k: kwargs.pop(k) for k in list(kwargs) if k.startswith("sparse_")}
        if not any(value is not None for value in sparse.values()):
            return stock.from_pretrained(path, *args, config=config, **kwargs)
        from .modeling.modeling_sparse_llava import SparseLlavaForConditionalGeneration

        config = SparseLlavaConfig.from_dict(config.to_dict(), **sparse)
        return SparseLlavaForConditionalGeneration.from_pretrained(path, *args, config=config, **kwargs)

    def _from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        return stock._from_config(config, **kwargs)

    body = {"from_pretrained": classmethod(from_pretrained), "_from_config": classmethod(_from_config)}
    return type(stock.__name__, (stock,), {**body, "__module__": stock.__module__})


def register_models() -> None:
    """Registers the models with the Auto classes: when a configuration is made, for they cost seconds to import."""
    global _registered
    if _registered:
        return
    _registered = True
    from .modeling.modeling_sparse_clip import SparseCLIPVisionModel
    from .modeling.modeling_sparse_llava import SparseLlavaForConditionalGeneration

    for name in AUTO:
        auto = getattr(transformers, name, None)
        if auto is not None:
            auto.register(SparseLlavaConfig, SparseLlavaForConditionalGeneration, exist_ok=True)
            # `register` of some releases leaves transformers' own configurations alone, so that nothing replaces their
            # classes; this one hands every plain load on to them.
            stock = _with_sparse_keywords(auto._model_mapping[LlavaConfig])
            auto._model_mapping._extra_content[LlavaConfig] = stock
    transformers.AutoModel.register(SparseCLIPVisionConfig, SparseCLIPVisionModel, exist_ok=True)


def register_processor() -> None:
    """Registers the processor for a configuration, where AutoProcessor is in use: folders may name no processor."""
    auto = sys.modules.get("transformers.models.auto.processing_auto")
    if auto is not None and SparseLlavaConfig not in auto.PROCESSOR_MAPPING:
        from .processing import SparseLlavaProcessor

        auto.AutoProcessor.register(SparseLlavaConfig, SparseLlavaProcessor, exist_ok=True)


def register() -> None:
    """Registers configurations, models and processor with the Auto classes; calling it again changes nothing."""
    AutoConfig.register("sparse_llava", SparseLlavaConfig, exist_ok=True)
    AutoConfig.register("sparse_clip_vision_model", SparseCLIPVisionConfig, exist_ok=True)
    CONFIG_MAPPING.register("llava", LlavaConfigChoice, exist_ok=True)
    PreTrainedConfig.sparse_method = property(_no_method, _refuse_method)
    for act in (register_models, register_processor):
        if act not in SparseFieldsMixin.when_made:
            SparseFieldsMixin.when_made.append(act)
    # AutoProcessor alone takes as long to import as all the rest, so its table is given a name. It looks the name up in
    # a module of transformers.models, as which this package stands; nothing is imported before a processor is loaded.
    sys.modules["transformers.models.sparse_llava"] = sys.modules[__package__]
    PROCESSOR_MAPPING_NAMES["sparse_llava"] = "SparseLlavaProcessor"
