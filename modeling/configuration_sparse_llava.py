"""Configurations with the five `sparse_*` fields."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import CLIPVisionConfig, LlavaConfig

from .checks import nearest
from .methods import FIELDS, method_classes, resolve_fields
from .sparsifier import Geometry, Sparsifier

DECODERS = ("llama", "mistral", "qwen2")
ENCODERS = ("clip_vision_model", "sparse_clip_vision_model")


def build_sparsifier(config: Any) -> Sparsifier | None:
    """The method that a configuration's `sparse_*` fields describe, or None.

    Works on any object that has the fields and the sizes, so that every copy of a configuration class will do.

    Raises:
        ValueError: for every invalid combination, naming the field, the value and what is allowed.
    """
    fields = {name: getattr(config, name, None) for name in FIELDS}
    text = getattr(config, "text_config", None)
    vision = getattr(config, "vision_config", config)
    method = fields["sparse_method"]
    for part in () if method is None else method_classes(method):
        _check_parts(part, part.name, vision, text, getattr(config, "vision_feature_layer", -2))
    feature_layers = getattr(config, "vision_feature_layer", -2)
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else list(feature_layers)
    feature_layer = feature_layers[0]
    geometry = Geometry(
        patches=(vision.image_size // vision.patch_size) ** 2,
        encoder_layers=vision.num_hidden_layers,
        decoder_layers=0 if text is None else text.num_hidden_layers,
        # hidden_states[j] is the output of layer j - 1, and hidden_states[-j] that of layer -j.
        feature_layer=feature_layer - 1 if feature_layer > 0 else feature_layer,
    )
    return resolve_fields(fields, geometry)


def _check_parts(method: type[Sparsifier], name: str, vision: Any, text: Any, feature_layer: int | list[int]) -> None:
    """Refuses a method whose kind of model part is missing or not supported."""
    if method.kind == "decoder":
        if text is None:
            raise ValueError(f"sparse_method={name!r} works in a decoder; a vision tower alone takes encoder methods.")
        if text.model_type not in DECODERS:
            raise ValueError(
                f"sparse_method={name!r} does not support the text backbone {text.model_type!r}; supported: "
                f"{', '.join(DECODERS)}. Encoder methods (visionzip) work with any."
            )
    elif text is None and getattr(method, "place", None) == "projector":
        raise ValueError(f"sparse_method={name!r} works behind a LLaVA's projector; a vision tower alone has none.")
    elif vision.model_type not in ENCODERS:
        raise ValueError(f"sparse_method={name!r} works in a CLIP vision tower, not in {vision.model_type!r}.")
    elif not isinstance(feature_layer, int) and len(feature_layer) > 1:
        raise ValueError(
            f"sparse_method={name!r} reduces the features of one layer; this model's projector takes those of several "
            f"(vision_feature_layer={list(feature_layer)})."
        )
    elif feature_layer in (0, [0]):
        raise ValueError(f"sparse_method={name!r} needs the attention of a layer; vision_feature_layer=0 is none.")


def as_lists(values: Any) -> list[Any]:
    """Nested tuples as lists, which is what configurations and results hold."""
    return [as_lists(value) if isinstance(value, tuple) else value for value in values]


class SparseFieldsMixin:
    """The five fields: checked, and expanded to layers and budgets, when a configuration is made.

    Attributes:
        sparse_method: a name of `list_methods()`, an encoder and a decoder method joined by "+" (see `Composition` for
            the other fields then), or None for the dense model.
        sparse_budget: visual tokens retained per image, as the papers' tables count; a float is a ratio of the patches.
        sparse_layers: the layers at which the method acts.
        sparse_budgets: tokens per stage and image.
        sparse_options: the method's own options.
    """

    model_type: ClassVar[str]
    sparse_layers: list[Any] | dict[str, Any] | None
    sparse_budgets: list[Any] | dict[str, Any] | None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in [name for name in kwargs if name.startswith("sparse_")]:
            raise ValueError(f"{name} is no setting{nearest(name, FIELDS)}; there are: {', '.join(FIELDS)}.")
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.expand_sparsity()

    def expand_sparsity(self) -> None:
        """Checks the fields and writes the layers and budgets that they stand for."""
        sparsifier = build_sparsifier(self)
        if sparsifier is not None:
            self.sparse_layers = as_lists(sparsifier.layers)
            self.sparse_budgets = as_lists(sparsifier.budgets) or None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', with `sparse_*` keywords in place of what a checkpoint holds of the same method."""
        config_dict = merge_sparse_fields(cls, config_dict, kwargs)
        # A stock checkpoint names the stock type, by which transformers would look up the names of the weights.
        if config_dict.pop("model_type", cls.model_type) != cls.model_type:
            config_dict.pop("architectures", None)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


def merge_sparse_fields(config_class: Any, config_dict: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Moves `sparse_*` keywords from `kwargs` into a copy of `config_dict`.

    A new method drops all settings of the old one. Layers and budgets that the saved settings expand to anyway are
    expanded anew from the new ones; those that were given by hand stay.
    """
    given = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("sparse_")}
    merged = dict(config_dict)
    if "sparse_method" in given and given["sparse_method"] != merged.get("sparse_method"):
        merged.update(dict.fromkeys(FIELDS))
    given = {name: value for name, value in given.items() if value is not None or name == "sparse_method"}
    if given and merged.get("sparse_method") is not None:
        if "sparse_budgets" in given and "sparse_budget" not in given:
            merged.pop("sparse_budget", None)
        for name, also in (("sparse_budgets", {}), ("sparse_layers", {"sparse_budgets": None})):
            if _is_expansion(config_class, config_dict, name, also):
                merged.pop(name, None)
        if "sparse_budget" in given:
            merged.pop("sparse_budgets", None)
    return {**merged, **given}


def _is_expansion(config_class: Any, saved: dict[str, Any], name: str, also: dict[str, Any]) -> bool:
    """Whether a saved field is what the others expand to, and not a choice of its own."""
    trial = {**copy.deepcopy(saved), **also, name: None}
    trial.pop("model_type", None)
    try:
        return getattr(config_class(**trial), name) == saved.get(name)
    except ValueError:
        return False


class SparseCLIPVisionConfig(SparseFieldsMixin, CLIPVisionConfig):
    """`CLIPVisionConfig` with the `sparse_*` fields, for encoder methods."""

    model_type = "sparse_clip_vision_model"

    sparse_method: str | None = None
    sparse_budget: int | float | list[Any] | dict[str, Any] | None = None
    sparse_layers: list[Any] | dict[str, Any] | None = None
    sparse_budgets: list[Any] | dict[str, Any] | None = None
    sparse_options: dict[str, Any] | None = None


class SparseLlavaConfig(SparseFieldsMixin, LlavaConfig):
    """`LlavaConfig` with the `sparse_*` fields."""

    model_type = "sparse_llava"

    sparse_method: str | None = None
    sparse_budget: int | float | list[Any] | dict[str, Any] | None = None
    sparse_layers: list[Any] | dict[str, Any] | None = None
    sparse_budgets: list[Any] | dict[str, Any] | None = None
    sparse_options: dict[str, Any] | None = None
