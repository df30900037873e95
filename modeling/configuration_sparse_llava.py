"""Configurations with the five `sparse_*` fields."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from transformers import CLIPVisionConfig, LlavaConfig
from transformers.utils import logging

from .pruning_builtin import VisionZip as VisionZip  # With it, all methods are registered.
from .pruning_methods import Sparsifier
from .pruning_registry import METHODS, list_methods, method_classes, resolve
from .pruning_settings import FIELDS, PRESET_PATCHES, Sparsity, as_lists, nearest, option_fields, shown
from .pruning_types import Geometry

DECODERS = ("llama", "mistral", "qwen2")
ENCODERS = ("clip_vision_model", "sparse_clip_vision_model")
WITHOUT_CLS = ("siglip_vision_model",)
EXPANDED = ("sparse_layers", "sparse_budgets")

logger = logging.get_logger(__name__)


def build_sparsifier(config: Any) -> Sparsifier | None:
    """The method that a configuration's `sparse_*` fields describe, or None.

    Works on any object that has the fields and the sizes, so that every copy of a configuration class will do.

    Raises:
        ValueError: for every invalid combination, naming the field, what is allowed and what was given.
    """
    return build_method(config, Sparsity.read(getattr(config, "_given", config)))


def build_method(config: Any, settings: Sparsity) -> Sparsifier | None:
    """The method that settings describe for the model of a configuration, or None.

    Raises:
        ValueError: as `build_sparsifier`.
    """
    published = getattr(config, "published", None)
    settings = settings if published is None else published(settings)
    text = getattr(config, "text_config", None)
    vision = getattr(config, "vision_config", config)
    geometry = geometry_of(config)
    classes = () if settings.method is None else method_classes(settings.method)
    given = settings.options if isinstance(settings.options, dict) else {}
    for part in classes:
        own = given if len(classes) == 1 else given.get(part.name)
        own = own if isinstance(own, dict) else {}
        if geometry.dynamic:
            _check_without_cls(part, vision)
            _check_dynamic(part.name, own)
        else:
            _check_parts(part, own, config, vision, text)
    method = resolve(settings, geometry)
    if method is not None:
        _check_agreement(method, settings, geometry)
        encoder, depth = method.encoder, geometry.encoder_layers
        if encoder is not None and geometry.dynamic and encoder.feature_layer % depth != depth - 1:
            raise ValueError(
                f"`sparse_layers`: {encoder.name} takes what this tower gives behind its last layer, {depth - 1}, got "
                f"{shown(settings.layers)}."
            )
        _tell_apart(settings.budget, geometry.tokens)
    return method


def geometry_of(config: Any) -> Geometry:
    """The sizes of a model that presets and checks depend on: its own, or those of pictures that are all alike."""
    own: Geometry | None = getattr(config, "sparse_geometry", None)
    if own is not None:
        return own
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", config)
    feature_layer = getattr(config, "vision_feature_layer", -2)
    layer = feature_layer if isinstance(feature_layer, int) else feature_layer[0]
    return Geometry(
        patches=(vision.image_size // vision.patch_size) ** 2,
        encoder_layers=vision.num_hidden_layers,
        decoder_layers=0 if text is None else text.num_hidden_layers,
        # hidden_states[j] is the output of layer j - 1, and hidden_states[-j] that of layer -j.
        feature_layer=layer - 1 if layer > 0 else layer,
        tiles=getattr(config, "tiles_per_image", 1),
        frames=getattr(config, "frames_per_video", None),
        has_cls=vision.model_type not in WITHOUT_CLS,
    )


def _check_without_cls(method: type[Sparsifier], vision: Any) -> None:
    """Refuses a method that a tower without CLS, whose patches are merged behind it, cannot serve."""

    def fits(one: Any) -> bool:
        return one.place != "layers" and not getattr(one, "needs_cls", False)

    if not fits(method):
        what = "reads the attention of CLS" if method.place == "tower" else "works between the layers of a CLIP tower"
        raise ValueError(
            f"`sparse_method`={method.name!r} {what}, which {vision.model_type!r} is not made for; supported: "
            f"{', '.join(name for name in list_methods() if fits(METHODS[name]))}."
        )


def _check_dynamic(name: str, options: dict[str, Any]) -> None:
    """Refuses to renumber tokens that keep the position of their place in the picture, and CLIP's reading of them."""
    if options.get("clip") is not None:
        raise ValueError(
            f"`sparse_options`: clip={shown(options['clip'])} of {name}: this model's tower is no CLIP, with "
            "whose text tower a question could be read; leave it out, and the decoder's embeddings of it count."
        )
    if options.get("positions") == "compact":
        raise ValueError(
            f"`sparse_options`: positions='compact' of {name}: tokens of this model keep the position of their "
            "place in the picture (M-RoPE); 'original' is allowed, or nothing."
        )


