"""Loading, saving, converting and switching."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import tiny
import torch
from hub_folder import load_without_the_package
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GemmaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import llava_sparse
from llava_sparse import SparseLlavaForConditionalGeneration, hub
from llava_sparse.modeling.pruning_registry import METHODS

CHECKPOINT = "checkpoint"
AUTO = [AutoModel, AutoModelForImageTextToText]


def load(auto, folder, **kwargs):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("auto", AUTO)
def test_hub_key_names(auto, any_checkpoint, case, processor):
    """A checkpoint with the key names of the Hub loads completely and gives what `sparsify` gives."""
    model = load(auto, any_checkpoint, **case.config)
    assert type(model) is SparseLlavaForConditionalGeneration
    stock = LlavaForConditionalGeneration.from_pretrained(any_checkpoint).eval()
    expected = llava_sparse.sparsify(stock, case.method, **case.settings)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=3), expected.generate(**batch, max_new_tokens=3))


def test_class_loads_directly(checkpoint, case):
    assert load(SparseLlavaForConditionalGeneration, checkpoint, **case.config).config.sparse_method == case.method


def test_multimodal_auto_class(checkpoint):
    transformers = pytest.importorskip("transformers")
    auto = getattr(transformers, "AutoModelForMultimodalLM", None)
    if auto is None:
        pytest.skip("not in this version of transformers")
    assert (
        type(load(auto, checkpoint, sparse_method="visionzip", sparse_budget=5)) is SparseLlavaForConditionalGeneration
    )


def test_plain_load_is_transformers_own(checkpoint, processor):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    assert type(model) is LlavaForConditionalGeneration and type(model.config) is LlavaConfig
    assert model.config.sparse_method is None
    assert type(AutoModel.from_pretrained(checkpoint)).__name__ == "LlavaModel"
    assert type(AutoProcessor.from_pretrained(checkpoint)) is LlavaProcessor
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    torch.testing.assert_close(model(**batch).logits, tiny.dense_model()(**batch).logits)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparse_budget": 4}, "needs `sparse_method`"),
        ({"sparse_method": "sparsevml", "sparse_budget": 4}, "did you mean 'sparsevlm'"),
        ({"sparse_method": "visionzip", "sparse_bugdet": 4}, "did you mean 'sparse_budget'"),
    ],
)
def test_invalid_loads(checkpoint, kwargs, message):
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(checkpoint, **kwargs)


@pytest.mark.parametrize("kwargs", [{"dtype": torch.bfloat16}, {"attn_implementation": "eager"}], ids=str)
def test_usual_arguments(checkpoint, case, processor, kwargs):
    model = load(AutoModel, checkpoint, **case.config, **kwargs)
    if "dtype" in kwargs:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    else:
        assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "eager"
    assert model.generate(**tiny.inputs(processor, tiny.QUESTIONS), max_new_tokens=2).shape[0] == 3


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_offloaded(checkpoint, case, processor, tmp_path, place):
    """As on a GPU that is too small: layers wait on the CPU or on disk and come in when they run."""
    parts = {
        "model.vision_tower": place,
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **{f"model.language_model.layers.{i}": place if i % 2 == 0 else "cpu" for i in range(tiny.LAYERS)},
    }
    if place == "cpu":
        # Without a GPU nothing is moved for a map that names one device alone: dispatch with offload explicitly.
        from accelerate import cpu_offload

        model = load(AutoModel, checkpoint, **case.config)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert any(p.device.type == "meta" for p in model.parameters())
    else:
        model = load(AutoModel, checkpoint, **case.config, device_map=parts, offload_folder=tmp_path)
        assert any(p.device.type == "meta" for p in model.parameters())
    expected = load(AutoModel, checkpoint, **case.config)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert torch.equal(model.generate(**batch, max_new_tokens=3), expected.generate(**batch, max_new_tokens=3))


def test_sparsify_an_offloaded_model(checkpoint, case, processor, tmp_path):
    parts = {"": "cpu", "model.language_model.layers.1": "disk", "model.vision_tower": "disk"}
    parts = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    dense = LlavaForConditionalGeneration.from_pretrained(checkpoint, device_map=parts, offload_folder=tmp_path)
    model = llava_sparse.sparsify(dense, case.method, **case.settings)
    expected = load(AutoModel, checkpoint, **case.config)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert torch.equal(model.generate(**batch, max_new_tokens=3), expected.generate(**batch, max_new_tokens=3))


def test_device_map_auto(checkpoint, case, processor):
    model = load(AutoModel, checkpoint, **case.config, device_map="auto")
    assert model.generate(**tiny.inputs(processor, tiny.QUESTIONS[0]), max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(checkpoint, case, processor, bits):
    pytest.importorskip("bitsandbytes")
    if bits == 8 and not torch.cuda.is_available():
        pytest.skip("8-bit loading needs a GPU")
    quantised = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    model = load(AutoModel, checkpoint, **case.config, quantization_config=quantised, device_map="cpu")
    kinds = {type(module).__name__ for module in model.model.language_model.layers.modules()}
    assert f"Linear{bits}bit" in kinds or "Linear8bitLt" in kinds
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 3
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
        model.set_sparsity(None)
        assert model(**batch).logits.isfinite().all()


def test_save_and_reload(model, case, processor, tmp_path):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "sparse_llava" and saved["sparse_method"] == case.method
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    again = load(AutoModel, tmp_path)
    assert type(again) is SparseLlavaForConditionalGeneration
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_saved_weights_load_in_stock_llava(case, dense, checkpoint, processor, tmp_path):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    sources = {
        "made": llava_sparse.sparsify(dense, case.method, **case.settings),
        "loaded": load(AutoModel, checkpoint, **case.config),
    }
    for name, model in sources.items():
        model.save_pretrained(tmp_path / name)
        stock = load(LlavaForConditionalGeneration, tmp_path / name)
        torch.testing.assert_close(stock(**batch).logits, dense(**batch).logits)


def test_sparsify_shares_weights_and_leaves_the_dense_model_alone(case, dense, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    before, config = dense(**batch).logits, dense.config.to_dict()
    model = llava_sparse.sparsify(dense, case.method, **case.settings)
    own = {name: p.data_ptr() for name, p in dense.named_parameters()}
    assert own == {name: p.data_ptr() for name, p in model.named_parameters()}
    model.generate(**batch, max_new_tokens=2)
    assert type(dense) is LlavaForConditionalGeneration and dense.config.to_dict() == config
    assert torch.equal(dense(**batch).logits, before)
    hidden = dense(**batch, output_hidden_states=True).hidden_states
    assert len(hidden) == tiny.LAYERS + 1
    model.set_sparsity(None)
    assert len(model(**batch, output_hidden_states=True).hidden_states) == tiny.LAYERS + 1


def test_set_sparsity_switches(dense, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    model = llava_sparse.sparsify(dense, None)
    assert model.config.sparse_method is None
    assert torch.equal(model(**batch).logits, dense(**batch).logits)
    for case in tiny.CASES * 2:
        model.set_sparsity(case.method, **case.settings)
        fresh = llava_sparse.sparsify(dense, case.method, **case.settings)
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)
    model.set_sparsity(None)
    assert torch.equal(model(**batch).logits, dense(**batch).logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), dense.generate(**batch, max_new_tokens=4))


def test_a_refused_setting_changes_nothing(dense, processor):
    model = llava_sparse.sparsify(dense, "visionzip", budget=5)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"in \[1, 16\]"):
        model.set_sparsity("visionzip", budget=17)
    with pytest.raises(ValueError, match="did you mean"):
        model.set_sparsity("vision_zip", budget=4)
    assert model.config.to_dict() == before
    assert model.model.sparsifier.budgets == (4, 1)


def test_sparsify_refuses_other_models(dense):
    with pytest.raises(TypeError, match="not a LlamaModel"):
        llava_sparse.sparsify(dense.model.language_model, "visionzip", budget=5)


def test_two_pruned_models_of_one(dense, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    once = llava_sparse.sparsify(dense, "visionzip", budget=5)
    first = once(**batch).logits
    twice = llava_sparse.sparsify(once, "sparsevlm", budget=4)
    expected = llava_sparse.sparsify(dense, "sparsevlm", budget=4)
    assert torch.equal(twice(**batch).logits, expected(**batch).logits)
    assert torch.equal(once(**batch).logits, first)


@pytest.mark.parametrize("text", ["gemma"])
def test_encoder_methods_work_with_any_backbone(text, processor):
    gemma = GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tiny.vision_config(), text_config=gemma, image_token_index=4)
    ).eval()
    model = llava_sparse.sparsify(dense, "visionzip", budget=5)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    out = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for row, question in enumerate(tiny.QUESTIONS):
        single = tiny.inputs(processor, question, seed=row)
        got = model.generate(**single, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert got[0, -4:].tolist() == out[row, -4:].tolist()
    with pytest.raises(ValueError, match="does not support the text backbone 'gemma'"):
        model.set_sparsity("sparsevlm", budget=4)


def test_feature_layers_and_full_strategy(case, processor):
    for changes in ({"vision_feature_layer": -1}, {"vision_feature_layer": [-3, -2]}):
        dense = tiny.dense_model(**changes)
        if METHODS[case.method.split("+")[0]].kind == "encoder" and isinstance(changes["vision_feature_layer"], list):
            with pytest.raises(ValueError, match="vision_feature_layer"):
                llava_sparse.sparsify(dense, case.method, **case.settings)
            continue
        model = llava_sparse.sparsify(dense, case.method, **case.settings)
        batch = tiny.inputs(processor, tiny.QUESTIONS)
        assert model(**batch).logits.isfinite().all()
        if model.model.sparsifier.encoder is None:
            features = model.get_image_features(batch["pixel_values"]).pooler_output
            expected = dense.get_image_features(batch["pixel_values"]).pooler_output
            torch.testing.assert_close(torch.stack(list(features)), torch.stack(list(expected)))


def test_import_is_light():
    """Importing the package imports no model, no processor and no data library; they are registered all the same."""
    script = """
