"""Where the time of a prefill goes, as torch's profiler sees it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

import llava_sparse
from llava_sparse.evaluation.plan import DENSE

from .inputs import make_inputs
from .run import Settings
from .shapes import open_model

ROWS = 20


def profile(
    model: Any = None,
    shape: str | None = None,
    methods: Sequence[str] = Settings.methods,
    budgets: Sequence[float] = Settings.budgets,
    *,
    folder: str | Path,
    batch_size: int = 1,
    text_tokens: int = 40,
    **loading: Any,
) -> dict[str, str]:
    """As `profile_runs`, of keywords: the fields of `Settings`, and what `load_model` takes."""
    places = {"batch_sizes": [batch_size], "text_tokens": [text_tokens]}
    return profile_runs(Settings.of(model, shape, methods, budgets, **places, **loading), folder)


@torch.inference_mode()
def profile_runs(settings: Settings, folder: str | Path) -> dict[str, str]:
    """Profiles one prefill of every run, warmed up.

    Args:
        settings: of which the first batch size and number of words count.
        folder: for a trace of each run, `<run>.trace.json`, which chrome://tracing and Perfetto open.

    Returns:
        for each run a table of the operations that take longest.
    """
    dense = open_model(settings.model, settings.shape, **settings.loading)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = dense.device.type == "cuda"
    inputs = make_inputs(dense, settings.batch_sizes[0], settings.text_tokens[0])
    tables = {}
    for run in settings.runs:
        pruned = dense if run.method == DENSE else llava_sparse.sparsify(dense, run.method, **run.sparsity)
        for _ in range(2):
            pruned(**inputs, use_cache=True, logits_to_keep=1)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=activities) as profiler:
            pruned(**inputs, use_cache=True, logits_to_keep=1)
            if on_gpu:
                torch.cuda.synchronize(dense.device)
        name = re.sub(r"[^\w@=.-]", "_", run.name)
        profiler.export_chrome_trace(str(folder / f"{name}.trace.json"))
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        tables[run.name] = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=50)
    return tables
