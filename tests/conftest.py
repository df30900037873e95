"""Tiny random models: nothing is downloaded, everything runs in milliseconds."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"

import tempfile
from pathlib import Path

import pytest
import tiny
import torch

import llava_sparse

# Tiny tensors: a second thread only waits, and far worse when the cores are shared.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor():
    return tiny.processor()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A stock LLaVA checkpoint under the key names of the Hub, with its processor."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture(scope="session", params=["llama", "mistral", "qwen2"])
def any_checkpoint(request, tmp_path_factory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(params=tiny.CASES, ids=lambda case: case.name)
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


@pytest.fixture(scope="session", autouse=True)
def _module_cache():
    """Code of Hub folders is cached: not in the user's home."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_MODULES_CACHE", folder)
        yield
