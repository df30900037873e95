"""The recipes in hub_configs and the examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_sparse import SparseLlavaConfig, SparseLlavaProcessor
from llava_sparse.modeling.methods import METHODS
from llava_sparse.processing.processing_sparse_llava import _budget

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.parent for path in (ROOT / "hub_configs").glob("*/config.json"))


def test_every_method_has_its_recipes():
    names = {folder.name for folder in RECIPES}
    assert names == {f"llava-1.5-7b-{method}-{budget}" for method in METHODS for budget in (64, 128, 192)}


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_recipe_loads_and_says_what_it_means(folder):
    method, budget = folder.name.split("-")[-2:]
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is SparseLlavaConfig
    assert (config.sparse_method, config.sparse_budget) == (method, int(budget))
    by_hand = SparseLlavaConfig(sparse_method=method, sparse_budget=int(budget))
    assert (config.sparse_layers, config.sparse_budgets) == (by_hand.sparse_layers, by_hand.sparse_budgets)
    assert config.text_config.num_hidden_layers == 32 and config.text_config.vocab_size == 32064
    processor = json.loads((folder / "processor_config.json").read_text())
    tokens = _budget(*(processor[f"sparse_{name}"] for name in ("method", "budget", "budgets")))
    assert tokens == (int(budget) if METHODS[method].kind == "encoder" else None)
    assert folder.name in (folder / "README.md").read_text()


def test_a_configuration_object_loads_stock_weights(checkpoint, processor):
    """As the recipes' pages say: a sparse configuration and the weights of a stock checkpoint."""
    config = AutoConfig.from_pretrained(checkpoint, sparse_method="visionzip", sparse_budget=5)
    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint, config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    direct = AutoModelForImageTextToText.from_pretrained(checkpoint, sparse_method="visionzip", sparse_budget=5)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert torch.equal(model.eval()(**batch).logits, direct.eval()(**batch).logits)


def test_processor_saves_its_settings(tmp_path):
    ours = tiny.processor(SparseLlavaProcessor, sparse_method="visionzip", sparse_budget=5)
    ours.save_pretrained(tmp_path)
    again = SparseLlavaProcessor.from_pretrained(tmp_path)
    assert (again.sparse_method, again.sparse_budget) == ("visionzip", 5)
    text = tiny.QUESTIONS[0]
    assert torch.equal(tiny.inputs(again, text)["input_ids"], tiny.inputs(ours, text)["input_ids"])
    (count,) = again._get_num_multimodal_tokens(image_sizes=[(56, 56)]).num_image_tokens
    assert count == 5
    tiny.processor(SparseLlavaProcessor, sparse_method="visionzip", sparse_budgets=[4, 2]).save_pretrained(tmp_path)
    assert (tiny.inputs(SparseLlavaProcessor.from_pretrained(tmp_path), text)["input_ids"] == 4).sum() == 6
    wider = SparseLlavaProcessor.from_pretrained(tmp_path, sparse_budget=7)
    assert (tiny.inputs(wider, text)["input_ids"] == 4).sum() == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_budget": 5}, "need sparse_method"),
        ({"sparse_method": "visionzap", "sparse_budget": 5}, "unknown"),
        ({"sparse_method": "visionzip"}, "needs sparse_budget"),
        ({"sparse_method": "visionzip", "sparse_budget": 0}, "positive"),
        ({"sparse_method": "visionzip", "sparse_budgets": [4]}, "two numbers"),
        ({"sparse_method": "visionzip", "sparse_budgets": [-4, 8]}, "two numbers"),
        ({"sparse_method": "visionzip", "sparse_budgets": "ab"}, "two numbers"),
        ({"sparse_method": "visionzip", "sparse_budget": 5, "sparse_bugdet": 6}, "no setting"),
    ],
)
def test_invalid_processors(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.processor(SparseLlavaProcessor, **settings)


# These take hours, and have tests of their own.
LONG = ("field.py", "study.py", "train_reference.py")
EXAMPLES = [script for script in sorted((ROOT / "examples").glob("*.py")) if script.name not in LONG]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, id=script.name, marks=[pytest.mark.slow] * (script.name == "evaluate_pope.py"))
        for script in EXAMPLES
    ],
)
def test_example_runs_offline(script, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
