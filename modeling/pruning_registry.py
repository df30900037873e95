"""The methods by name: how a class becomes one of them, and how settings become a method."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, is_dataclass, replace
from typing import Any, TypeVar

from .pruning_methods import DecoderSparsifier, EncoderSparsifier, Sparsifier
from .pruning_settings import JOIN, POSITIONS, Sparsity, check_counts, nearest, option_defaults, shown
from .pruning_shares import compose, entering_of, for_part, shared_out
from .pruning_types import Geometry

METHODS: dict[str, type[Sparsifier]] = {}
# A model for which every method expands its default settings.
TRIAL, TRIAL_BUDGET = Geometry(patches=16, encoder_layers=6, decoder_layers=6), 4
# How many layers a model has, processors do not know.
DEEPEST = 1000

Method = TypeVar("Method", bound=type[Sparsifier])


def register_method(cls: Method) -> Method:
    """Makes a method known under its `name`, wherever methods are named; a decorator, for built-in and own methods.

    From then on, in this process, `from_pretrained`, `sparsify`, `set_sparsity`, compositions, processors, the
    evaluation and the command line know it. A class that is registered again, because its script or notebook cell ran
    again, replaces itself. Nothing is registered where an error is raised.

    Args:
        cls: a frozen dataclass (`@register_method` stands above `@dataclass(frozen=True)`), subclass of
            `EncoderSparsifier` or `DecoderSparsifier` of `llava_sparse.modeling.pruning_methods`, with the class
            attributes `name` and `summary`; `paper` and `cost` are "-" unless it says otherwise.

    Returns:
        `cls`.

    Raises:
        TypeError: if it is no such class, or methods of it are missing.
        ValueError: if an attribute of it is not allowed, its name is taken, or `resolve` does not work with default
            options and a budget of 4 of 16 patches.
    """
    _check_class(cls)
    _check_name(cls)
    _check_declarations(cls)
    _check_defaults(cls)
    METHODS[cls.name] = cls
    return cls


def is_built_in(method: type[Sparsifier]) -> bool:
    """Whether a method is one of this package's, or of the folder that these files have travelled to."""
    return method.__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


def list_methods() -> list[str]:
    """Names of all methods, sorted: the values that `sparse_method` may take."""
    return sorted(METHODS)


def method_classes(name: object) -> tuple[type[Sparsifier], ...]:
    """The class of a method, or those of a composition.

    Raises:
        ValueError: for an unknown name, with the nearest known one, and for methods that do not go together.
    """
    parts: list[Any] = name.split(JOIN) if isinstance(name, str) else [None]
    known = ", ".join(list_methods())
    for part in parts:
        if part not in METHODS:
            raise ValueError(
                f"`sparse_method` must be one of {known}, or an encoder and a decoder method joined by {JOIN!r}, or "
                f"None, got {shown(name)}{nearest(part or name, list_methods())}."
            )
    classes = tuple(METHODS[part] for part in parts)
    encoders = classes[:-1] if classes[-1].kind == "decoder" else classes
    chained = len(encoders) == 2 and encoders[0].place == "layers" and _takes_merged(encoders[1])
    if len(classes) > 1 and not chained and [cls.kind for cls in classes] != ["encoder", "decoder"]:
        found: dict[Any, list[str]] = {True: [], "encoder": [], "decoder": [], "layers": []}
        for known_name in list_methods():
            cls = METHODS[known_name]
            for key in {cls.kind, cls.place, _takes_merged(cls)} & set(found):
                found[key].append(known_name)
        of = {key: ", ".join(names) for key, names in found.items()}
        raise ValueError(
            f"`sparse_method`={shown(name)}: an encoder method, then a decoder method, is allowed: one of "
            f"{of['encoder']}, then one of {of['decoder']}. Behind {of['layers']}, which merges patches inside the "
            f"tower's layers, there may first be one that asks for no grid of patches and no attention: {of[True]}."
        )
    return classes


def _takes_merged(cls: Any) -> bool:
    """Whether a method may choose from tokens that one inside the tower's layers has made of the patches."""
    return cls.place == "projector" and not (cls.needs_grid or cls.needs_attention or cls.needs_cls)


