"""The recipes in hub_configs and the examples."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor

import llava_sparse
from llava_sparse import SparseLlavaProcessor, recipes
from llava_sparse.modeling.configuration_sparse_llava import geometry_of
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.published import MODELS

ROOT = Path(__file__).parents[2]
BUDGET = (
    "`sparse_budget` must be an int in [1, 16], the visual tokens of one image, or a float in (0, 1], a ratio of them"
)
PARTS = "`sparse_budgets` must be a list of 2 ints in [0, 17]"


def processor_class(folder: Path):
    return getattr(llava_sparse, json.loads((folder / "processor_config.json").read_text())["processor_class"])


RECIPES = sorted(path.parent for path in (ROOT / "hub_configs").glob("*/config.json"))
SOME = {folder.name.rsplit("-", 2)[0]: folder for folder in RECIPES}


def test_recipes_are_what_their_command_writes(tmp_path):
    """`make recipes` changes nothing, and takes away what it does not know."""
    (tmp_path / "stale").mkdir()
    (tmp_path / "stale" / "config.json").write_text("{}")
    assert recipes.write(tmp_path) == len(RECIPES)
    files = [
        {str(f.relative_to(top)): f.read_bytes() for f in top.rglob("*.*") if f.is_file()}
        for top in (tmp_path, ROOT / "hub_configs")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "folder", [f for f in RECIPES if (f / "processor_config.json").exists()], ids=lambda folder: folder.name
)
def test_processor_of_a_recipe_survives_load_and_save(folder, tmp_path):
    tiny.processor().save_pretrained(tmp_path)
    shutil.copy(folder / "processor_config.json", tmp_path)
    processor_class(folder).from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    before, after = (
        {k: v for k, v in json.loads((top / "processor_config.json").read_text()).items() if k.startswith("sparse_")}
        for top in (folder, tmp_path / "again")
    )
    assert {k: v for k, v in after.items() if v is not None} == before


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_recipe_loads_and_says_what_it_means(folder):
    name, method, budget = folder.name.rsplit("-", 2)
    of, amount = MODELS[name], float(budget) if "." in budget else int(budget)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is of.family.sparse("Config")
    assert config.sparse_method == method
    # VisionZip's papers write ratios as [dominant, contextual].
    split = {0.5: [0.45, 0.05], 0.7: [0.65, 0.05]}.get(amount) if method == "visionzip" else None
    given = {"sparse_budget": amount} if split is None else {"sparse_budgets": split}
    assert config.to_dict().items() >= ({"sparse_budget": None, "sparse_budgets": None} | given).items()
    # Of another folder of the same model: what belongs to the method alone differs.
    by_hand = AutoConfig.from_pretrained(SOME[name], sparse_method=method, **given)
    assert (config.sparse_layers, config.sparse_budgets) == (by_hand.sparse_layers, by_hand.sparse_budgets)
    assert folder.name in (folder / "README.md").read_text()
    if of.processor is None:
        assert not (folder / "processor_config.json").exists()
        return
    processor = json.loads((folder / "processor_config.json").read_text())
    settings = {name: value for name, value in processor.items() if name.startswith("sparse_")}
    tokens = int(budget) if METHODS[method].kind == "encoder" else None
    assert settings.pop("sparse_tokens", None) == tokens
    assert settings == {"sparse_method": method, "sparse_budget": int(budget)}
    pictures = CLIPImageProcessor(**processor.pop("image_processor"))
    assert processor.pop("processor_class") == f"Sparse{of.family.prefix}Processor"
    ours = processor_class(folder)(pictures, tiny.tokenizer(), **processor)
    assert ours.sparse_tokens == tokens
    (count,) = ours._get_num_multimodal_tokens(image_sizes=[(336, 336)]).num_image_tokens
    assert count == (tokens or 576 * (5 if "hd" in name else 1))


SIZES = {  # parameters of the decoder and its head, in thousand millions, and visual tokens that presets are made for
    "llava-1.5-7b": (6.74, 576),
    "llava-1.5-13b": (13.02, 576),
    "llava-next-7b": (6.74, 2880),
    "llava-next-mistral-7b": (7.24, 2880),
    "llava-next-video-7b": (6.74, 2880),
    "llava-onevision-qwen2-7b": (7.61, 7290),
    "video-llava-7b": (6.74, 2056),
    "mgm-7b": (6.74, 576),
    "mgm-7b-hd": (6.74, 2880),
    "qwen2-vl-7b": (7.62, 576),
    "qwen2.5-vl-7b": (7.62, 576),
    "qwen3-vl-8b": (8.19, 576),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_published_sizes(name):
    config = MODELS[name].family.sparse("Config").from_dict(MODELS[name].config)
    text = config.text_config
    width, inner, size = text.hidden_size, text.intermediate_size, getattr(text, "head_dim", None)
    heads, keys = text.num_attention_heads, text.num_key_value_heads
    size = size or width // heads
    layer = 2 * width * size * (heads + keys) + 3 * width * inner
    total = text.num_hidden_layers * layer + 2 * width * text.vocab_size
    assert (round(total / 1e9, 2), geometry_of(config).tokens) == SIZES[name]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_family_refuses_has_no_recipe(name):
    """And what it takes has one, but for LLaVA-NeXT-Video, whose videos, not pictures, VisionZip refuses."""
    left_out = set(recipes.FOUR) - set(recipes.BUDGETS[name])
    assert left_out == ({"visionzip"} if name in ("llava-onevision-qwen2-7b", "llava-next-video-7b") else set())
    if name == "llava-onevision-qwen2-7b":
        with pytest.raises(ValueError, match="works in a CLIP vision tower"):
            recipes.recipe(name, "visionzip", 64)


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
    assert SparseLlavaProcessor.from_pretrained(tmp_path).sparse_budgets == [4, 2]
    wider = SparseLlavaProcessor.from_pretrained(tmp_path, sparse_budget=7)
    assert (tiny.inputs(wider, text)["input_ids"] == 4).sum() == 7
    assert (wider.sparse_budget, wider.sparse_budgets, wider.sparse_tokens) == (7, None, 7)


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"sparse_method": "visionzip", "sparse_budget": 0.25}, 4),
        ({"sparse_method": "visionzip", "sparse_budget": 1.0}, 16),
        ({"sparse_method": "visionzip", "sparse_budgets": [4, 2], "sparse_layers": [-2]}, 6),
        ({"sparse_method": "sparsevlm", "sparse_budgets": [8, 4], "sparse_layers": [1, 3]}, None),
        ({"sparse_method": "divprune+sparsevlm", "sparse_budget": 0.25}, 8),
        ({"sparse_method": "divprune+sparsevlm", "sparse_budget": [7, 0.5]}, 7),
        ({"sparse_method": "divprune+sparsevlm", "sparse_budgets": [[9], [6, 3]], "sparse_layers": [None, [1, 3]]}, 9),
        ({"sparse_method": "scope", "sparse_budget": 5, "sparse_options": {"alpha": 2.0}}, 5),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_processor_keeps_settings_as_given(settings, tokens, tmp_path):
    ours = tiny.processor(SparseLlavaProcessor, **settings)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    again = SparseLlavaProcessor.from_pretrained(tmp_path)
    for processor in (ours, again):
        assert {name: getattr(processor, name) for name in settings} == settings
        assert processor.sparse_tokens == saved.get("sparse_tokens") == tokens
        ids = tiny.inputs(processor, tiny.QUESTIONS)["input_ids"]
        assert (ids == 4).sum(1).tolist() == [(tokens or 16) * text.count("<image>") for text in tiny.QUESTIONS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_budget": 5}, "`sparse_budget`=5 needs `sparse_method`: name a method too."),
        ({"sparse_layers": [1]}, "`sparse_layers`=[1] needs `sparse_method`: name a method too."),
        ({"sparse_method": "visionzap", "sparse_budget": 5}, "or None, got 'visionzap' (did you mean 'visionzip'?)."),
        ({"sparse_method": "visionzip"}, "`sparse_method`='visionzip' needs `sparse_budget` (64, say) or"),
        ({"sparse_method": "visionzip", "sparse_budget": 0}, f"{BUDGET}, got 0."),
        ({"sparse_method": "visionzip", "sparse_budget": 17}, f"{BUDGET}, got 17."),
        ({"sparse_method": "visionzip", "sparse_budget": 1.5}, f"{BUDGET}, got 1.5."),
        ({"sparse_method": "sparsevlm", "sparse_budget": True}, f"{BUDGET}, got True."),
        ({"sparse_method": "visionzip", "sparse_budgets": [4]}, f"{PARTS}, got [4]."),
        ({"sparse_method": "visionzip", "sparse_budgets": [-4, 8]}, f"{PARTS}, got [-4, 8]."),
        ({"sparse_method": "visionzip", "sparse_budgets": "ab"}, f"{PARTS}, got 'ab'."),
        ({"sparse_method": "visionzip", "sparse_budgets": [10, 8]}, "together at most 17, the tokens of the encoder"),
        ({"sparse_method": "sparsevlm", "sparse_budgets": [3, 5]}, "must fall from stage to stage, got [3, 5]."),
        (
            {"sparse_method": "sparsevlm", "sparse_budget": 5, "sparse_options": {"raters": "any"}},
            "`sparse_options`: 'raters' must be one of 'selected', 'text', 'all', got 'any'.",
        ),
        ({"sparse_method": "sparsevlm+visionzip", "sparse_budget": 5}, "an encoder method, then a decoder method, is"),
        ({"sparse_method": "divprune+sparsevlm", "sparse_budgets": [3, 2]}, "two lists, [divprune's, sparsevlm's]"),
        (
            {"sparse_method": "visionzip", "sparse_budget": 5, "sparse_bugdet": 6},
            "sparse_bugdet is no setting; there are: sparse_method, sparse_budget, sparse_layers, sparse_budgets, "
            "sparse_options.",
        ),
    ],
)
def test_invalid_processors(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.processor(SparseLlavaProcessor, **settings)


def test_invalid_settings_of_a_loaded_processor(checkpoint):
    with pytest.raises(ValueError, match=r"did you mean 'visionzip'\?"):
        SparseLlavaProcessor.from_pretrained(checkpoint, sparse_method="visionzap", sparse_budget=5)
    with pytest.raises(ValueError, match=re.escape(f"{BUDGET}, got 17.")):
        SparseLlavaProcessor.from_pretrained(checkpoint, sparse_method="visionzip", sparse_budget=17)


@pytest.mark.parametrize("saved", [None, {"sparse_method": "visionzip", "sparse_budgets": [4, 2]}])
def test_a_folder_of_a_processor_alone_takes_settings(saved, tmp_path):
    """There is no config.json in it, which tokenizers look for."""
    cls, settings = (LlavaProcessor, {}) if saved is None else (SparseLlavaProcessor, saved)
    tiny.processor(cls, **settings).save_pretrained(tmp_path)
    given = {"sparse_method": "scope", "sparse_budget": 0.25, "sparse_options": {"alpha": 2.0}}
    ours = SparseLlavaProcessor.from_pretrained(tmp_path, **given)
    assert {name: getattr(ours, name) for name in given} == given
    assert (ours.sparse_budgets, ours.sparse_tokens) == (None, 4)


# These take hours, and have tests of their own.
LONG = ("field.py", "study.py", "train_reference.py")
EXAMPLES = [script for script in sorted((ROOT / "examples").glob("*.py")) if script.name not in LONG]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, id=script.name, marks=[pytest.mark.slow] * (script.name != "quickstart.py"))
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
