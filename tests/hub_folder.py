"""Loads a folder that can be pushed to the Hub where llava_sparse cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llava_sparse":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import json, torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
inputs = torch.load(folder + "/inputs.pt", weights_only=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = None
if "processor" in sys.argv:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
tokens = []
for auto in (AutoModel, AutoModelForImageTextToText):
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokens.append(model.eval().generate(**inputs, max_new_tokens=4, do_sample=False).tolist())
print(json.dumps({"method": config.sparse_method, "processor": type(processor).__name__, "tokens": tokens}))
"""


def load_without_the_package(folder: Path, batch: dict[str, torch.Tensor], processor: bool = True) -> dict:
    """The method of the folder's model, its processor's class, and four tokens by each Auto class."""
    torch.save(batch, folder / "inputs.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_MODULES_CACHE": str(folder / "modules")
    }
    script = folder / "load.py"
    script.write_text(SCRIPT)
    arguments = [str(folder), *["processor"] * processor]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
