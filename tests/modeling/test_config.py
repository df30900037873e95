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
from llava_sparse import SparseCLIPVisionConfig, SparseLlavaConfig, SparseLlavaProcessor
from llava_sparse.modeling.configuration_sparse_llava import build_sparsifier
from llava_sparse.modeling.method_sparsevlm import default_budgets, default_layers
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.modeling.pruning_settings import Sparsity


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
    method = METHODS["sparsevlm"].resolve(
        tiny_geometry(32, 576), Sparsity("sparsevlm", 128, options={"version": "1.0"})
    )
    assert (method.scale, method.bias) == (9.0, 6.0)


def tiny_geometry(layers: int, patches: int):
    from llava_sparse.modeling.pruning_types import Geometry

    return Geometry(patches=patches, encoder_layers=24, decoder_layers=layers)


@given(budget=st.integers(1, 576), patches=st.sampled_from([576, 256, 16]), depth=st.integers(1, 48))
def test_every_budget_is_served(budget, patches, depth):
    budget = min(budget, patches)
    geometry = tiny_geometry(depth, patches)
    zipped = METHODS["visionzip"].resolve(geometry, Sparsity("visionzip", budget))
    assert zipped.tokens == budget
    for version in ("1.0", "1.5", "2.0"):
        sparse = METHODS["sparsevlm"].resolve(geometry, Sparsity("sparsevlm", budget, options={"version": version}))
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
    ({"sparse_budget": 64}, "`sparse_budget`=64 needs `sparse_method`"),
    ({"sparse_layers": [1]}, "`sparse_layers`=.* needs `sparse_method`"),
    ({"sparse_budgets": [1, 1]}, "`sparse_budgets`=.* needs `sparse_method`"),
    ({"sparse_options": {}}, "`sparse_options`=.* needs `sparse_method`"),
    ({"sparse_method": "visionzap"}, "did you mean 'visionzip'"),
    ({"sparse_method": "VisionZip", "sparse_budget": 64}, "did you mean 'visionzip'"),
    ({"sparse_method": 3}, r"`sparse_method` must be one of .* got 3"),
    ({"sparse_metod": "visionzip"}, "did you mean 'sparse_method'"),
    ({"sparse_method": "visionzip", "sparse_buget": 64}, "did you mean 'sparse_budget'"),
    ({"sparse_method": "visionzip"}, "needs `sparse_budget`"),
    ({"sparse_method": "visionzip", "sparse_budget": 0}, r"in \[1, 576\]"),
    ({"sparse_method": "visionzip", "sparse_budget": 577}, r"in \[1, 576\]"),
    ({"sparse_method": "visionzip", "sparse_budget": True}, r"in \[1, 576\]"),
    ({"sparse_method": "visionzip", "sparse_budget": 64.0}, r"in \[1, 576\]"),
    ({"sparse_method": "visionzip", "sparse_budget": "64"}, r"in \[1, 576\]"),
    ({"sparse_method": "visionzip", "sparse_budgets": [54]}, "a list of 2"),
    ({"sparse_method": "visionzip", "sparse_budgets": [0, 10]}, "dominant must be at least 1"),
    ({"sparse_method": "visionzip", "sparse_budgets": [570, 10]}, "at most 577"),
    ({"sparse_method": "visionzip", "sparse_budgets": [54, -1]}, "sparse_budgets"),
    ({"sparse_method": "visionzip", "sparse_budget": 64, "sparse_layers": [24]}, r"in \[-24, 23\]"),
    ({"sparse_method": "visionzip", "sparse_budget": 64, "sparse_layers": [1, 2]}, "a list of 1"),
    ({"sparse_method": "visionzip", "sparse_budget": 64, "sparse_layers": 3}, r"`sparse_layers` must be .* got 3"),
    ({**ZIP, "sparse_options": {"version": "1"}}, "has no option 'version'"),
    ({**ZIP, "sparse_options": []}, "a dict"),
    ({"sparse_method": "sparsevlm"}, "needs `sparse_budget`"),
    ({"sparse_method": "sparsevlm", "sparse_budget": -1}, r"in \[1, 576\]"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [2, 6], "sparse_budgets": [3, 2, 1]}, "a list of 2"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [6, 2], "sparse_budgets": [2, 1]}, "ascending"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [2, 2], "sparse_budgets": [2, 1]}, "ascending"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [32], "sparse_budgets": [1]}, r"in \[0, 31\]"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [-2], "sparse_budgets": [1]}, r"in \[0, 31\]"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [], "sparse_budgets": []}, "sparse_layers"),
    ({"sparse_method": "sparsevlm", "sparse_budgets": [0, 1, 1]}, r"in \[1, 576\]"),
    ({"sparse_method": "sparsevlm", "sparse_budgets": [600, 1, 1]}, r"in \[1, 576\]"),
    ({"sparse_method": "sparsevlm", "sparse_layers": [1, 2, 3, 4], "sparse_budget": 64}, "give `sparse_budgets` too"),
    ({**SPARSE, "sparse_options": {"version": "3.0"}}, "one of '1.0', '1.5', '2.0'"),
    ({**SPARSE, "sparse_options": {"version": 1.5}}, "one of '1.0', '1.5', '2.0'"),
    ({**SPARSE, "sparse_options": {"vesion": "2.0"}}, "did you mean 'version'"),
    ({**SPARSE, "sparse_options": {"positions": "origin"}}, "did you mean 'original'"),
    ({**SPARSE, "sparse_options": {"scale": 2.0}}, "version '1.0'"),
    ({"sparse_method": "sparsevlm", "sparse_budgets": [3, 2, 1], "sparse_options": {"version": "1.0"}}, "rank"),
    ({"sparse_method": "sparsevlm", "sparse_options": {"version": "1.0", "scale": -1}}, "a number from 0"),
    ({"sparse_method": "sparsevlm", "sparse_options": {"version": "1.0", "lam": 1, "bias": 2}}, "not both"),
    ({"sparse_method": "sparsevlm", "sparse_options": {"version": "1.0", "scale": float("inf")}}, "a number from 0"),
    ({"sparse_method": "sparsevlm", "sparse_options": {"version": "1.0", "lam": float("nan")}}, "a number from 0"),
    ({"sparse_method": "sparsevlm", "sparse_budgets": [1, 2, 3]}, "must fall from stage to stage"),
    ({"sparse_method": "visionzip", "sparse_budget": 64, "sparse_budgets": [20, 4]}, "contradicts the given"),
    ({"sparse_method": "sparsevlm", "sparse_budget": 64, "sparse_budgets": [50, 40, 30]}, "contradicts the given"),
    (
        {
            "sparse_method": "visionzip+sparsevlm",
            "sparse_budget": 64,
            "sparse_budgets": [[100, 20], [66, 30, 17]],
        },
        "contradicts the given",
    ),
    ({**SPARSE, "sparse_options": {"positions": ""}}, "one of 'compact', 'original'"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), INVALID, ids=[json.dumps(fields)[:90] for fields, _ in INVALID])