def _check_parts(method: type[Sparsifier], options: dict[str, Any], config: Any, vision: Any, text: Any) -> None:
    """Refuses a method, with its options, whose kind of model part is missing or not supported."""
    name = f"`sparse_method`={method.name!r}"
    feature_layer = getattr(config, "vision_feature_layer", -2)
    layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    if method.kind == "decoder":
        if text is None:
            raise ValueError(f"{name} works in a decoder; a vision tower alone takes encoder methods.")
        if text.model_type not in DECODERS:
            raise ValueError(
                f"{name} does not support the text backbone {text.model_type!r}; supported: {', '.join(DECODERS)}. "
                "Encoder methods (visionzip) work with any."
            )
    elif method.place == "projector" and text is None:
        raise ValueError(f"{name} works behind a model's projector; a vision tower alone has none.")
    elif vision.model_type not in ENCODERS and method.place == "projector":
        return
    elif vision.model_type not in ENCODERS and options.get("saliency") != "received":
        received = "; visionzip does in this one with sparse_options={'saliency': 'received'}"
        raise ValueError(
            f"{name} works in a CLIP vision tower, not in {vision.model_type!r}; methods behind the projector "
            f"(divprune) and in the decoder (sparsevlm) work with any{received * (vision.model_type in WITHOUT_CLS)}."
        )
    elif vision.model_type not in (*ENCODERS, *WITHOUT_CLS):
        raise ValueError(
            f"{name} works in a CLIP or SigLIP vision tower, not in {vision.model_type!r}; methods behind the "
            "projector (divprune) and in the decoder (sparsevlm) work with any."
        )
    elif vision.model_type in WITHOUT_CLS and config.vision_feature_select_strategy != "full":
        raise ValueError(
            f"{name} takes all patches of a tower without CLS: vision_feature_select_strategy='full' is allowed, got "
            f"{config.vision_feature_select_strategy!r}, which leaves out the first."
        )
    elif len(layers) > 1:
        raise ValueError(
            f"{name} reduces the features of one layer; this model's projector takes those of several "
            f"(vision_feature_layer={layers})."
        )
    elif layers == [0]:
        raise ValueError(f"{name} needs the attention of a layer; vision_feature_layer=0 is none.")


def _check_agreement(method: Sparsifier, settings: Sparsity, geometry: Geometry) -> None:
    """Refuses a budget beside budgets that it does not stand for."""
    if settings.budget is None or settings.budgets is None:
        return
    try:
        meant: Any = resolve(replace(settings, budgets=None), geometry)
    except ValueError:
        return  # Of these layers the budget does not say what it stands for.
    if meant.counted != method.counted:
        raise ValueError(
            f"`sparse_budget`={shown(settings.budget)} stands for `sparse_budgets`={as_lists(meant.budgets)}, which "
            f"contradicts the given {shown(settings.budgets)}: leave one of the two out."
        )


def _tell_apart(budget: Any, patches: int) -> None:
    if budget == 1 and isinstance(budget, int | float) and patches > 1:
        other = f"all {patches} tokens; 1 keeps one" if isinstance(budget, float) else "one token; 1.0 keeps all"
        logger.warning_once(f"sparse_budget={budget!r} keeps {other}.")


def expansion(method: Sparsifier | None) -> dict[str, Any]:
    """The layers and budgets of a method, as fields hold them."""
    if method is None:
        return dict.fromkeys(EXPANDED)
    return {"sparse_layers": as_lists(method.layers), "sparse_budgets": as_lists(method.budgets) or None}


