"""What `trim_cache` changes: captions of the reference scenes with and without it, and the size of the cache.

python benchmarks/trim_cache.py
"""

from __future__ import annotations

import argparse

import torch

import llava_sparse
from llava_sparse.evaluation import load_model
from llava_sparse.evaluation.model import fill_prompt
from llava_sparse.pictures import read_picture
from llava_sparse.reference import SCENES

QUESTION = "What is in the image?"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sparsevlm")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--limit", type=int, default=200, help="pictures")
    given = parser.parse_args()
    loaded = load_model()
    prompt = fill_prompt(loaded.prompt(short_answer=False), QUESTION, loaded.processor.image_token)
    options = ({}, {"trim_cache": True})
    runs = [llava_sparse.sparsify(loaded.model, given.method, given.budget, options=o) for o in options]
    same, held = 0, [0, 0]
    files = sorted((SCENES / "images").iterdir())[: given.limit]
    for file in files:
        inputs = loaded.processor(images=[read_picture(file)], text=[prompt], return_tensors="pt")
        inputs = inputs.to(loaded.model.device, loaded.model.dtype)
        said = []
        for number, model in enumerate(runs):
            out = model.generate(**inputs, do_sample=False, max_new_tokens=24, return_dict_in_generate=True)
            said.append(out.sequences[0].tolist())
            new = out.sequences.shape[1] - inputs["input_ids"].shape[1] - 1
            held[number] += sum(layer.keys.shape[2] - new for layer in out.past_key_values.layers)
        same += said[0] == said[1]
    print(
        f"{same} of {len(files)} captions are the same; the prompts' cache holds {held[1] / held[0]:.2f} of the tokens"
    )


if __name__ == "__main__":
    main()
