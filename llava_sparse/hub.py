"""Folders that can be pushed to the Hub and load where llava_sparse is not installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

MODEL_CLASSES = {
    "AutoConfig": "configuration_sparse_llava.SparseLlavaConfig",
    "AutoModel": "modeling_sparse_llava.SparseLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_sparse_llava.SparseLlavaForConditionalGeneration",
}
PROCESSOR_CLASSES = {"AutoProcessor": "processing_sparse_llava.SparseLlavaProcessor"}
CARD = """---
library_name: transformers
tags: [llava-sparse]
---
# A pruned LLaVA

Settings: `{settings}`. With the package, `pip install llava-sparse` and `import llava_sparse` before loading; without
it, `trust_remote_code=True` runs the code in this folder:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
```
"""


def save_to_hub_folder(model: Any, processor: Any, folder: str | Path) -> Path:
    """Saves a pruned model and its processor with the code that loads them, and a model card if there is none.

    The folder loads with `trust_remote_code=True` through AutoConfig, AutoModel, AutoModelForImageTextToText and
    AutoProcessor where only transformers is installed.

    Args:
        model: a `SparseLlavaForConditionalGeneration`.
        processor: a `SparseLlavaProcessor`, or a stock `LlavaProcessor`, which needs no code.
        folder: where to; made if it is not there.

    Returns:
        the folder.

    Raises:
        TypeError: if the model is not a pruned one; nothing is written then.
    """
    from .modeling import configuration_sparse_llava, modeling_sparse_llava
    from .processing import processing_sparse_llava

    if not isinstance(model, modeling_sparse_llava.SparseLlavaForConditionalGeneration):
        raise TypeError(
            f"save_to_hub_folder takes a SparseLlavaForConditionalGeneration, not a {type(model).__name__}: load it "
            "with sparse_method=... or use llava_sparse.sparsify."
        )
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _copy_code(modeling_sparse_llava.__file__, folder)
    _copy_code(configuration_sparse_llava.__file__, folder)
    _name_classes(folder / "config.json", MODEL_CLASSES)
    if isinstance(processor, processing_sparse_llava.SparseLlavaProcessor):
        _copy_code(processing_sparse_llava.__file__, folder)
        _name_classes(folder / "processor_config.json", PROCESSOR_CLASSES)
    if not (folder / "README.md").exists():
        config = json.loads((folder / "config.json").read_text())
        settings = {name: value for name, value in config.items() if name.startswith("sparse_") and value is not None}
        (folder / "README.md").write_text(CARD.format(settings=json.dumps(settings)))
    return folder


def _copy_code(entry: str, folder: Path) -> None:
    """Copies a module and all it reaches by relative imports, flat."""
    for file in [entry, *get_relative_import_files(entry)]:
        shutil.copyfile(file, folder / Path(file).name)


def _name_classes(file: Path, classes: dict[str, str]) -> None:
    content = json.loads(file.read_text())
    content["auto_map"] = {**content.get("auto_map", {}), **classes}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
