"""Tiny random models: nothing is downloaded, everything runs in milliseconds."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
# What is cached (code of Hub folders, datasets, metrics) is not in the user's home, nor shared by test processes.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="llava-sparse-tests-")
os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["HF_HOME"], "modules")
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["HF_HOME"], "datasets")

import shutil
from pathlib import Path

import pytest
import tiny
import torch

import llava_sparse

CACHES = Path(os.environ["HF_HOME"])

# Tiny tensors: a second thread only waits, and far worse when the cores are shared.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor():
    return tiny.processor()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A stock LLaVA checkpoint under the key names of the Hub, with its processor."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture(
    scope="session",
    params=["llama", *(pytest.param(backbone, marks=pytest.mark.slow) for backbone in ("mistral", "qwen2"))],
)
def any_checkpoint(request, tmp_path_factory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def _case(case):
    return pytest.param(case, marks=[pytest.mark.slow] if case.slow else [], id=case.name)


@pytest.fixture(params=map(_case, tiny.CASES))
def case(request):
    return request.param


@pytest.fixture
def dense():
    return tiny.dense_model()


@pytest.fixture
def model(case, dense):
    """A pruned model for every method."""
    return llava_sparse.sparsify(dense, case.method, **case.settings)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_unconfigure():
    shutil.rmtree(CACHES, ignore_errors=True)
