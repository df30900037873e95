"""Writes a folder with a pruned model, its processor and the code that loads them, and pushes it if told to.

    python examples/push_config.py                                  # dry run on the embedded reference model
    python examples/push_config.py --model llava-hf/llava-1.5-7b-hf --method visionzip --budget 64 \\
        --push you/llava-1.5-7b-visionzip-64
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText

from llava_sparse import SparseLlavaProcessor, hub
from llava_sparse.reference import CHECKPOINT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(CHECKPOINT))
parser.add_argument("--method", default="visionzip")
parser.add_argument("--budget", type=int, default=64)
parser.add_argument("--push", metavar="REPO", help="push to this repository; without it nothing leaves the machine")
arguments = parser.parse_args()

settings = {"sparse_method": arguments.method, "sparse_budget": arguments.budget}
model = AutoModelForImageTextToText.from_pretrained(arguments.model, **settings)
processor = SparseLlavaProcessor.from_pretrained(arguments.model, **settings)
with tempfile.TemporaryDirectory() as name:
    folder = hub.save_to_hub_folder(model, processor, Path(name) / "repository")
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:>12,}  {file.name}")
    if arguments.push:
        api = HfApi()
        api.create_repo(arguments.push, exist_ok=True)
        api.upload_folder(repo_id=arguments.push, folder_path=folder)
        print(f"pushed to {arguments.push}; load it with trust_remote_code=True, or with llava_sparse installed")
    else:
        print("dry run: nothing was pushed (--push REPO does it)")