def test_invalid_settings(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SparseLlavaConfig(**fields)
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **fields)


def test_explicit_budgets_win_over_the_preset():
    config = SparseLlavaConfig(sparse_method="visionzip", sparse_budget=64, sparse_budgets=[64, 0])
    assert config.sparse_budgets == [64, 0]
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
    SparseLlavaConfig(sparse_method="sparsevlm", sparse_budgets=[50, 40, 30]).save_pretrained(tmp_path)
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


def test_processor_and_configuration_refuse_the_same():
    for fields, message in INVALID:
        # What depends on the layers, a processor cannot know.
        staged = fields.get("sparse_method") == "sparsevlm" and "contradicts" in message
        if staged or "sparse_layers" in fields or "metod" in str(fields) or "buget" in str(fields):
            continue
        with pytest.raises(ValueError, match=message):
            tiny.processor(SparseLlavaProcessor, side=336, **fields)


def test_an_edited_budget_is_the_budget(tmp_path):
    config = SparseLlavaConfig(sparse_method="visionzip", sparse_budget=64)
    config.sparse_budget = 128
    assert config.sparse_budgets == [108, 20] and build_sparsifier(config).tokens == 128
    config.sparse_method, config.sparse_budget = "sparsevlm", 64
    assert (config.sparse_layers, config.sparse_budgets) == ([2, 6, 15], [66, 30, 17])
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["sparse_budget"] = 192
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert AutoConfig.from_pretrained(tmp_path).sparse_budgets == [300, 200, 110]
    config.sparse_budgets = [5, 4, 3]
    with pytest.raises(ValueError, match="contradicts"):
        build_sparsifier(config)


