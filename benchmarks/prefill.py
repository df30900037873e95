"""Prefill time of a LLaVA, dense and pruned, as ratios measured in one run.

    python benchmarks/prefill.py                                    # the embedded reference model on the CPU
    python benchmarks/prefill.py --shape llava-1.5-7b --device cuda --dtype bfloat16 --output results.json

Dense and pruned prefills (vision tower, projector, decoder, logits of the last token) alternate in one process, with
the same attention backend, after a warm-up; medians are reported with the quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import llava_sparse
from llava_sparse.reference import CHECKPOINT

SHAPES = {
    "llava-1.5-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llava-1.5-13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}


def build(arguments: argparse.Namespace) -> LlavaForConditionalGeneration:
    """The model, on its device; a shape gets random weights."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape is None:
        model = LlavaForConditionalGeneration.from_pretrained(arguments.model, dtype=dtype)
        return model.to(arguments.device).eval()
    text = LlamaConfig(**SHAPES[arguments.shape], vocab_size=32064, max_position_embeddings=4096)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(arguments.device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def make_inputs(model: LlavaForConditionalGeneration, batch: int, text: int) -> dict[str, torch.Tensor]:
    """Prompts of 5 tokens, one image and `text` tokens; random ids, random pixels."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    high = min(config.text_config.vocab_size, config.image_token_id or config.text_config.vocab_size)
    words = torch.randint(5, max(6, high), (batch, 5 + text), generator=generator)
    words[words == config.image_token_id] = 6
    image = torch.full((batch, config.image_seq_length), config.image_token_id)
    ids = torch.cat([words[:, :5], image, words[:, 5:]], dim=1)
    side = config.vision_config.image_size
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def timed(run: Any, device: str) -> float:
    """Seconds of one call, with the device idle before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    dense = build(arguments)
    pruned = llava_sparse.sparsify(dense, None)
    inputs = make_inputs(dense, arguments.batch, arguments.text)
    layers = None if arguments.layers is None else [int(layer) for layer in arguments.layers.split(",")]

    @torch.inference_mode()
    def prefill(model: Any) -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    settings: list[tuple[str, int | None]] = [("dense", None)]
    settings += [(m, int(b)) for m in arguments.methods.split(",") for b in arguments.budgets.split(",")]
    seconds: dict[str, list[float]] = {f"{m}-{b}" if b else m: [] for m, b in settings}
    for repeat in range(arguments.warmup + arguments.repeats):
        for (method, budget), name in zip(settings, seconds, strict=True):
            model = dense
            if method != "dense":
                model = pruned
                pruned.set_sparsity(method, budget, layers=layers if method == "sparsevlm" else None)
            took = timed(lambda model=model: prefill(model), arguments.device)
            if repeat >= arguments.warmup:
                seconds[name].append(took)
    base = statistics.median(seconds["dense"])
    return {
        name: {
            "median_ms": 1e3 * statistics.median(times),
            "quartiles_ms": [1e3 * q for q in statistics.quantiles(times, n=4)[::2]],
            "speed_up": base / statistics.median(times),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", default="visionzip,sparsevlm")
    parser.add_argument("--budgets", default="64")
    parser.add_argument("--layers", help="pruning layers of sparsevlm, e.g. 1,3,5")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--text", type=int, default=40, help="text tokens after the image")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    result = {
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "output"},
        "machine": {"device": device, "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    for name, row in rows.items():
        low, high = row["quartiles_ms"]
        print(f"{name:16} {row['median_ms']:9.2f} ms  [{low:.2f}, {high:.2f}]  {row['speed_up']:.2f}x")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
