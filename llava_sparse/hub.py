"""Folders that can be pushed to the Hub and load where llava_sparse is not installed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .modeling.pruning_head import PrunedHeadMixin

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
        model: a pruned model of any family, such as `SparseLlavaForConditionalGeneration`.
        processor: its sparse processor, or a stock one, which needs no code.
        folder: where to; made if it is not there.

    Returns:
        the folder.

    Raises:
        TypeError: if the model is not a pruned one; nothing is written then.
    """
    if not isinstance(model, PrunedHeadMixin):
        raise TypeError(
            f"save_to_hub_folder takes a pruned model, such as SparseLlavaForConditionalGeneration, not a "
            f"{type(model).__name__}: load it with sparse_method=... or use llava_sparse.sparsify."
        )
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    autos = dict.fromkeys(("AutoModel", "AutoModelForImageTextToText"), type(model))
    _add_code(folder / "config.json", {"AutoConfig": type(model.config)} | autos)
    if type(processor).__module__.startswith(f"{__package__}."):
        _add_code(folder / "processor_config.json", {"AutoProcessor": type(processor)})
    if not (folder / "README.md").exists():
        config = json.loads((folder / "config.json").read_text())
        settings = {name: value for name, value in config.items() if name.startswith("sparse_") and value is not None}
        (folder / "README.md").write_text(CARD.format(settings=json.dumps(settings)))
    return folder


def _add_code(file: Path, classes: dict[str, type]) -> None:
    """Names the classes in a configuration file, and copies their modules, with all that they import, beside it."""
    content = json.loads(file.read_text())
    named = {auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items()}
    content["auto_map"] = {**content.get("auto_map", {}), **named}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for cls in classes.values():
        entry = str(sys.modules[cls.__module__].__file__)
        for source in [entry, *get_relative_import_files(entry)]:
            shutil.copyfile(source, file.parent / Path(source).name)
