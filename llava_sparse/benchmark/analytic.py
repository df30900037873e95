"""What a prompt of a published model costs, by formula, and what memory it needs: the weights are never made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import llava_sparse
from llava_sparse.evaluation.plan import DENSE, plan_runs
from llava_sparse.evaluation.tables import Table

from .flops import prefill_flops
from .inputs import make_inputs, recorded_prefill
from .report import STAGES, counts_text
from .shapes import build_model, shape_config

BITS = (16, 8, 4)
BATCHES = (1, 8, 32)


def narrow(config: dict[str, Any]) -> dict[str, Any]:
    """A shape's configuration with the same layers of the decoder, and pictures, which runs anywhere."""
    text: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    if "head_dim" in config["text_config"]:
        text["head_dim"] = 16
    rope = config["text_config"].get("rope_parameters", {})
    if "mrope_section" in rope:
        text["rope_parameters"] = rope | {"mrope_section": [2, 3, 3]}
    known = config["vision_config"]
    sizes = dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size", "out_hidden_size"), 64)
    sizes |= dict.fromkeys(("num_attention_heads", "num_heads"), 4) | dict.fromkeys(("num_hidden_layers", "depth"), 2)
    layers = {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0, 1]}
    vision = {name: value for name, value in (sizes | layers).items() if name in known}
    aux = {"aux_hidden_sizes": [8] * 4, "aux_depths": [1] * 4} if "aux_depths" in config else {}
    return config | aux | {"text_config": config["text_config"] | text, "vision_config": known | vision}


@torch.inference_mode()
def analytic(
    shape: str,
    methods: Sequence[str] = ("visionzip", "sparsevlm"),
    budgets: Sequence[float] = (64,),
    text_tokens: int = 40,
) -> list[dict[str, Any]]:
    """The arithmetic and the cache of one prompt, for every run.

    How many tokens each layer sees comes from a run of a narrow model; of a method that lets the data decide, it is
    that of random data.

    Args:
        shape: one of `SHAPES`; methods, budgets: as of `bench`; text_tokens: words of the prompt.

    Returns:
        of each run `run`, `lengths`, `visual_tokens` (see `TokenCounts`), `flops_by_formula` by stage, `kv_bytes` in
        bfloat16.

    Raises:
        ValueError: for an unknown shape, and for what the shape's family refuses.
    """
    config, entries = shape_config(shape), []
    wide, thin = build_model(config, torch.bfloat16, "meta"), build_model(narrow(config), torch.float32, "cpu")
    inputs, text = make_inputs(thin, 1, text_tokens), wide.config.text_config
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for run in plan_runs([DENSE, *(name for name in methods if name != DENSE)], budgets):
        dense = run.method == DENSE
        ours, small = (x if dense else llava_sparse.sparsify(x, run.method, **run.sparsity) for x in (wide, thin))
        lengths, _, visual_tokens = recorded_prefill(small, inputs)
        entries.append(
            {
                "run": run.name,
                "lengths": lengths,
                "visual_tokens": visual_tokens._asdict(),
                "flops_by_formula": prefill_flops(ours, inputs, lengths),
                "kv_bytes": sum(lengths) * 2 * text.num_key_value_heads * size * torch.bfloat16.itemsize,
            }
        )
    return entries


def weight_bytes(model: Any, bits: int) -> int:
    """Bytes of a model's weights in bfloat16, or with its linear layers but the head as bitsandbytes quantises them.

    8 bits: a float32 scale for each row; 4 bits: one for every 64 weights (no double quantisation).
    """
    total = 0
    for module in model.modules():
        linear = isinstance(module, nn.Linear) and module is not model.lm_head
        for name, weight in module.named_parameters(recurse=False):
            count = weight.numel()
            if bits == 16 or not linear or name != "weight":
                total += 2 * count
            else:
                total += count + 4 * len(weight) if bits == 8 else count // 2 + 4 * -(-count // 64)
    return total


def memory(shape: str) -> dict[int, int]:
    """Bytes of a shape's weights, by bits of a weight; see `weight_bytes`."""
    model = build_model(shape_config(shape), torch.bfloat16, "meta")
    return {bits: weight_bytes(model, bits) for bits in BITS}


def analytic_table(shape: str, entries: Sequence[dict[str, Any]]) -> Table:
    """A row for every run: visual tokens, arithmetic by stage, how many times less than dense."""
    title = f"{shape}: TFLOP of a prompt, by formula; visual tokens: entering the decoder / mean over layers / mean "
    all_dense, rows = sum(entries[0]["flops_by_formula"].values()), []
    for entry in entries:
        stages = [entry["flops_by_formula"][name] for name in STAGES]
        cells = [f"{value / 1e12:.3f}" for value in (*stages, sum(stages))]
        rows.append([entry["run"], counts_text(entry), *cells, f"{all_dense / sum(stages):.2f}"])
    columns = ["run", "visual tokens", *STAGES, "all", "dense / this"]
    return Table("", columns, rows, title=f"{title}over prompts")


def memory_rows(shape: str, entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells of a table of memory in GiB: a row for every run, the weights in the first."""
    weights = [f"{value / 2**30:.2f}" for value in memory(shape).values()]
    rows: list[list[str]] = []
    for entry in entries:
        caches = [f"{batch * entry['kv_bytes'] / 2**30:.2f}" for batch in BATCHES]
        rows.append([shape if not rows else "", *(weights if not rows else [""] * 3), entry["run"], *caches])
    return rows


MEMORY_COLUMNS = (
    "model", *("bfloat16" if bits == 16 else f"{bits} bits" for bits in BITS), "run",
    *(f"cache, batch {batch}" for batch in BATCHES),
)  # fmt: skip


def memory_table(shape: str, entries: Sequence[dict[str, Any]]) -> Table:
    """What weights and caches of prompts take."""
    title = "GiB of the weights, and of the cache of prompts in bfloat16"
    return Table("", MEMORY_COLUMNS, memory_rows(shape, entries), words=("run",), title=title)
