"""Files of a user's own methods, for the command line."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .modeling.pruning_methods import Sparsifier
from .modeling.pruning_registry import METHODS
from .modeling.pruning_settings import JOIN

PREFIX = "llava_sparse_plugin_"


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


def load_plugins(paths: Sequence[Path] | None) -> None:
    """Makes the methods of plugin files known; raises what `load_plugin` does."""
    for path in paths or ():
        load_plugin(path)


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
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    file = str(path.resolve())
    with _undone_on_error(name):
        # A dataclass looks its module up.
        sys.modules[name] = module
        try:
            exec(compile(content, file, "exec"), vars(module))
        # A script may end itself, when it has parsed its arguments say.
        except (Exception, SystemExit) as error:
            line = _line(error, file)
            where = "" if line is None else f", line {line}"
            raise ValueError(f"plugin {path}{where}: {_words(error)}") from error
        found = {method: cls for method, cls in METHODS.items() if cls.__module__ == name}
        if not found:
            raise ValueError(
                f"plugin {path}: it registers no method; put @llava_sparse.register_method above a class of it, not "
                "behind `if __name__ == '__main__'`."
            )
    return found


@contextmanager
def _undone_on_error(module: str) -> Iterator[None]:
    """Takes back, after an error, what was registered, and a module."""
    methods, old = dict(METHODS), sys.modules.get(module)
    try:
        yield
    except BaseException:
        METHODS.clear()
        METHODS.update(methods)
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