def resolve(settings: Sparsity, geometry: Geometry) -> Sparsifier | None:
    """Builds the method that settings describe; None for the dense model.

    Raises:
        ValueError: for settings without a method, and for all that the method itself refuses.
    """
    settings.check_named()
    if settings.method is None:
        return None
    classes = method_classes(settings.method)
    own = settings.at_most(geometry.tokens) if geometry.dynamic else settings
    if len(classes) > 1:
        method: Sparsifier = compose(classes, geometry, own)
    else:
        method = classes[0].resolve(*for_part(classes[0], geometry, own))
    object.__setattr__(method, "origin", (resolve, settings, geometry))
    return method


def entering(settings: Sparsity, patches: int, at_most: bool = False, **sizes: Any) -> int | None:
    """Tokens of an image of so many patches that enter the decoder; None for all, as in the dense model.

    What a model would refuse is refused here too, as far as it does not depend on the number of layers.

    Args:
        at_most: whether an item may have fewer tokens than are asked for, and then keeps all.
        sizes: further ones of `Geometry`: of a picture in tiles, or a video, `patches` is of a tile, or a frame.

    Raises:
        ValueError: as `resolve`.
    """
    settings.check_named()
    if settings.method is None:
        return None
    classes = method_classes(settings.method)
    geometry = Geometry(patches, DEEPEST, **sizes)
    settings = settings.at_most(geometry.tokens) if at_most or geometry.packed is not None else settings
    if len(classes) == 1:
        if settings.layers is not None:
            check_counts("sparse_layers", settings.layers, -DEEPEST, DEEPEST)
        tokens = entering_of(classes, geometry, [settings])
    else:
        parts = shared_out(settings, geometry.tokens)
        last, own = classes[-1], parts[-1]
        tokens = entering_of([cls for cls in classes if cls.kind == "encoder"], geometry, parts)
        # Processors that older versions saved hold the encoder method's budget alone.
        if last.kind == "decoder" and (own.budget is not None or own.budgets is not None):
            last.entering(geometry.tokens if tokens is None else tokens, own)
    if tokens is not None and settings.budget is not None and settings.budgets is not None:
        meant = entering(replace(settings, budgets=None), patches, **sizes)
        if meant != tokens:
            raise ValueError(
                f"`sparse_budget`={shown(settings.budget)} contradicts the given `sparse_budgets`="
                f"{shown(settings.budgets)}, which keep {tokens}: leave one of the two out."
            )
    return tokens


# --- Checks of a class ---------------------------------------------------------------------------------------------


def _check_class(cls: Any) -> None:
    """Raises TypeError where a class is no method, or not complete."""
    bases = [base for base in (EncoderSparsifier, DecoderSparsifier) if inspect.isclass(cls) and issubclass(cls, base)]
    if len(bases) != 1:
        raise TypeError(
            f"register_method: {getattr(cls, '__name__', repr(cls))} is no method; a subclass of either "
            "EncoderSparsifier or DecoderSparsifier (llava_sparse.modeling.pruning_methods) is allowed."
        )
    missing = set(cls.__abstractmethods__)
    own: Any = DecoderSparsifier.resolve
    if cls.resolve.__func__ is own.__func__:
        presets = ("preset_layers", "preset_budgets")
        missing |= {name for name in presets if getattr(cls, name).__func__ is getattr(bases[0], name).__func__}
    if missing:
        raise TypeError(f"{cls.__name__} is not complete; define {', '.join(sorted(missing))} too.")
    parameters = vars(cls).get("__dataclass_params__")
    if not is_dataclass(cls) or parameters is None or not parameters.frozen:
        raise TypeError(
            f"{cls.__name__} is no frozen dataclass of its own; write @dataclass(frozen=True) above the class, below "
            "@register_method."
        )


