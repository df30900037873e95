"""Facts about the repository that no other tool checks: packages, versions, and files that travel to the Hub."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import llava_sparse

ROOT = Path(__file__).resolve().parents[2]
MAPPED = {"modeling": "llava_sparse.modeling", "processing": "llava_sparse.processing"}
# Imports the model's settings for the processor's files. Those import none of the model's, for either can be pushed
# alone; what a package's `__init__` holds is never pushed.
GLUE = ROOT / "processing" / "__init__.py"
PORTABLE = sorted(path for folder in MAPPED for path in (ROOT / folder).glob("*.py") if path != GLUE)


def test_setup_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "llava_sparse").rglob("__init__.py")}
    assert set(config["options"]["packages"].split()) == found | set(MAPPED.values())


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == llava_sparse.__version__


def test_typed_marker_is_installed():
    assert resources.files("llava_sparse").joinpath("py.typed").is_file()


@pytest.mark.parametrize("folder", MAPPED)
def test_portable_folders_are_flat(folder):
    assert [path.name for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("path", PORTABLE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_portable_imports(path):
    """What `custom_object_save` can follow, and what is there where only transformers is installed."""
    source = path.read_text(encoding="utf-8")
    allowed = sys.stdlib_module_names | {"torch", "transformers"}
    relative_lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{ast.unparse(node)}: only files of this folder"
            assert node.module is not None, f"{ast.unparse(node)}: left out of a pushed folder; name the file"
            assert (path.parent / f"{node.module}.py").is_file(), ast.unparse(node)
            relative_lines.add(node.lineno)
    for number, line in enumerate(source.splitlines(), start=1):
        if re.match(r"\s*(from|import)\s+\.", line):
            assert number in relative_lines, f"line {number} of a string reads like a relative import"


def test_processors_are_joined_to_the_models_settings_in_one_file():
    tree = ast.parse(GLUE.read_text(encoding="utf-8"))
    absolute = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    assert {name.rpartition(".")[0] for name in absolute if name.startswith("llava_sparse")} == {MAPPED["modeling"]}
    assert {name.split(".")[0] for name in absolute} <= sys.stdlib_module_names | {"llava_sparse"}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert plain <= sys.stdlib_module_names
    from_here = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]
    modules = {node.module for node in from_here}
    assert None in modules and all(name.startswith("processing_sparse_") for name in modules - {None})


def test_import_of_the_package():
    """It imports configuration and methods, nothing that costs seconds, and leaves Python's own machinery alone."""
    script = """
import sys, types
import torch, transformers
finders, hooks, known = list(sys.meta_path), list(sys.path_hooks), set(sys.modules)
import llava_sparse
assert (sys.meta_path, sys.path_hooks) == (finders, hooks)
new = [name for name in set(sys.modules) - known if name.partition(".")[0] == "llava_sparse"]
assert {"llava_sparse.modeling.configuration_sparse_llava", "llava_sparse.modeling.pruning_registry"} <= set(new)
assert all(type(sys.modules[name]) is types.ModuleType for name in new)
heavy = {
    "transformers.modeling_utils", "transformers.models.llava.modeling_llava", "transformers.processing_utils",
    "datasets", "evaluate", "llava_sparse.processing", "llava_sparse.modeling.modeling_sparse_llava",
}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert llava_sparse.list_methods() and set(llava_sparse.__all__) <= set(dir(llava_sparse))
save = llava_sparse.hub.save_to_hub_folder
try:
    save(None, None, "folder")
except TypeError as error:
    assert "sparsify" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