class SparseFieldsMixin:
    """The five fields: checked, and expanded to layers and budgets, when a configuration is made.

    What a budget expands to can be read from `sparse_layers` and `sparse_budgets`, follows a budget that is changed,
    and is not saved; layers and budgets given by hand are. See `Sparsity` for the fields.
    """

    model_type: ClassVar[str]
    sub_configs: ClassVar[dict[str, Any]]
    # What Trainer gathers of the outputs is logits alone; the stock list lacks what stands for pictures.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "cache",
        "image_hidden_states",
        "image_outputs",
        "video_hidden_states",
        "video_outputs",
        "columns",
        "selection",
        "visual_tokens",
    ]
    _given: dict[str, Any]

    def __post_init__(self, **kwargs: Any) -> None:
        for name in [name for name in kwargs if name.startswith("sparse_")]:
            raise ValueError(f"{name} is no setting{nearest(name, FIELDS)}; there are: {', '.join(FIELDS)}.")
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.expand_sparsity()
        self.when_made()

    def when_made(self) -> None:
        """Called when a configuration is made; the package registers the models then."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in FIELDS and "_given" in self.__dict__:
            self._given[name] = value
            try:
                self.expand_sparsity()
            except ValueError:  # Other fields may follow; what is wrong then is told when the model is made.
                self._show({name: self._given[name] for name in EXPANDED})

    def take_sparsity(self, settings: Sparsity) -> None:
        """Sets all five fields; raises ValueError as `build_sparsifier`."""
        self.__dict__["_given"] = settings.fields()
        self.expand_sparsity()

    def expand_sparsity(self) -> None:
        """Checks the fields and shows the layers and budgets that they stand for.

        Raises:
            ValueError: as `build_sparsifier`.
        """
        given = self._given = Sparsity.read(self.__dict__.get("_given", self)).fields()
        shown = expansion(build_sparsifier(self))
        if given["sparse_budget"] is not None and any(given[name] is not None for name in EXPANDED):
            # Older versions saved what a budget had expanded to beside it.
            alone = Sparsity.read(given | dict.fromkeys(EXPANDED))
            with suppress(ValueError):
                if expansion(build_method(self, alone)) == shown == {name: given[name] for name in EXPANDED}:
                    given.update(dict.fromkeys(EXPANDED))
        self._show(given | shown)

    def _show(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without what the given fields expand to."""
        content: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return content | content.pop("_given", {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', with `sparse_*` keywords in place of what a checkpoint holds of the same method.

        Raises:
            ValueError: also for a checkpoint of another family, and for an option that names something to be loaded,
                where only the checkpoint says so.
        """
        config_dict = merge_sparse_fields(cls, config_dict, kwargs)
        # A stock checkpoint names the stock type, by which transformers would look up the names of the weights.
        kind, stock = config_dict.pop("model_type", cls.model_type), cls.model_type.removeprefix("sparse_")
        if kind != cls.model_type:
            config_dict.pop("architectures", None)
        if kind not in ("", stock, cls.model_type) and "text_config" in cls.sub_configs:
            raise ValueError(
                f"model_type {kind!r}: {stock!r} is allowed where {cls.__name__} is loaded. "
                "AutoModelForImageTextToText.from_pretrained(path, sparse_method=...) takes the class that fits."
            )
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


def merge_sparse_fields(config_class: Any, config_dict: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Moves `sparse_*` keywords from `kwargs` into a copy of `config_dict`.

    A new method drops all settings of the old one. Otherwise a new budget replaces budgets by hand, and the reverse;
    what a saved budget had expanded to is expanded anew.
    """
    given = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("sparse_")}
    merged = dict(config_dict)
    if "sparse_method" in given and given["sparse_method"] != merged.get("sparse_method"):
        merged.update(dict.fromkeys(FIELDS))
    given = {name: value for name, value in given.items() if value is not None or name == "sparse_method"}
    if "sparse_options" not in given:
        refuse_named_files(merged)
    if given and merged.get("sparse_method") is not None:
        merged.update(_by_hand(config_class, merged))
        for name, other in (("sparse_budget", "sparse_budgets"), ("sparse_budgets", "sparse_budget")):
            if name in given and other not in given:
                merged[other] = None
    return {**merged, **given}


def _by_hand(config_class: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved fields without what others of them expand to."""
    try:
        made = config_class(**{k: copy.deepcopy(v) for k, v in saved.items() if k != "model_type"})
    except ValueError:
        return {}
    given: dict[str, Any] = made._given
    return given


def refuse_named_files(settings: Any) -> None:
    """Refuses saved options that name something to be loaded: only who loads a checkpoint may name that.

    Args:
        settings: a mapping with `sparse_method` and `sparse_options`.

    Raises:
        ValueError: with the keyword that names it.
    """
    method, options = settings.get("sparse_method"), settings.get("sparse_options")
    if method is None or not isinstance(options, dict):
        return
    classes = method_classes(method)
    for cls in classes:
        own = options if len(classes) == 1 else options.get(cls.name)
        for name, f in option_fields(cls).items():
            known = f.metadata.get("option", {})
            if known.get("from_caller") and isinstance(own, dict) and own.get(name) is not None:
                raise ValueError(
                    f"the checkpoint's sparse_options name a model to be loaded, {name}={shown(own[name])}; it is "
                    f"loaded only if you name it: from_pretrained(..., sparse_options={shown(options)})."
                )


class DynamicFieldsMixin(SparseFieldsMixin):
    """The five fields of a model whose pictures are of any size, and whose tower has no CLS.

    Tokens are those behind the tower's merger, of a picture or a whole video. A ratio, in `sparse_budget` or
    `sparse_budgets`, is of those that each of them has; a number is one at most: of what has fewer tokens, all stay.
    `sparse_layers` and `sparse_budgets` show what a budget comes to for a picture of 576 tokens; all pictures have the
    same layers.
    """

    vision_config: Any
    text_config: Any

    @property
    def sparse_geometry(self) -> Geometry:
        """What presets and checks depend on: presets are made for a picture of as many tokens as LLaVA-1.5's."""
        return Geometry(
            patches=PRESET_PATCHES,
            encoder_layers=self.vision_config.depth,
            decoder_layers=self.text_config.num_hidden_layers,
            feature_layer=-1,
            dynamic=True,
            has_cls=False,
        )


class SparseCLIPVisionConfig(SparseFieldsMixin, CLIPVisionConfig):
    """`CLIPVisionConfig` with the `sparse_*` fields, for encoder methods."""

    model_type = "sparse_clip_vision_model"

    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None


class SparseLlavaConfig(SparseFieldsMixin, LlavaConfig):
    """`LlavaConfig` with the `sparse_*` fields."""

    model_type = "sparse_llava"

    sparse_method: str | None = None
    sparse_budget: Any = None
    sparse_layers: Any = None
    sparse_budgets: Any = None
    sparse_options: Any = None
