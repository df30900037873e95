"""The least that a prompt can cost on a machine of given speed: arithmetic, memory traffic, cache; nothing is timed.

    python benchmarks/floors.py --teraflops 989 --terabytes 4.8

Weights are never made. `llava-sparse bench --shape NAME --analytic` shows the same arithmetic by stage.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from llava_sparse.benchmark import analytic, build_model
from llava_sparse.benchmark.floor import floors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflops", type=float, required=True, help="operations a second, in bfloat16")
    parser.add_argument("--terabytes", type=float, required=True, help="of memory, read a second")
    parser.add_argument("--shapes", default="llava-1.5-7b,llava-1.5-13b")
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--methods", default="visionzip,sparsevlm")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--text-tokens", type=int, default=40)
    given = parser.parse_args()
    rates = {"flops": given.teraflops * 1e12, "bandwidth": given.terabytes * 1e12}
    columns = ("tower", "decoder", "prefill", "decode, a token", "cache of a prompt")
    table = Table("shape", "run", "batch", *columns, title="TFLOP of a prompt; floors in ms; MiB")
    for shape in given.shapes.split(","):
        wide = build_model(shape, torch.bfloat16, "meta")
        for entry in analytic(shape, given.methods.split(","), [given.budget], given.text_tokens):
            formula, cache = entry["flops_by_formula"], entry["kv_bytes"]
            for batch in map(int, given.batch_sizes.split(",")):
                place = {"place": {"batch_size": batch}, "kv_bytes": batch * cache}
                least = floors(wide, entry | place, rates)
                table.add_row(
                    shape, entry["run"], str(batch), f"{formula['vision tower'] / 1e12:.2f}",
                    f"{formula['decoder'] / 1e12:.2f}", f"{1000 * least['prefill']:.1f}",
                    f"{1000 * least['decode']:.2f}", f"{cache / 2**20:.1f}",
                )  # fmt: skip
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
