"""The least that a prompt can cost on a machine of given speed: arithmetic, memory traffic, cache; nothing is timed.

    python benchmarks/floors.py --teraflops 989 --terabytes 4.8

Weights are never made: how many tokens each layer sees comes from a run of a narrow model with as many layers.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

import llava_sparse
from llava_sparse.benchmark.floor import floors
from llava_sparse.benchmark.flops import prefill_flops
from llava_sparse.benchmark.shapes import build_model, make_inputs

METHODS = ("dense", "visionzip", "sparsevlm")


def narrow(model: Any) -> LlavaForConditionalGeneration:
    """A model with the layers of another, which runs anywhere."""
    config = type(model.config)(**model.config.to_dict())
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_attention_heads = 64, 64, 4
    config.text_config.num_key_value_heads, config.text_config.head_dim = 4, 16
    return LlavaForConditionalGeneration(config).eval()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflops", type=float, required=True, help="operations a second, in bfloat16")
    parser.add_argument("--terabytes", type=float, required=True, help="of memory, read a second")
    parser.add_argument("--shapes", default="llava-1.5-7b,llava-1.5-13b")
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--text-tokens", type=int, default=40)
    given = parser.parse_args()
    rates = {"flops": given.teraflops * 1e12, "bandwidth": given.terabytes * 1e12}
    columns = ("tower", "decoder", "prefill", "decode, a token", "cache of a prompt")
    table = Table("shape", "run", "batch", *columns, title="TFLOP of a prompt; floors in ms; MiB")
    for shape in given.shapes.split(","):
        wide = build_model(shape, torch.bfloat16, "meta")
        small = narrow(wide)
        inputs = make_inputs(small, 1, given.text_tokens)
        for method in METHODS:
            dense = method == "dense"
            model = small if dense else llava_sparse.sparsify(small, method, given.budget)
            lengths = [layer.keys.shape[2] for layer in model(**inputs, use_cache=True).past_key_values.layers]
            pruned = wide if dense else llava_sparse.sparsify(wide, method, given.budget)
            patches = wide.config.image_seq_length
            formula = prefill_flops(
                pruned, lengths, getattr(getattr(pruned.model, "sparsifier", None), "tokens", patches)
            )
            text = wide.config.text_config
            token = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 2
            for batch in map(int, given.batch_sizes.split(",")):
                cache = batch * sum(lengths) * token
                entry = {"place": {"batch_size": batch}, "flops_by_formula": formula, "kv_bytes": cache}
                least = floors(wide, entry, rates)
                table.add_row(
                    shape, method, str(batch), f"{formula['vision tower'] / 1e12:.2f}",
                    f"{formula['decoder'] / 1e12:.2f}", f"{1000 * least['prefill']:.1f}",
                    f"{1000 * least['decode']:.2f}", f"{cache / batch / 2**20:.1f}",
                )  # fmt: skip
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
