"""What a repository says of itself: the model card, and measured results where the Hub looks for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .modeling.configuration_sparse_llava import build_sparsifier
from .modeling.pruning_registry import method_classes
from .modeling.pruning_settings import FIELDS

CARD = """---
library_name: transformers
{front}tags: [llava-sparse{tag}]
---
# {title}

{what}

Settings: `{settings}`.

{counts}
Methods: {papers}.

## Loading

```python
{loading}
```

## Limits

- Nothing was trained. Tokens are dropped or merged, and what they showed is lost to the answer: small objects, text in
  pictures and details that nobody asked about suffer first, the more the smaller the budget.
- **Safety.** Which tokens stay follows from the picture (and, with some methods, the question), and can be steered by
  who makes the picture: it may be drawn so that evidence is dropped, or so that what is left misleads. Do not let a
  pruned model decide alone where a missed detail does harm.
- {measured}
"""
PLAIN = """import llava_sparse  # pip install llava-sparse
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({path!r})
processor = AutoProcessor.from_pretrained({path!r})"""
REMOTE = """from transformers import AutoModelForImageTextToText, AutoProcessor

# With the package (`pip install llava-sparse`, `import llava_sparse`), or with the code in this folder:
model = AutoModelForImageTextToText.from_pretrained({path!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({path!r}, trust_remote_code=True)"""


def model_card(
    config: Any, path: str = "path", base: str | None = None, license: str | None = None, measured: str = "",
    config_only: bool = False,
) -> str:  # fmt: skip
    """A model card.

    Args:
        config: a sparse configuration; path: what loads it; base: Hub id of the model that was pruned.
        license: an identifier of the Hub; by default that of the base counts, which the card says.
        measured: what was measured, as a sentence; config_only: whether the repository holds no weights.
    """
    given = {name: value for name, value in config._given.items() if value is not None}
    method = given.get("sparse_method")
    classes = () if method is None else method_classes(method)
    front = "" if base is None else f"base_model: {base}\n"
    if license is not None:
        front += f"license: {license}\n"
    elif base is not None:
        front += f"license: other\nlicense_name: as-the-base-model\nlicense_link: https://huggingface.co/{base}\n"
    weights = f"the weights are those of `{base}`" if base else "the weights are those of the model that was pruned"
    what = f"A model whose visual tokens are pruned, without training, by {method}; {weights}, and so is their licence."
    if config_only:
        what += " This repository holds settings alone: loading it loads those weights."
    return CARD.format(
        front=front,
        tag="" if method is None else f", {', '.join(cls.name for cls in classes)}",
        title=f"{base or 'A LLaVA'}, {'dense' if method is None else f'pruned by {method}'}",
        what=what,
        settings=json.dumps({name: given[name] for name in FIELDS if name in given}),
        counts=_counts(config),
        papers="; ".join(_linked(cls.paper) for cls in classes) or "-",
        loading=(PLAIN if config_only else REMOTE).format(path=path),
        measured=measured or "Nothing was measured on this model; see the papers, and `llava-sparse pope`.",
    )


def _linked(paper: str) -> str:
    return re.sub(r"\(arXiv ([\d.]+)\)", r"(arXiv [\1](https://arxiv.org/abs/\1))", paper)


def _counts(config: Any) -> str:
    """The budget in three counts: as given, what enters the decoder, and what its layers hold in the mean."""
    method = build_sparsifier(config)
    if method is None:
        return ""
    geometry = method.__dict__["origin"][2]
    given = config._given.get("sparse_budget")
    entering, stages = method.counted
    entering = geometry.tokens if entering is None else entering
    lengths, left = [], entering
    behind = {} if stages is None else dict(zip(method.decoder.pruned_layers, stages, strict=False))
    for layer in range(geometry.decoder_layers):
        lengths.append(left)
        left = behind.get(layer, left)
    mean = sum(lengths) / max(1, len(lengths))
    of = f"of {geometry.tokens}" + (", for a picture of that many" if geometry.dynamic else "")
    stated = "by layers, see the settings" if given is None else f"{given}, as the papers' tables count"
    return (
        "| budget | tokens that enter the decoder | mean over its layers, kept tokens alone |\n|---|---|---|\n"
        f"| {stated} | {entering} {of} | {mean:.1f} |\n"
    )


def eval_results(file: str | Path, config: Any) -> tuple[str, str]:
    """What a results file of `llava-sparse pope` says of a configuration: `.eval_results/*.yaml`, and a sentence.

    Raises:
        ValueError: if the questions are of no dataset on the Hub, or no run is of these settings.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    from .evaluation.results import read_results

    results = read_results(file)
    dataset, model = str(results["settings"]["dataset"]), results["settings"]["model"]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) or Path(dataset).exists():
        raise ValueError(f"{file}: its questions, {dataset}, are of no dataset on the Hub; lmms-lab/POPE is one.")
    given = config._given
    runs = [
        run for run in results["methods"]
        if run["method"] == given["sparse_method"] and run.get("budget") == given["sparse_budget"]
    ]  # fmt: skip
    if not runs:
        known = ", ".join(run["name"] for run in results["methods"])
        wanted = f"{given['sparse_method']} at {given['sparse_budget']}"
        raise ValueError(f"{file}: no run of {wanted} is among them: {known}.")
    run = runs[0]
    notes = f"{run['name']}, mean over {len(run['splits'])} splits, llava-sparse pope, model {model}"
    entries = [
        EvalResultEntry(dataset, name, round(100 * run["average"][name], 2), notes=f"{notes}, {name} in percent")
        for name in ("accuracy", "f1")
    ]
    # JSON is YAML.
    text = json.dumps(eval_result_entries_to_yaml(entries), indent=2) + "\n"
    average = run["average"]
    said = f"{100 * average['accuracy']:.1f} accuracy and {100 * average['f1']:.1f} F1 on {dataset}"
    return text, f"Measured by `llava-sparse pope`: {said}, the mean over its splits."
