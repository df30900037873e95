"""Pushing pruned models, against a stand-in of the Hub, and loading repositories of settings alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import hub_server
import huggingface_hub
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import llava_sparse
from llava_sparse import cli, hub

SETTINGS = {"sparse_method": "visionzip", "sparse_budget": 5}


@pytest.fixture
def remote(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.running() as server:
        yield server


@pytest.fixture
def model(dense):
    return llava_sparse.sparsify(dense, "visionzip", budget=5)


@pytest.fixture
def own_processor():
    return tiny.processor(llava_sparse.SparseLlavaProcessor, **SETTINGS)


def push(remote, *args, **kwargs):
    return hub.push(*args, **{"token": hub_server.TOKEN, "endpoint": remote.url} | kwargs)


def test_a_model_with_code_and_card(remote, model, own_processor):
    done = push(remote, model, "you/zip", own_processor, base_model="llava-hf/llava-1.5-7b-hf")
    files = remote.repos["you/zip"]
    assert done.url.startswith(f"{remote.url}/you/zip/commit/") and set(done.files) <= set(files)
    assert {"config.json", "model.safetensors", "modeling_sparse_llava.py", "processing_sparse_llava.py"} <= set(files)
    card = files["README.md"].decode()
    for text in (
        "base_model: llava-hf/llava-1.5-7b-hf", "license_name: as-the-base-model", "trust_remote_code=True",
        "| 5, as the papers' tables count | 5 of 16 | 5.0 |", "arxiv.org/abs/2412.04467", "**Safety.**", "steered",
        "Nothing was measured",
    ):  # fmt: skip
        assert text in card, text


def test_a_decoder_methods_counts(dense):
    model = llava_sparse.sparsify(dense, "fastv", layers=[1], budgets=[6])
    # Layers 0 and 1 hold all 16 tokens, four layers 6.
    assert "| by layers, see the settings | 16 of 16 | 9.3 |" in hub.model_card(model.config)


def test_settings_alone_are_a_few_kilobytes(remote, model, own_processor, tmp_path):
    done = push(remote, model, "you/zip", own_processor, config_only=True, base_model="llava-hf/llava-1.5-7b-hf")
    assert set(done.files) == {"README.md", "chat_template.jinja", "config.json", "processor_config.json"}
    assert sum(done.files.values()) < 12_000
    config = json.loads(remote.repos["you/zip"]["config.json"])
    assert config["base_model_name_or_path"] == "llava-hf/llava-1.5-7b-hf" and config["sparse_budget"] == 5
    assert "settings alone" in remote.repos["you/zip"]["README.md"].decode()
    # Of a folder the same.
    model.save_pretrained(tmp_path)
    own_processor.save_pretrained(tmp_path)
    again = push(
        remote, tmp_path, "you/again", config_only=True, base_model="llava-hf/llava-1.5-7b-hf", license="llama2"
    )
    assert set(again.files) == set(done.files)
    assert "license: llama2" in remote.repos["you/again"]["README.md"].decode()


def test_a_folder_of_settings_loads_the_weights(dense, model, checkpoint, own_processor, tmp_path):
    model.config.save_pretrained(tmp_path)
    own_processor.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    for name in ("config.json", "processor_config.json"):
        content = json.loads((tmp_path / name).read_text()) | {"base_model_name_or_path": str(checkpoint)}
        (tmp_path / name).write_text(json.dumps(content))
    processor = AutoProcessor.from_pretrained(tmp_path)
    batch = tiny.inputs(processor, tiny.QUESTIONS[:1])
    assert int((batch["input_ids"] == 4).sum()) == 5
    expected = AutoModelForImageTextToText.from_pretrained(checkpoint, **SETTINGS).eval()
    loads = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        llava_sparse.SparseLlavaForConditionalGeneration.from_pretrained(tmp_path),
    )
    for loaded in loads:
        assert loaded.config.sparse_method == "visionzip"
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected(**batch).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    other = llava_sparse.SparseLlavaForConditionalGeneration.from_pretrained(tmp_path, sparse_budget=3)
    assert other.config.sparse_budget == 3
    # Whoever names other weights gets them.
    settings = AutoConfig.from_pretrained(tmp_path)
    body = llava_sparse.SparseLlavaForConditionalGeneration.from_pretrained(checkpoint, config=settings)
    assert body.config.sparse_budget == 5
    # What is saved from it has weights of its own.
    loads[0].save_pretrained(tmp_path / "full")
    assert "base_model_name_or_path" not in json.loads((tmp_path / "full" / "config.json").read_text())


@pytest.mark.parametrize("base", ["/etc/models", "../x/y", "a/b/c", "plain", "./x"])
def test_a_strangers_settings_name_no_path(base):
    from llava_sparse.modeling.pruning_base import base_of

    with pytest.raises(ValueError, match="is no Hub id"):
        base_of({"base_model_name_or_path": base}, "stranger/settings")


def test_a_dry_run_contacts_nobody(remote, model, own_processor):
    done = push(remote, model, "you/zip", own_processor, dry_run=True)
    assert done.url is None and "model.safetensors" in done.files and not remote.requests


@pytest.mark.parametrize(
    ("change", "kwargs", "kind", "message"),
    [
        ({}, {"token": None}, PermissionError, "no token; `hf auth login`.*Nothing was pushed"),
        ({}, {"token": "hf_other"}, PermissionError, "the token has no right.*Nothing was pushed"),
        ({"forbidden": True}, {}, PermissionError, "the token has no right.*Nothing was pushed"),
        ({"repos": {"you/zip": {"a": b""}}}, {}, ValueError, "is there already; with update"),
        ({"broken": "/whoami"}, {}, OSError, "Nothing was pushed"),
        ({"broken": "/preupload/"}, {}, OSError, "The repository was made and is empty"),
        ({"broken": "/commit/"}, {}, OSError, "The repository was made and is empty"),
    ],
)
def test_what_goes_wrong_is_said_and_nothing_is_half_done(
    remote, model, own_processor, monkeypatch, change, kwargs, kind, message
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name, value in change.items():
        setattr(remote, name, value)
    before = dict(remote.repos)
    with pytest.raises(kind, match=message):
        push(remote, model, "you/zip", own_processor, config_only=True, base_model="a/b", **kwargs)
    if "/" in getattr(remote, "broken", "") and "whoami" not in remote.broken:
        assert list(remote.repos["you/zip"]) == [".gitattributes"]
        remote.broken = ""
        assert push(remote, model, "you/zip", own_processor, config_only=True, base_model="a/b", update=True).url
        assert "config.json" in remote.repos["you/zip"]
    else:
        assert remote.repos == before


def test_what_is_no_pruned_model(dense, model, checkpoint):
    with pytest.raises(ValueError, match="'llava' is no pruned model"):
        hub.push(dense, "you/zip", dry_run=True)
    with pytest.raises(ValueError, match="'llava' is no pruned model"):
        hub.push(checkpoint, "you/zip", dry_run=True)
    with pytest.raises(ValueError, match="the Hub id"):
        hub.push(model, "you/zip", dry_run=True, config_only=True)
    with pytest.raises(ValueError, match="owner/name is allowed"):
        hub.push(model, "zip", dry_run=True)


def test_measured_results(model, own_processor, tmp_path, monkeypatch):
    average = {"accuracy": 0.851, "f1": 0.849, "precision": 0.9, "recall": 0.8, "yes_ratio": 0.5}
    run = {
        "name": "visionzip-5",
        "method": "visionzip",
        "budget": 5,
        "average": average,
        "splits": dict.fromkeys("abc"),
    }
    results = {"settings": {"model": "llava-hf/llava-1.5-7b-hf", "dataset": "lmms-lab/POPE"}, "methods": [run]}
    monkeypatch.setattr("llava_sparse.evaluation.results.read_results", lambda file: results)
    config = model.config
    text, said = hub.eval_results("run.json", config)
    entries = json.loads(text)
    assert [entry["value"] for entry in entries] == [85.1, 84.9]
    assert entries[0]["dataset"]["id"] == "lmms-lab/POPE" and "85.1 accuracy" in said
    done = hub.push(model, "you/zip", own_processor, dry_run=True, results="run.json")
    assert ".eval_results/pope.yaml" in done.files
    results["settings"]["dataset"] = "reference"
    with pytest.raises(ValueError, match="of no dataset on the Hub"):
        hub.eval_results("run.json", config)
    results["settings"]["dataset"] = "lmms-lab/POPE"
    run["budget"] = 4
    with pytest.raises(ValueError, match="no run of visionzip at 5 is among them: visionzip-5"):
        hub.eval_results("run.json", config)


def test_the_command(checkpoint, capsys):
    arguments = ["push", str(checkpoint), "--repo", "you/zip", "--method", "visionzip", "--budget", "5", "--dry-run"]
    with pytest.raises(SystemExit) as exit:
        cli.main([*arguments, "--config-only", "--base-model", "a/b"])
    out, err = capsys.readouterr()
    assert exit.value.code == 0 and "config.json" in out and "safetensors" not in out
    assert "dry run: nothing was pushed to you/zip" in err


LOAD = """
import sys, torch
import llava_sparse
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("you/zip").eval()
processor = AutoProcessor.from_pretrained("you/zip")
batch = torch.load(sys.argv[1], weights_only=True)
found = {"kind": type(processor).__name__, "budget": model.config.sparse_budget}
torch.save(found | {"logits": model(**batch).logits}, sys.argv[2])
"""


@pytest.mark.slow
def test_one_line_loads_settings_and_weights_from_the_hub(remote, model, own_processor, checkpoint, tmp_path):
    remote.repos["base/llava"] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    push(remote, model, "you/zip", own_processor, config_only=True, base_model="base/llava")
    expected = AutoModelForImageTextToText.from_pretrained(checkpoint, **SETTINGS).eval()
    batch = tiny.inputs(own_processor, tiny.QUESTIONS[:1])
    torch.save(batch, tmp_path / "batch.pt")
    environment = os.environ | {
        "HF_ENDPOINT": remote.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", LOAD, str(tmp_path / "batch.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(out["logits"], expected(**batch).logits)
    assert (out["kind"], out["budget"]) == ("SparseLlavaProcessor", 5)
