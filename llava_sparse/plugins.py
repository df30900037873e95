"""Methods of a user's own: registering a class, and files of such classes for the command line."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from .modeling.checks import POSITIONS
from .modeling.composition import JOIN, SETTINGS
from .modeling.methods import BUILT_IN, METHODS, TRIAL, TRIAL_BUDGET
from .modeling.sparsifier import DecoderSparsifier, EncoderSparsifier, Sparsifier
from .processing import processing_sparse_llava as processing

PREFIX = "llava_sparse_plugin_"
PLACES = ("tower", "projector")
# What results and the table of methods show of a class that says nothing.
UNSAID = {"paper": "-", "cost": "-"}

Method = TypeVar("Method", bound=type[Sparsifier])


@dataclass(frozen=True)
class Plugin:
    """A plugin file that was loaded.

    Attributes:
        path: absolute; sha256: of the content that was executed.
        methods: the classes that it registered, by name.
    """

    path: Path
    sha256: str
    methods: dict[str, type[Sparsifier]]


_plugins: dict[str, Plugin] = {}  # by name of module
_registered: list[type[Sparsifier]] = []  # all calls, in order


def register_method(cls: Method) -> Method:
    """Makes a method of your own known, under its `name`, wherever methods are named; also a decorator.

    From then on, in this process, `from_pretrained`, `sparsify`, `set_sparsity`, compositions, processors, the
    evaluation and the command line know it. A class that is registered again, because its script or notebook cell ran
    again, replaces itself. Nothing is registered where an error is raised.

    Args:
        cls: a frozen dataclass (`@register_method` stands above `@dataclass(frozen=True)`), subclass of
            `EncoderSparsifier` or `DecoderSparsifier` of `llava_sparse.modeling.sparsifier`, with the class attributes
            `name` and `summary`; `paper` and `cost` are "-" unless it says otherwise.

    Returns:
        `cls`.

    Raises:
        TypeError: if it is no such class, or methods of it are missing.
        ValueError: if an attribute of it is not allowed, its name is taken, or `resolve` does not work with default
            options and a budget of 4 of 16 patches.
    """
    base = _check_class(cls)
    _check_name(cls)
    _check_texts(cls)
    _check_options(cls)
    _check_flags(cls, base)
    parent = next((method for method in BUILT_IN.values() if issubclass(cls, method)), None)
    _check_defaults(cls, base, parent)
    for attribute, text in UNSAID.items():
        if not hasattr(cls, attribute):
            setattr(cls, attribute, text)
    METHODS[cls.name] = cls
    processing.register_method(cls.name, cls.kind, None if parent is None else parent.name)
    _registered.append(cls)
    return cls


def _check_class(cls: Any) -> type[Sparsifier]:
    """Returns the kind of method that a class is; raises TypeError where it is none, or not complete."""
    bases = [base for base in (EncoderSparsifier, DecoderSparsifier) if inspect.isclass(cls) and issubclass(cls, base)]
    if len(bases) != 1:
        raise TypeError(
            f"register_method: {getattr(cls, '__name__', repr(cls))} is no method; a subclass of either "
            "EncoderSparsifier or DecoderSparsifier (llava_sparse.modeling.sparsifier) is allowed."
        )
    missing = set(cls.__abstractmethods__)
    if cls.resolve.__func__ is DecoderSparsifier.resolve.__func__:
        presets = ("preset_layers", "preset_budgets")
        missing |= {name for name in presets if getattr(cls, name).__func__ is getattr(bases[0], name).__func__}
    if missing:
        raise TypeError(f"{cls.__name__} is not complete; define {', '.join(sorted(missing))} too.")
    own = vars(cls).get("__dataclass_params__")
    if not is_dataclass(cls) or own is None or not own.frozen:
        raise TypeError(
            f"{cls.__name__} is no frozen dataclass of its own; write @dataclass(frozen=True) above the class, below "
            "@register_method."
        )
    return bases[0]


def _check_name(cls: type[Sparsifier]) -> None:
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch("[a-z0-9_-]+", name) or name == "dense":
        raise ValueError(
            f"{cls.__name__}: name={name!r}: lower-case letters, digits, _ and - are allowed, but not 'dense'; it is "
            "what sparse_method calls the method."
        )
    if name in BUILT_IN:
        raise ValueError(
            f"{cls.__name__}: name={name!r} is a method of llava_sparse; choose another one (taken: {_taken()})."
        )
    if name in METHODS and not _same_class(METHODS[name], cls):
        other = METHODS[name]
        raise ValueError(
            f"{cls.__name__}: name={name!r} is that of {other.__module__}.{other.__qualname__}; choose another one "
            f"(taken: {_taken()})."
        )


def _taken() -> str:
    return ", ".join(sorted(METHODS))


def _same_class(one: type, other: type) -> bool:
    """Whether two classes are the same lines of a program, which may have run twice."""
    files = [getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in (one, other)]
    same_file = files[0] is not None and files[1] is not None and Path(files[0]).resolve() == Path(files[1]).resolve()
    return one.__qualname__ == other.__qualname__ and (one.__module__ == other.__module__ or same_file)


def _check_texts(cls: type[Sparsifier]) -> None:
    for attribute in ("summary", "paper", "cost"):
        value = getattr(cls, attribute, UNSAID.get(attribute))
        if not isinstance(value, str) or not value.strip():
            hint = "may be left out" if attribute in UNSAID else "says in a few words what the method does"
            raise ValueError(f"{cls.__name__}: {attribute}={value!r}: a text is allowed; it {hint}.")


def _check_options(cls: type[Sparsifier]) -> None:
    defaults = cls.option_defaults
    if not isinstance(defaults, dict):
        raise ValueError(f"{cls.__name__}: option_defaults={defaults!r}: a dict of options is allowed.")
    names = [field.name for field in fields(cls) if field.name not in SETTINGS]
    for name, value in defaults.items():
        if name not in names:
            raise ValueError(
                f"{cls.__name__}: option_defaults has {name!r}, which is no field of the dataclass; allowed: "
                f"{', '.join(names) or 'none'}. Add a field, or drop the option."
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{cls.__name__}: option_defaults: {name}={value!r} cannot be saved in a configuration; what JSON "
                "holds is allowed: text, numbers, true, false, None, lists and dicts."
            ) from error


def _check_flags(cls: Any, base: type[Sparsifier]) -> None:
    if cls.kind != base.kind:
        raise ValueError(f"{cls.__name__}: kind={cls.kind!r}: {base.kind!r} is allowed for a {base.__name__}.")
    for flag in ("looks_at_question", "needs_attention" if base is EncoderSparsifier else "before_layer"):
        if not isinstance(getattr(cls, flag), bool):
            raise ValueError(f"{cls.__name__}: {flag}={getattr(cls, flag)!r}: true or false is allowed.")
    if base is not EncoderSparsifier:
        return
    if cls.place not in PLACES:
        raise ValueError(f"{cls.__name__}: place={cls.place!r}: {' or '.join(map(repr, PLACES))} is allowed.")
    if cls.looks_at_question and cls.place != "projector":
        raise ValueError(
            f"{cls.__name__}: place={cls.place!r} with looks_at_question: 'projector' is allowed; the tower runs "
            "before there is a question."
        )


def _check_defaults(cls: Any, base: type[Sparsifier], parent: type[Sparsifier] | None) -> None:
    """Expands the default settings for a small model.

    Args:
        parent: the method of the package that `cls` is a variant of, if any.
    """
    tried = f"{cls.__name__}: resolve with default options and sparse_budget={TRIAL_BUDGET} of {TRIAL.patches} patches"
    try:
        method = cls.resolve(TRIAL, TRIAL_BUDGET, None, None, None)
        found = method.tokens if base is EncoderSparsifier else method.pruned_layers
    except Exception as error:
        raise ValueError(f"{tried} raised {_words(error)}. Make it work there.") from error
    if base is EncoderSparsifier:
        if found != TRIAL_BUDGET:
            raise ValueError(f"{tried} gives tokens={found!r}; {TRIAL_BUDGET} is allowed, what sparse_budget says.")
        if parent is None and method.budgets != (TRIAL_BUDGET,):
            raise ValueError(
                f"{tried} gives budgets={method.budgets!r}; ({TRIAL_BUDGET},) is allowed, the tokens of an image: "
                "processors count by it."
            )
        return
    last = TRIAL.decoder_layers - 1
    if not found or list(found) != sorted(set(found)) or found[0] < 0 or found[-1] > last:
        raise ValueError(
            f"{tried} prunes the output of layers {found!r} of a decoder with {last + 1}; ascending layers from 0 to "
            f"{last} are allowed. llava_sparse.modeling.presets.scale_layers scales them."
        )
    positions = getattr(method, "positions", None)
    if positions not in POSITIONS:
        raise ValueError(
            f"{tried} gives positions={positions!r}; {' or '.join(map(repr, POSITIONS))} is allowed. Give the class a "
            "field `positions`, or an attribute."
        )


def load_plugin(path: str | Path) -> list[str]:
    """Executes a Python file that registers methods, as a module named `llava_sparse_plugin_` and the file's stem.

    The same file with the same content is executed once; with another content it is executed again, and its classes
    replace themselves. A file that fails leaves nothing registered. What it imports has to be importable: its own
    folder is not searched.

    Args:
        path: a `.py` file.

    Returns:
        the names of the methods that it registered.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is no `.py` file, raises an error (with its line), registers nothing, or has the name of
            another plugin.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"plugin {path}: no such file; a Python file is allowed.")
    if path.suffix != ".py":
        raise ValueError(f"plugin {path}: a Python file, whose name ends in .py, is allowed.")
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    name = PREFIX + path.stem
    known = _plugins.get(name)
    if known is not None and known.path != path.resolve():
        raise ValueError(f"plugin {path}: {known.path} is loaded under the same name; rename one of the two.")
    if known is None or known.sha256 != sha256:
        _plugins[name] = Plugin(path.resolve(), sha256, _execute(name, path, content))
    return list(_plugins[name].methods)


