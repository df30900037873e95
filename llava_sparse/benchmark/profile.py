"""Where the time of a prefill goes, as torch's profiler sees it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

import llava_sparse
from llava_sparse.evaluation.runs import DENSE

from .run import plan
from .shapes import make_inputs, open_model

ROWS = 20


@torch.inference_mode()
def profile(
    model: Any = None,
    shape: str | None = None,
    methods: Sequence[str] = ("visionzip", "sparsevlm"),
    budgets: Sequence[float] = (64,),
    *,
    batch_size: int = 1,
    text_tokens: int = 40,
    dtype: str = "auto",
    device: str = "auto",
    folder: str | Path,
) -> dict[str, str]:
    """Profiles one prefill of every run, warmed up.

    Args:
        model, shape, methods, budgets: as of `bench`.
        folder: for a trace of each run, `<run>.trace.json`, which chrome://tracing and Perfetto open.

    Returns:
        for each run a table of the operations that take longest.
    """
    runs = plan(methods, budgets)
    dense = open_model(model, shape, dtype, device)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = dense.device.type == "cuda"
    inputs = make_inputs(dense, batch_size, text_tokens)
    tables = {}
    for run in runs:
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