def _check_name(cls: type[Sparsifier]) -> None:
    name, taken = getattr(cls, "name", None), f"choose another one (taken: {', '.join(list_methods())})"
    if not isinstance(name, str) or not re.fullmatch("[a-z0-9_-]+", name) or name == "dense":
        raise ValueError(
            f"{cls.__name__}: name={name!r}: lower-case letters, digits, _ and - are allowed, but not 'dense'; it is "
            "what sparse_method calls the method."
        )
    other = METHODS.get(name)
    if other is None or (is_built_in(other) and is_built_in(cls)):
        return
    if is_built_in(other):
        raise ValueError(f"{cls.__name__}: name={name!r} is a method of llava_sparse; {taken}.")
    # A script or a notebook cell may have run twice.
    if (cls.__qualname__, _source(cls)) != (other.__qualname__, _source(other)):
        raise ValueError(f"{cls.__name__}: name={name!r} is that of {other.__module__}.{other.__qualname__}; {taken}.")


def _source(cls: type) -> str:
    """Where a class was written: its file, or the name of its module where there is none."""
    module = inspect.getmodule(cls)
    return getattr(module, "__file__", None) or cls.__module__


def _check_declarations(cls: Any) -> None:
    for attribute in ("summary", "paper", "cost"):
        value = getattr(cls, attribute, None)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{cls.__name__}: {attribute}={value!r}: a text is allowed, of a few words.")
    base = EncoderSparsifier if issubclass(cls, EncoderSparsifier) else DecoderSparsifier
    allowed = {
        "kind": (base.kind,),
        "place": ("tower", "projector", "layers") if base is EncoderSparsifier else ("decoder",),
        "unit": ("tile", "picture"),
        **dict.fromkeys(("looks_at_question", "needs_attention", "draws"), (True, False)),
        **dict.fromkeys(("needs_cls", "needs_grid") if base is EncoderSparsifier else ("before_layer",), (True, False)),
    }
    for attribute, values in allowed.items():
        value = getattr(cls, attribute)
        if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
            words = " or ".join(map(repr, values))
            raise ValueError(f"{cls.__name__}: {attribute}={value!r}: {words} is allowed.")
    if cls.looks_at_question and cls.place in ("tower", "layers"):
        raise ValueError(
            f"{cls.__name__}: place={cls.place!r} with looks_at_question: 'projector' is allowed; the tower runs "
            "before there is a question."
        )
    if hasattr(cls, "option_defaults"):
        raise ValueError(
            f"{cls.__name__}: option_defaults: options are fields of the dataclass, each with its default; "
            "llava_sparse.modeling.pruning_settings.option gives one bounds and help."
        )
    for name, value in option_defaults(cls).items():
        if value is MISSING:
            raise ValueError(f"{cls.__name__}: option {name} needs a default.")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{cls.__name__}: option {name}={value!r} cannot be saved in a configuration; what JSON holds is "
                "allowed: text, numbers, true, false, None, lists and dicts."
            ) from error


def _check_defaults(cls: Any) -> None:
    """Expands the default settings for a small model."""
    tried = f"{cls.__name__}: resolve with default options and a budget of {TRIAL_BUDGET} of {TRIAL.patches} patches"
    settings = Sparsity(cls.name, TRIAL_BUDGET)
    try:
        method = cls.resolve(TRIAL, settings)
        counted = cls.entering(TRIAL.patches, settings)
        found = method.tokens if cls.kind == "encoder" else method.pruned_layers
    except Exception as error:
        raise ValueError(
            f"{tried} raised {type(error).__name__}: {' '.join(str(error).split())}. Make it work there."
        ) from error
    if cls.kind == "encoder":
        if not found == counted == TRIAL_BUDGET:
            raise ValueError(f"{tried} gives tokens={found!r}; {TRIAL_BUDGET} is allowed, what sparse_budget says.")
        return
    last = TRIAL.decoder_layers - 1
    if not found or list(found) != sorted(set(found)) or found[0] < 0 or found[-1] > last:
        raise ValueError(
            f"{tried} prunes the output of layers {found!r} of a decoder with {last + 1}; ascending layers from 0 to "
            f"{last} are allowed. llava_sparse.modeling.pruning_settings.scale_layers scales them."
        )
    if getattr(method, "positions", None) not in POSITIONS:
        raise ValueError(
            f"{tried} gives positions={getattr(method, 'positions', None)!r}; {' or '.join(map(repr, POSITIONS))} is "
            "allowed. Give the class a field `positions`, or an attribute."
        )