def _execute(name: str, path: Path, content: bytes) -> dict[str, type[Sparsifier]]:
    """Runs a plugin's content as a module; returns what it registered."""
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before = len(_registered)
    with _undone_on_error(name):
        # A dataclass looks its module up.
        sys.modules[name] = module
        try:
            exec(compile(content, str(spec.origin), "exec"), vars(module))
        # A script may end itself, when it has parsed its arguments say.
        except (Exception, SystemExit) as error:
            line = _line(error, str(spec.origin))
            where = "" if line is None else f", line {line}"
            raise ValueError(f"plugin {path}{where}: {_words(error)}") from error
        if len(_registered) == before:
            raise ValueError(
                f"plugin {path}: it registers no method; put @llava_sparse.register_method above a class of it, not "
                "behind `if __name__ == '__main__'`."
            )
    return {cls.name: cls for cls in _registered[before:]}


@contextmanager
def _undone_on_error(module: str) -> Iterator[None]:
    """Takes back, after an error, what was registered, and a module."""
    methods, encoders = dict(METHODS), dict(processing.ENCODER_METHODS)
    decoders, old = list(processing.DECODER_METHODS), sys.modules.get(module)
    try:
        yield
    except BaseException:
        METHODS.clear()
        METHODS.update(methods)
        processing.ENCODER_METHODS.clear()
        processing.ENCODER_METHODS.update(encoders)
        processing.DECODER_METHODS[:] = decoders
        sys.modules.pop(module, None)
        if old is not None:
            sys.modules[module] = old
        raise


def _line(error: BaseException, file: str) -> int | None:
    """The last line of a file that an error came through."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def _words(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def plugin_files(methods: Iterable[str]) -> dict[str, list[dict[str, str]]]:
    """What results say of the plugin files that define some of the methods: `plugins`, name and SHA-256 of each.

    Args:
        methods: names of methods, composed ones too.

    Returns:
        a setting, or none where no plugin takes part.
    """
    names = {part for method in methods for part in method.split(JOIN)}
    used = [
        {"file": plugin.path.name, "sha256": plugin.sha256}
        for plugin in _plugins.values()
        if any(name in names and METHODS.get(name) is cls for name, cls in plugin.methods.items())
    ]
    return {"plugins": used} if used else {}
