"""Configurations: presets, rules, and every invalid combination."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, CLIPVisionConfig, GemmaConfig, LlamaConfig, LlavaConfig, SiglipVisionConfig

import llava_sparse
from llava_sparse import SparseCLIPVisionConfig, SparseLlavaConfig
from llava_sparse.modeling import composition
from llava_sparse.modeling.methods import METHODS
from llava_sparse.modeling.sparsevlm import default_budgets, default_layers
from llava_sparse.processing import processing_sparse_llava


@pytest.mark.parametrize(("budget", "split"), [(64, [54, 10]), (128, [108, 20]), (192, [162, 30])])
def test_visionzip_presets(budget, split):
    config = SparseLlavaConfig(sparse_method="visionzip", sparse_budget=budget)
    assert (config.sparse_layers, config.sparse_budgets) == ([-2], split)


@pytest.mark.parametrize(
    ("version", "budget", "kept"),
    [
        ("1.5", 64, [66, 30, 17]),
        ("1.5", 96, [238, 48, 26]),
        ("1.5", 128, [303, 110, 36]),
        ("1.5", 192, [300, 200, 110]),
        ("2.0", 64, [66, 34, 20]),
        ("2.0", 96, [246, 54, 28]),
        ("2.0", 128, [238, 108, 60]),
        ("2.0", 192, [300, 200, 118]),
    ],
)
def test_sparsevlm_presets(version, budget, kept):
    config = SparseLlavaConfig(sparse_method="sparsevlm", sparse_budget=budget, sparse_options={"version": version})
    assert (config.sparse_layers, config.sparse_budgets) == ([2, 6, 15], kept)


def test_sparsevlm_ranked_preset():
    config = SparseLlavaConfig(sparse_method="sparsevlm", sparse_budget=128, sparse_options={"version": "1.0"})
    assert (config.sparse_layers, config.sparse_budgets) == ([2, 6, 15, 19], None)
    method = METHODS["sparsevlm"].resolve(tiny_geometry(32, 576), 128, None, None, {"version": "1.0"})
    assert (method.scale, method.bias) == (9.0, 6.0)


def tiny_geometry(layers: int, patches: int):
    from llava_sparse.modeling.sparsifier import Geometry

    return Geometry(patches=patches, encoder_layers=24, decoder_layers=layers)


@given(budget=st.integers(1, 576), patches=st.sampled_from([576, 256, 16]), depth=st.integers(1, 48))
def test_every_budget_is_served(budget, patches, depth):
    budget = min(budget, patches)
    geometry = tiny_geometry(depth, patches)
    zipped = METHODS["visionzip"].resolve(geometry, budget, None, None, None)
    assert zipped.tokens == budget
    for version in ("1.0", "1.5", "2.0"):
        sparse = METHODS["sparsevlm"].resolve(geometry, budget, None, None, {"version": version})
        assert list(sparse.layers) == sorted(set(sparse.layers))
        assert sparse.layers[0] >= 0 and sparse.layers[-1] < depth
        if version != "1.0":
            assert len(sparse.budgets) == len(sparse.layers)
            assert all(1 <= kept <= patches for kept in sparse.budgets)


@given(budget=st.integers(1, 575))
def test_a_larger_budget_keeps_no_fewer_at_the_last_stage(budget):
    assert default_budgets("2.0", budget, 576, 3)[-1] <= default_budgets("2.0", budget + 1, 576, 3)[-1]


def test_layers_scale_with_depth():
    assert default_layers("1.5", 32) == default_layers("1.5", 40) == (2, 6, 15)
    assert default_layers("1.5", 8) == (1, 3, 5)
    assert default_layers("1.5", 4) == (0, 1, 2)
    assert default_layers("1.5", 2) == (0,)
    assert default_layers("1.5", 1) == (0,)
    assert default_layers("1.0", 32) == (2, 6, 15, 19)


ZIP = {"sparse_method": "visionzip", "sparse_budget": 64}
SPARSE = {"sparse_method": "sparsevlm", "sparse_budget": 64}
INVALID = [
    ({"sparse_budget": 64}, "sparse_budget=64 without sparse_method"),
    ({"sparse_layers": [1]}, "sparse_layers=.* without sparse_method"),
    ({"sparse_budgets": [1, 1]}, "sparse_budgets=.* without sparse_method"),
    ({"sparse_options": {}}, "sparse_options=.* without sparse_method"),
    ({"sparse_method": "visionzap"}, "did you mean 'visionzip'"),
    ({"sparse_method": "VisionZip", "sparse_budget": 64}, "did you mean 'visionzip'"),
    ({"sparse_method": 3}, "sparse_method=3 is unknown"),
    ({"sparse_metod": "visionzip"}, "did you mean 'sparse_method'"),
    ({"sparse_method": "visionzip", "sparse_buget": 64}, "did you mean 'sparse_budget'"),
    ({"sparse_method": "visionzip"}, "needs sparse_budget"),
    ({"sparse_method": "visionzip", "sparse_budget": 0}, "from 1 to 576"),
    ({"sparse_method": "visionzip", "sparse_budget": 577}, "from 1 to 576"),
    ({"sparse_method": "visionzip", "sparse_budget": True}, "from 1 to 576"),
    ({"sparse_method": "visionzip", "sparse_budget": 64.0}, "from 1 to 576"),
    ({"sparse_method": "visionzip", "sparse_budget": "64"}, "from 1 to 576"),
    ({"sparse_method": "visionzip", "sparse_budgets": [54]}, "a list of 2"),
    ({"sparse_method": "visionzip", "sparse_budgets": [0, 10]}, "dominant must be at least 1"),
    ({"sparse_method": "visionzip", "sparse_budgets": [570, 10]}, "at most 577"),
    ({"sparse_method": "visionzip", "sparse_budgets": [54, -1]}, "sparse_budgets"),
    ({"sparse_method": "visionzip", "sparse_budget": 64, "sparse_layers": [24]}, "from -24 to 23"),
    ({"sparse_method": "visionzip", "sparse_budget": 64, "sparse_layers": [1, 2]}, "a list of 1"),
    ({"sparse_method": "visionzip", "sparse_budget": 64, "sparse_layers": 3}, "sparse_layers=3"),
    ({**ZIP, "sparse_options": {"version": "1"}}, "has no option 'version'"),
    ({**ZIP, "sparse_options": []}, "a dict"),
    ({"sparse_method": "sparsevlm"}, "needs sparse_budget"),
    ({"sparse_method": "sparsevlm", "sparse_budget": -1}, "from 1 to 576"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [2, 6], "sparse_budgets": [1, 2, 3]}, "a list of 2"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [6, 2], "sparse_budgets": [1, 2]}, "ascending"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [2, 2], "sparse_budgets": [1, 2]}, "ascending"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [32], "sparse_budgets": [1]}, "from 0 to 31"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [-2], "sparse_budgets": [1]}, "from 0 to 31"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [], "sparse_budgets": []}, "sparse_layers"),
    ({"sparse_method": "sparsevlm", "sparse_budgets": [0, 1, 1]}, "from 1 to 576"),
    ({"sparse_method": "sparsevlm", "sparse_budgets": [600, 1, 1]}, "from 1 to 576"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [1, 2, 3, 4], "sparse_budget": 64}, "give sparse_budgets too"),
    ({**SPARSE, "sparse_options": {"version": "3.0"}}, "allowed: 1.0, 1.5, 2.0"),
    ({**SPARSE, "sparse_options": {"version": 1.5}}, "allowed: 1.0, 1.5, 2.0"),
    ({**SPARSE, "sparse_options": {"vesion": "2.0"}}, "did you mean 'version'"),
    ({**SPARSE, "sparse_options": {"positions": "origin"}}, "did you mean 'original'"),
    ({**SPARSE, "sparse_options": {"scale": 2.0}}, "version '1.0'"),
    ({"sparse_method": "sparsevlm", "sparse_budgets": [3, 2, 1], "sparse_options": {"version": "1.0"}}, "rank"),
    ({"sparse_method": "sparsevlm", "sparse_options": {"version": "1.0", "scale": -1}}, "a number from 0"),
    ({"sparse_method": "sparsevlm", "sparse_options": {"version": "1.0", "lam": 1, "bias": 2}}, "not both"),
    ({"sparse_method": "sparsevlm", "sparse_options": {"version": "1.0", "scale": float("inf")}}, "a number from 0"),
    ({"sparse_method": "sparsevlm", "sparse_options": {"version": "1.0", "lam": float("nan")}}, "a number from 0"),
    ({**SPARSE, "sparse_options": {"positions": ""}}, "allowed: compact, original"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), INVALID, ids=[json.dumps(fields)[:90] for fields, _ in INVALID])
def test_invalid_settings(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SparseLlavaConfig(**fields)
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **fields)


def test_explicit_budgets_win_over_the_preset():
    config = SparseLlavaConfig(sparse_method="visionzip", sparse_budget=64, sparse_budgets=[20, 4])
    assert config.sparse_budgets == [20, 4]
    config = SparseLlavaConfig(sparse_method="sparsevlm", sparse_budget=64, sparse_layers=[3, 5, 9])
    assert (config.sparse_layers, config.sparse_budgets) == ([3, 5, 9], [66, 30, 17])


def test_unsupported_parts():
    gemma = GemmaConfig()
    with pytest.raises(ValueError, match=r"does not support the text backbone 'gemma'.*llama, mistral, qwen2"):
        SparseLlavaConfig(text_config=gemma, sparse_method="sparsevlm", sparse_budget=64)
    assert SparseLlavaConfig(text_config=gemma, sparse_method="visionzip", sparse_budget=64).sparse_budgets == [54, 10]
    siglip = SiglipVisionConfig(image_size=336, patch_size=14)
    with pytest.raises(ValueError, match="CLIP vision tower, not in 'siglip_vision_model'"):
        SparseLlavaConfig(vision_config=siglip, sparse_method="visionzip", sparse_budget=64)
    with pytest.raises(ValueError, match="works in a decoder"):
        SparseCLIPVisionConfig(sparse_method="sparsevlm", sparse_budget=4)


def test_feature_layer_decides_where_visionzip_acts():
    for feature_layer, layer in ((-1, -1), (-3, -3), (5, 4), ([-2], -2)):
        config = SparseLlavaConfig(vision_feature_layer=feature_layer, sparse_method="visionzip", sparse_budget=64)
        assert config.sparse_layers == [layer]


def test_saved_configuration_reloads_as_it_was(case, tmp_path):
    config = SparseLlavaConfig(**{**tiny.config().to_dict(), **case.config, "model_type": "sparse_llava"})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is SparseLlavaConfig
    for name in ("sparse_method", "sparse_budget", "sparse_layers", "sparse_budgets", "sparse_options"):
        assert getattr(again, name) == getattr(config, name)


def test_keywords_replace_what_was_saved(tmp_path):
    SparseLlavaConfig(sparse_method="visionzip", sparse_budget=64).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, sparse_budget=128).sparse_budgets == [108, 20]
    assert AutoConfig.from_pretrained(tmp_path, sparse_budgets=[8, 2]).sparse_budgets == [8, 2]
    other = AutoConfig.from_pretrained(tmp_path, sparse_method="sparsevlm", sparse_budget=64)
    assert (other.sparse_layers, other.sparse_budgets) == ([2, 6, 15], [66, 30, 17])
    dense = AutoConfig.from_pretrained(tmp_path, sparse_method=None)
    assert dense.sparse_method is None and dense.sparse_budgets is None


def test_settings_given_by_hand_survive_other_keywords(tmp_path):
    SparseLlavaConfig(sparse_method="visionzip", sparse_budgets=[20, 4]).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, sparse_layers=[-3]).sparse_budgets == [20, 4]
    assert AutoConfig.from_pretrained(tmp_path, sparse_budget=None).sparse_budgets == [20, 4]
    sparse = SparseLlavaConfig(sparse_method="sparsevlm", sparse_budget=64)
    sparse.save_pretrained(tmp_path)
    other = AutoConfig.from_pretrained(tmp_path, sparse_options={"version": "2.0"})
    assert (other.sparse_layers, other.sparse_budgets) == ([2, 6, 15], [66, 34, 20])
    SparseLlavaConfig(sparse_method="sparsevlm", sparse_budget=64, sparse_budgets=[50, 40, 30]).save_pretrained(
        tmp_path
    )
    moved = AutoConfig.from_pretrained(tmp_path, sparse_layers=[3, 5, 9])
    assert (moved.sparse_layers, moved.sparse_budgets) == ([3, 5, 9], [50, 40, 30])
    SparseLlavaConfig(sparse_method="sparsevlm", sparse_budget=64, sparse_layers=[3, 5, 9]).save_pretrained(tmp_path)
    original = AutoConfig.from_pretrained(tmp_path, sparse_options={"positions": "original"})
    assert (original.sparse_layers, original.sparse_budgets) == ([3, 5, 9], [66, 30, 17])
    sparse.save_pretrained(tmp_path)
    fewer = AutoConfig.from_pretrained(tmp_path, sparse_layers=[4, 8])
    assert (fewer.sparse_layers, fewer.sparse_budgets) == ([4, 8], [30, 17])


def test_a_plain_llava_configuration_is_transformers_own(tmp_path):
    LlavaConfig().save_pretrained(tmp_path)
    for config in (AutoConfig.from_pretrained(tmp_path), AutoConfig.for_model("llava")):
        assert type(config) is LlavaConfig
        assert config.sparse_method is None
        assert not [key for key in config.to_dict() if key.startswith("sparse_")]
    assert type(AutoConfig.from_pretrained(tmp_path, sparse_method=None)) is LlavaConfig
    assert type(AutoConfig.for_model("llava", sparse_method="visionzip", sparse_budget=64)) is SparseLlavaConfig


def test_vision_configuration_alone():
    config = SparseCLIPVisionConfig(image_size=336, patch_size=14, sparse_method="visionzip", sparse_budget=64)
    assert config.sparse_budgets == [54, 10]
    assert isinstance(config, CLIPVisionConfig)


def test_registration_is_idempotent():
    llava_sparse.register()
    llava_sparse.register()
    assert type(AutoConfig.for_model("llava")) is LlavaConfig
    assert type(AutoConfig.for_model("sparse_llava")) is SparseLlavaConfig
    assert isinstance(SparseLlavaConfig().text_config, LlamaConfig)


def test_methods_describe_themselves():
    assert llava_sparse.list_methods() == sorted(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.kind in ("encoder", "decoder")
        assert "arXiv" in method.paper and method.summary and method.__doc__


def test_processor_knows_the_methods():
    for name, method in METHODS.items():
        known = {"encoder": processing_sparse_llava.ENCODER_METHODS, "decoder": processing_sparse_llava.DECODER_METHODS}
        assert name in known[method.kind]
    assert len(METHODS) == len([*processing_sparse_llava.ENCODER_METHODS, *processing_sparse_llava.DECODER_METHODS])
    ours = (processing_sparse_llava.JOIN, processing_sparse_llava.SURPLUS)
    assert ours == (composition.JOIN, composition.SURPLUS)


def test_a_stock_class_stays_dense(tmp_path, caplog):
    """Asked for a method, or given a pruned model's folder, it says that it is dense, and saves no half settings."""
    from transformers import CONFIG_MAPPING, LlavaForConditionalGeneration

    llava_sparse.sparsify(tiny.dense_model(), "visionzip", budget=5).save_pretrained(tmp_path / "pruned")
    logger = logging.getLogger("llava_sparse._registration")
    logger.addHandler(caplog.handler)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "pruned")
    logger.removeHandler(caplog.handler)
    assert "sparse_method='visionzip' is ignored" in caplog.text
    assert stock.config.sparse_method is None
    stock.save_pretrained(tmp_path / "stock")
    assert type(AutoConfig.from_pretrained(tmp_path / "stock")) is LlavaConfig
    assert isinstance(LlavaConfig(), CONFIG_MAPPING["llava"])
