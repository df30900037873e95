"""One picture, one question: the dense model, then pruned by both methods.

Runs offline on the embedded reference model; pass a model id or folder to use another one:

    python examples/quickstart.py
    python examples/quickstart.py llava-hf/llava-1.5-7b-hf
"""

from __future__ import annotations

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_sparse
from llava_sparse.reference import CHECKPOINT, SCENES

path = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)
processor = AutoProcessor.from_pretrained(path)
image = Image.open(SCENES / "images" / "scene_000000.jpg")
prompt = "USER: <image>\nIs there a cat in the image? ASSISTANT:"
inputs = processor(images=image, text=prompt, return_tensors="pt")

# The one line that a user of LLaVA changes.
model = AutoModelForImageTextToText.from_pretrained(
    path, sparse_method="visionzip", sparse_budget=64, dtype=torch.float32
)


def answer() -> str:
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


print(f"visionzip, 64 tokens: {answer()}")
model.set_sparsity("sparsevlm", budget=64)
print(f"sparsevlm, 64 tokens: {answer()}")
with torch.no_grad():
    for stage in model(**inputs, output_selection=True).selection:
        print(f"  after layer {stage.layer}: {stage.kept.shape[1]} of {stage.scores.shape[1]} visual tokens kept")
model.set_sparsity(None)
print(f"dense, 576 tokens:    {answer()}")
print(f"methods: {', '.join(llava_sparse.list_methods())}")