import sys
import llava_sparse
heavy = {"transformers.modeling_utils", "transformers.processing_utils", "datasets", "evaluate"}
heavy |= {"llava_sparse.modeling.modeling_sparse_llava", "transformers.models.llava.modeling_llava"}
heavy |= {"transformers.models.llama.configuration_llama"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from transformers.models.auto.processing_auto import processor_class_from_name
assert processor_class_from_name("SparseLlavaProcessor") is llava_sparse.SparseLlavaProcessor
assert processor_class_from_name("LlavaProcessor").__module__.startswith("transformers.")
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
llava_sparse.SparseLlavaConfig()
assert PROCESSOR_MAPPING[llava_sparse.SparseLlavaConfig].__name__ == "SparseLlavaProcessor"
"""
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "case", [tiny.CASES[0], pytest.param(tiny.CASES[2], marks=pytest.mark.slow)], ids=lambda case: case.name
)
@pytest.mark.parametrize("processor_class", ["sparse", pytest.param("stock", marks=pytest.mark.slow)])
def test_hub_folder_loads_without_the_package(case, dense, tmp_path, processor_class):
    model = llava_sparse.sparsify(dense, case.method, **case.settings)
    settings = {
        key: value for key, value in case.config.items() if key in ("sparse_method", "sparse_budget", "sparse_budgets")
    }
    processor = (
        tiny.processor(llava_sparse.SparseLlavaProcessor, **settings)
        if processor_class == "sparse"
        else tiny.processor()
    )
    hub.save_to_hub_folder(model, processor, tmp_path)
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    got = load_without_the_package(tmp_path, batch)
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False).tolist()
    assert got["tokens"] == [expected, expected]
    assert got["method"] == case.method
    assert got["processor"] == type(processor).__name__


def test_hub_folder_needs_a_pruned_model(dense, tmp_path):
    with pytest.raises(TypeError, match="sparsify"):
        hub.save_to_hub_folder(dense, tiny.processor(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_travelling_files_import_only_their_folder():
    """Files that travel to the Hub reach each other by single-dot imports, and nothing of the package."""
    import re
    from pathlib import Path

    from llava_sparse import modeling, processing

    for package in (modeling, processing):
        folder = Path(package.__path__[0])
        names = {file.stem for file in folder.glob("*.py")}
        for file in folder.glob("[!_]*.py"):
            text = file.read_text()
            assert not re.search(r"^\s*(from|import)\s+(llava_sparse|modeling|processing)\b", text, re.MULTILINE), file
            assert not re.search(r"^\s*from\s+(\.\.|\.\s+import)", text, re.MULTILINE), file
            for name in re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE):
                assert name in names, f"{file.name} imports .{name}"


def test_a_newer_transformers_warns_once():
    with pytest.warns(UserWarning, match=r"not been tested with transformers 5\.999\.1, only up to"):
        llava_sparse._check_version("5.999.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("5.18.0", f"{llava_sparse.NEWEST_TESTED}.7", "4.57.1"):
            llava_sparse._check_version(version)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_in_under_both_names(dense, processor, name):
    """transformers 5.24 renamed the argument; both names work with every release."""
    model = llava_sparse.sparsify(dense, "visionzip", budget=6)
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    out = model(**batch, use_cache=True)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.tensor([[7]]), "attention_mask": mask}
    held = next(getattr(out, key) for key in ("cache", "past_key_values") if key in out)
    assert out.past_key_values is held
    assert model(**step, **{name: held}).logits.shape[1] == 1
    assert held.get_seq_length() == batch["input_ids"].shape[1] - 16 + 6 + 1
    with pytest.raises(ValueError, match="two names"):
        model(**step, cache=held, past_key_values=copy.copy(held))
