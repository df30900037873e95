"""How much faster vLLM answers with a pruned model: requests with a picture each, dense and pruned in turn.

    python benchmarks/vllm_throughput.py --rounds 3            # random weights of the shape `small`, 64 visual tokens
    python benchmarks/vllm_throughput.py --model llava-hf/llava-1.5-7b-hf --methods visionzip,divprune --budget 64

In an environment with vLLM (`make test-vllm` makes one for CPUs). Each engine is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DENSE = "dense"


def random_model(folder: Path) -> None:
    """A LLaVA of 109 million random parameters, with the processor of the reference model."""
    import torch
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    from llava_sparse.benchmark.shapes import SHAPES
    from llava_sparse.reference import CHECKPOINT

    config = AutoConfig.from_pretrained(CHECKPOINT)
    text, vision = SHAPES["small"]
    heads = text["num_attention_heads"]
    config.text_config.update(text | {"num_key_value_heads": heads, "head_dim": text["hidden_size"] // heads})
    config.vision_config.update(vision)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    AutoProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)


def measure(arguments: argparse.Namespace) -> None:
    """Prints the seconds of each round of one engine, and the prompt's length."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    settings = {}
    if arguments.method != DENSE:
        settings = {"sparse_method": arguments.method, "sparse_budget": arguments.budget}
    llm = LLM(
        arguments.model, hf_overrides=settings, dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False,
        mm_processor_cache_gb=0, seed=0, enforce_eager=arguments.eager,
    )  # fmt: skip
    noise = [Image.effect_noise((336, 336), 64 + i).convert("RGB") for i in range(arguments.requests)]
    prompt = "USER: <image>\nIs there a dog in the image? ASSISTANT:"
    requests = [{"prompt": prompt, "multi_modal_data": {"image": image}} for image in noise]
    options = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True)
    seconds = []
    for _ in range(arguments.rounds + 1):
        llm.llm_engine.reset_encoder_cache()
        start = time.perf_counter()
        out = llm.generate(requests, options, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    print("\n" + json.dumps({"seconds": seconds[1:], "prompt": len(out[0].prompt_token_ids)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a stock LLaVA; random weights if left out")
    parser.add_argument("--methods", default="visionzip")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture graphs")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if arguments.method:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            random_model(Path(folder))
        best = {}
        for method in (DENSE, *arguments.methods.split(","), DENSE):
            given = [*sys.argv[1:], "--method", method, "--model", arguments.model or folder]
            done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"')))
            best[method] = min([best.get(method, float("inf")), *found["seconds"]])
            seconds = " ".join(f"{x:.2f}" for x in found["seconds"])
            print(
                f"{method}: prompts of {found['prompt']} tokens, {arguments.requests} requests in {seconds} s",
                flush=True,
            )
        for method in arguments.methods.split(","):
            print(f"{method}: {best[DENSE] / best[method]:.2f} times as many requests a second")


if __name__ == "__main__":
    main()
