"""What commands do before they begin: plugins, messages of libraries, threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def prepare(plugins: Sequence[Path] | None = None) -> None:
    """Loads plugins, leaves the screen to our own progress and messages, and busy cores to others."""
    import datasets
    import huggingface_hub
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        torch.set_num_threads(free_threads(torch.get_num_threads(), os.cpu_count() or 1, os.getloadavg()[0]))
    if plugins:
        from .plugins import load_plugins

        load_plugins(plugins)


def free_threads(wanted: int, cores: int, load: float) -> int:
    """As many threads as there are free cores, half of those wanted at least.

    Threads of PyTorch's OpenMP spin while they wait for each other: where they have to share their cores with others,
    two can be several times slower than one.
    """
    return max(1, wanted // 2, min(wanted, round(cores - load)))
