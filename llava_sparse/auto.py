"""Registration with transformers' Auto classes."""

from __future__ import annotations

import sys
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .families import FAMILIES, Family, supported
from .modeling.configuration_sparse_llava import SparseCLIPVisionConfig, SparseFieldsMixin

AUTO = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
HOW = "AutoModelForImageTextToText.from_pretrained(path, sparse_method=..., sparse_budget=...)"
_registered: set[str] = set()
logger = transformers.logging.get_logger(__name__)


def config_choice(family: Family) -> Any:
    """What the stock `model_type` stands for: the sparse configuration where a `sparse_*` setting is given.

    The class is never instantiated: both ways of making one return an instance of the class that is meant.
    """
    stock = family.stock("Config")

    def chosen(saved: dict[str, Any], given: dict[str, Any]) -> Any:
        """The class that is meant; settings without a method are dropped from what was saved, as None arguments are."""
        sparse = saved.get("sparse_method") is not None
        sparse |= any(key.startswith("sparse_") and value is not None for key, value in given.items())
        for settings in () if sparse else (saved, given):
            for key in [key for key in settings if key.startswith("sparse_")]:
                del settings[key]
        return family.sparse("Config") if sparse else stock

    class Choice(stock):  # type: ignore[misc, valid-type]
        def __new__(cls, **kwargs: Any) -> Any:
            return chosen({}, kwargs)(**kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            register_models(family)
            return chosen(config_dict, kwargs).from_dict(config_dict, **kwargs)

    return Choice


def _no_method(config: PreTrainedConfig) -> None:
    """Any model can be asked for its method. It is no field of stock configurations, and never saved."""


def _refuse_method(config: PreTrainedConfig, method: str | None) -> None:
    """What a class that does not prune answers to `from_pretrained(..., sparse_method=...)`."""
    kind, bare = config.__dict__.get("model_type") or config.model_type, type(config) is PreTrainedConfig
    # A tokenizer makes a bare one where AutoConfig raises, or of its own keywords beside no config.json.
    if method is None or (bare and kind in {"", *FAMILIES, *(family.published_type for family in FAMILIES.values())}):
        return
    if kind in {family.sparse_type for family in FAMILIES.values()}:
        logger.warning(
            f"sparse_method={method!r} of this folder is ignored: {type(config).__name__} is of a stock class, which "
            f"is dense. For the pruned model load with {HOW}."
        )
    else:
        raise ValueError(
            f"sparse_method={method!r}: model_type {kind!r} ({type(config).__name__}) does not prune. Supported: "
            f"{supported()}; load it with {HOW} or the Sparse class of the family, such as "
            "llava_sparse.SparseLlavaForConditionalGeneration."
        )


def _with_sparse_keywords(stock: Any, family: Family) -> Any:
    """A stock class as the Auto classes load it: `sparse_*` keywords work beside a configuration object too."""

    def from_pretrained(cls: Any, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        sparse = {k: kwargs.pop(k) for k in list(kwargs) if k.startswith("sparse_")}
        if not any(value is not None for value in sparse.values()):
            return stock.from_pretrained(path, *args, config=config, **kwargs)
        config = family.sparse("Config").from_dict(config.to_dict(), **sparse)
        return family.sparse("ForConditionalGeneration").from_pretrained(path, *args, config=config, **kwargs)

    def _from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        return stock._from_config(config, **kwargs)

    body = {"from_pretrained": classmethod(from_pretrained), "_from_config": classmethod(_from_config)}
    return type(stock.__name__, (stock,), {**body, "__module__": stock.__module__})


def register_models(family: Family) -> None:
    """Registers a family's models with the Auto classes: when a configuration is made, for they cost seconds to import.

    Where AutoProcessor is in use, its processor too: folders may name none.
    """
    if family.model_type not in _registered:
        _registered.add(family.model_type)
        sparse, stock = family.sparse("Config"), family.stock("Config")
        for name in AUTO:
            auto = getattr(transformers, name, None)
            if auto is None or not (family.published_type or stock in auto._model_mapping):
                continue
            auto.register(sparse, family.sparse("ForConditionalGeneration"), exist_ok=True)
            if family.published_type:
                continue
            # `register` of some releases leaves transformers' own configurations alone, so that nothing replaces their
            # classes; this one hands every plain load on to them.
            plain = _with_sparse_keywords(auto._model_mapping[stock], family)
            auto._model_mapping._extra_content[stock] = plain
    module = sys.modules.get("transformers.models.auto.processing_auto")
    if module is not None and family.sparse("Config") not in module.PROCESSOR_MAPPING:
        module.AutoProcessor.register(family.sparse("Config"), family.sparse("Processor"), exist_ok=True)


def _register_for(config: Any) -> None:
    """Registers what belongs to a configuration that was made just now."""
    if config.model_type == SparseCLIPVisionConfig.model_type:
        from .modeling.modeling_sparse_clip import SparseCLIPVisionModel

        transformers.AutoModel.register(SparseCLIPVisionConfig, SparseCLIPVisionModel, exist_ok=True)
    else:
        register_models(FAMILIES[config.model_type.removeprefix("sparse_")])


def register() -> None:
    """Registers configurations, models and processors with the Auto classes; calling it again changes nothing."""
    AutoConfig.register("sparse_clip_vision_model", SparseCLIPVisionConfig, exist_ok=True)
    PreTrainedConfig.sparse_method = property(_no_method, _refuse_method)
    SparseFieldsMixin.when_made = _register_for
    for family in FAMILIES.values():
        AutoConfig.register(family.sparse_type, family.sparse("Config"), exist_ok=True)
        if family.published_type:
            CONFIG_MAPPING.register(family.published_type, family.sparse("Config"), exist_ok=True)
        else:
            CONFIG_MAPPING.register(family.model_type, config_choice(family), exist_ok=True)
        # AutoProcessor alone takes as long to import as all the rest, so its table is given a name. It looks the name
        # up in a module of transformers.models, as which this package stands; nothing is imported before a processor
        # is loaded.
        sys.modules[f"transformers.models.{family.sparse_type}"] = sys.modules[__package__]
        PROCESSOR_MAPPING_NAMES[family.sparse_type] = f"Sparse{family.prefix}Processor"