def test_folders_of_older_versions_hold_the_expansion_too(tmp_path):
    config = SparseLlavaConfig(sparse_method="visionzip", sparse_budget=64)
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"sparse_layers": [-2], "sparse_budgets": [54, 10]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    old = AutoConfig.from_pretrained(tmp_path)
    assert old.sparse_budgets == [54, 10]
    old.sparse_budget = 128
    assert old.sparse_budgets == [108, 20]
    assert AutoConfig.from_pretrained(tmp_path, sparse_budget=192).sparse_budgets == [162, 30]
    content["sparse_budget"] = 192
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="contradicts"):
        AutoConfig.from_pretrained(tmp_path)


def test_one_and_all_are_told_apart(caplog):
    logger = logging.getLogger("llava_sparse.modeling.configuration_sparse_llava")
    logger.addHandler(caplog.handler)
    logger.warning_once.cache_clear()
    SparseLlavaConfig(sparse_method="divprune", sparse_budget=1)
    SparseLlavaConfig(sparse_method="divprune", sparse_budget=1.0)
    logger.removeHandler(caplog.handler)
    assert "sparse_budget=1 keeps one token; 1.0 keeps all" in caplog.text
    assert "sparse_budget=1.0 keeps all 576 tokens; 1 keeps one" in caplog.text


def test_a_class_that_does_not_prune_says_so(tmp_path, caplog):
    from transformers import (
        AutoModel,
        AutoModelForImageTextToText,
        AutoProcessor,
        LlavaForConditionalGeneration,
        VipLlavaConfig,
        VipLlavaForConditionalGeneration,
    )

    tiny.save_checkpoint(tmp_path / "stock")
    llava_sparse.sparsify(tiny.dense_model(), "visionzip", budget=5).save_pretrained(tmp_path / "pruned")
    VipLlavaConfig().save_pretrained(tmp_path / "other")
    tiny.processor().save_pretrained(tmp_path / "other")
    message = "does not prune. Supported: LLaVA-1.5 .*AutoModelForImageTextToText.from_pretrained"
    settings = {"sparse_method": "visionzip", "sparse_budget": 5}
    with pytest.raises(ValueError, match=f"model_type 'llava' .* {message}"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", **settings)
    autos = (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor)
    for load in (VipLlavaForConditionalGeneration, *autos):
        with pytest.raises(ValueError, match=f"model_type 'vipllava' .* {message}"):
            load.from_pretrained(tmp_path / "other", **settings)
    for name in ("Config", "ForConditionalGeneration", "Model"):
        with pytest.raises(ValueError, match=r"model_type 'vipllava'.*'llava' is allowed"):
            getattr(llava_sparse, f"SparseLlava{name}").from_pretrained(tmp_path / "other", **settings)
    with pytest.raises(ValueError, match=r"model_type 'llava'.*'qwen2_5_vl' is allowed"):
        llava_sparse.SparseQwen2_5_VLConfig.from_pretrained(tmp_path / "stock", **settings)
    AutoProcessor.from_pretrained(tmp_path / "other")
    logger = logging.getLogger("llava_sparse.auto")
    logger.addHandler(caplog.handler)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "pruned")
    logger.removeHandler(caplog.handler)
    assert "sparse_method='visionzip' of this folder is ignored" in caplog.text
    assert stock.config.sparse_method is None
    stock.save_pretrained(tmp_path / "again")
    assert type(AutoConfig.from_pretrained(tmp_path / "again")) is LlavaConfig


def test_keywords_beside_a_configuration_object(tmp_path):
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

    tiny.save_checkpoint(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LlavaConfig
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, config=config, sparse_method="divprune", sparse_budget=5
    )
    assert type(model) is llava_sparse.SparseLlavaForConditionalGeneration and model.model.sparsifier.tokens == 5
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, config=config)
    assert type(plain) is LlavaForConditionalGeneration


def test_a_checkpoint_names_nothing_to_be_loaded(tmp_path):
    settings = {"sparse_method": "cdpruner", "sparse_budget": 64, "sparse_options": {"clip": "somebody/clip"}}
    SparseLlavaConfig(**settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only if you name it"):
        AutoConfig.from_pretrained(tmp_path)
    named = AutoConfig.from_pretrained(tmp_path, sparse_options={"clip": "mine/clip"})
    assert named.sparse_options == {"clip": "mine/clip"}
