"""Pruned models in vLLM give the tokens that they give in transformers: `make test-vllm`, an environment of its own."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
)

import llava_sparse
from llava_sparse.integrations import register_vllm
from llava_sparse.reference import CHECKPOINT, SCENES

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm")

METHODS = ["visionzip", "divprune", "scope", "vispruner", "random", "uniform", "pool", "tome"]
ROWS = [json.loads(line) for line in (SCENES / "scenes_pope_adversarial.json").read_text().splitlines()][:20]
ASK, DESCRIBE = "USER: <image>\n{} ASSISTANT:", "USER: <image>\nDescribe the image . ASSISTANT:"
LIMITS = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 8, "seed": 0}


def picture(name: str) -> Image.Image:
    return Image.open(SCENES / "images" / name).convert("RGB")


QUESTIONS = [([row["image"]], ASK.format(row["text"]), 6) for row in ROWS]
CAPTIONS = [([row["image"]], DESCRIBE, 16) for row in ROWS[:16:4]]
PAIRS = [
    ([ROWS[i]["image"], ROWS[i + 6]["image"]], "USER: <image>\n<image>\nIs there a dog in the image? ASSISTANT:", 6)
    for i in range(3)
]


def in_transformers(model, processor, asked) -> list[list[int]]:
    answers = []
    for names, prompt, tokens in asked:
        batch = processor(images=[picture(name) for name in names], text=[prompt], return_tensors="pt")
        out = model.generate(**batch.to(model.dtype), max_new_tokens=tokens, do_sample=False)
        answers.append(out[0, batch["input_ids"].shape[1] :].tolist())
    return answers


def in_vllm(llm, asked) -> list[list[int]]:
    prompts = [{"prompt": p, "multi_modal_data": {"image": [picture(name) for name in names]}} for names, p, _ in asked]
    options = [vllm.SamplingParams(temperature=0, max_tokens=tokens) for _, _, tokens in asked]
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, options, use_tqdm=False)]


def loaded(path, **settings):
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **settings).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@contextmanager
def running(path, **settings):
    """An engine, gone behind it: a process holds one at a time."""
    llm = vllm.LLM(str(path), **LIMITS | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        vllm.distributed.cleanup_dist_env_and_memory()


class TestMethods:
    @pytest.fixture(scope="class")
    def engine(self):
        """With a stock checkpoint. Its methods change from test to test, so it caches nothing by picture."""
        overrides = {"sparse_method": "visionzip", "sparse_budget": 64}
        with running(CHECKPOINT, hf_overrides=overrides, enable_prefix_caching=False, mm_processor_cache_gb=0) as llm:
            yield llm

    @pytest.mark.parametrize("method", METHODS)
    def test_twenty_questions_and_four_captions(self, engine, processor, method):
        model = loaded(CHECKPOINT, sparse_method=method, sparse_budget=64)

        def use(inside):
            inside.pictures[0].sparsifier = model.model.sparsifier

        engine.apply_model(use)
        engine.llm_engine.reset_encoder_cache()
        asked = QUESTIONS + CAPTIONS
        assert in_vllm(engine, asked) == in_transformers(model, processor, asked)


def test_chunks_prefixes_and_several_pictures(processor, tmp_path):
    """A saved folder, with its own processor; prompts come in chunks smaller than a picture, and twice."""
    settings = {"sparse_method": "divprune", "sparse_budget": 0.1}
    model = loaded(CHECKPOINT, **settings)
    model.save_pretrained(tmp_path)
    llava_sparse.SparseLlavaProcessor.from_pretrained(CHECKPOINT, **settings).save_pretrained(tmp_path)
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
    asked = QUESTIONS[:6] + PAIRS
    expected = in_transformers(model, processor, asked)
    with running(tmp_path, disable_log_stats=False, **chunks) as llm:
        assert in_vllm(llm, asked) == expected
        assert in_vllm(llm, asked) == expected
        counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert counted["vllm:prefix_cache_hits"] > 0


def test_null_is_dense(processor, tmp_path):
    loaded(CHECKPOINT, sparse_method="visionzip", sparse_budget=64).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    asked = QUESTIONS[:6] + CAPTIONS[:1]
    with running(tmp_path, hf_overrides={"sparse_method": None}) as llm:
        assert in_vllm(llm, asked) == in_transformers(loaded(CHECKPOINT), processor, asked)


# --- LLaVA-NeXT --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles(processor, tmp_path_factory):
    """A LLaVA-NeXT with the reference model's weights."""
    dense = loaded(CHECKPOINT)
    config = LlavaNextConfig(
        vision_config=dense.config.vision_config, text_config=dense.config.text_config, image_token_index=4,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672]],
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).float().eval()
    left = model.load_state_dict(dense.state_dict(), strict=False)
    assert left.missing_keys == ["model.image_newline"] and not left.unexpected_keys
    torch.nn.init.normal_(model.model.image_newline, std=0.02)
    model.generation_config = dense.generation_config
    folder = tmp_path_factory.mktemp("next")
    model.save_pretrained(folder)
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )  # fmt: skip
    LlavaNextProcessor(
        pictures, processor.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize(("method", "budget"), [("visionzip", 160), ("divprune", 0.1)])
def test_llava_next(tiles, method, budget):
    settings = {"sparse_method": method, "sparse_budget": budget}
    model, processor = loaded(tiles, **settings), AutoProcessor.from_pretrained(tiles)
    shapes = [(336, 336), (600, 300), (300, 640), (700, 700)]
    prompts, expected = [], []
    for (names, prompt, _), shape in zip(CAPTIONS, shapes, strict=True):
        image = picture(names[0]).resize(shape)
        prompts.append({"prompt": prompt, "multi_modal_data": {"image": image}})
        batch = processor(images=[image], text=[prompt], return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=12, do_sample=False)
        expected.append(out[0, batch["input_ids"].shape[1] :].tolist())
    options = vllm.SamplingParams(temperature=0, max_tokens=12)
    with running(tiles, hf_overrides=settings, max_model_len=2048) as llm:
        assert [list(out.outputs[0].token_ids) for out in llm.generate(prompts, options, use_tqdm=False)] == expected


# --- What is refused, and what tells settings apart --------------------------------------------------------------


def settings_of(model_config):
    from llava_sparse.integrations.vllm import settings_of as settings

    return settings(model_config)


def of_engine(path=CHECKPOINT, **overrides):
    return SimpleNamespace(hf_overrides=overrides, hf_config_path=None, model=str(path), revision=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_method": "sparsevlm", "sparse_budget": 64}, "needs the decoder or the question"),
        ({"sparse_method": "divprune+fastv", "sparse_budget": 64}, "needs the decoder or the question"),
        ({"sparse_method": "cdpruner", "sparse_budget": 64}, r"Allowed: divprune, .*visionzip"),
        ({"sparse_method": "delegate", "sparse_budget": 64}, "needs the decoder or the question"),
        ({"sparse_method": "visionzipp", "sparse_budget": 64}, "did you mean 'visionzip'"),
        ({"sparse_method": "visionzip", "sparse_budget": 700}, r"int in \[1, 576\]"),
        ({"sparse_method": "visionzip", "sparse_buget": 64}, "sparse_buget is no setting"),
        ({"sparse_method": "visionzip"}, "needs `sparse_budget`"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings_of(of_engine(**settings))


def test_families_that_are_not_served(tmp_path):
    register_vllm()
    with pytest.raises(ValueError, match="'qwen2_5_vl' is not served by vLLM"):
        Qwen2_5_VLConfig().sparse_method = "divprune"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sparse_llava_onevision"}))
    with pytest.raises(ValueError, match="'llava_onevision' is not served by vLLM"):
        settings_of(of_engine(tmp_path))


def test_caches_are_keyed_by_settings():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    ids = set()
    settings = [("visionzip", 64), ("visionzip", 32), ("scope", 64)]
    for method, budget in settings:
        overrides = {"sparse_method": method, "sparse_budget": budget}
        config = EngineArgs(str(CHECKPOINT), hf_overrides=overrides, **LIMITS).create_model_config()
        info = MULTIMODAL_REGISTRY.create_processor(config).info
        assert info.get_num_image_tokens(image_width=336, image_height=336) == budget
        ids.add(info.model_id)
    assert len(ids) == len(settings)


# --- As people start it ------------------------------------------------------------------------------------------


def test_two_ranks_equal_one(processor):
    """In a process of its own, for the engine's ranks are processes."""
    overrides = {"sparse_method": "visionzip", "sparse_budget": 64}
    expected = in_transformers(loaded(CHECKPOINT, **overrides), processor, QUESTIONS + CAPTIONS)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = next(line for line in done.stdout.splitlines() if line.startswith("[["))
    assert json.loads(answers) == expected


def serve(*arguments: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(CHECKPOINT), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "8",
        "--served-model-name", "m", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), port


def test_over_http(processor):
    openai = pytest.importorskip("openai")
    settings = {"sparse_method": "divprune", "sparse_budget": 64}
    expected = in_transformers(loaded(CHECKPOINT, **settings), processor, QUESTIONS[:6])
    server, port = serve("--hf-overrides", json.dumps(settings))
    try:
        for _ in range(600):
            assert server.poll() is None, server.stdout.read()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        said = []
        for row in ROWS[:6]:
            data = base64.b64encode((SCENES / "images" / row["image"]).read_bytes()).decode()
            content = [
                {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
                {"type": "text", "text": row["text"]},
            ]
            messages = [{"role": "user", "content": content}]
            reply = client.chat.completions.create(model="m", temperature=0, max_tokens=6, messages=messages)
            said.append(reply.choices[0].message.content.strip())
    finally:
        server.terminate()
        server.wait(30)
    assert said == [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]


def test_what_is_refused_is_refused_before_the_server_is_up():
    server, _ = serve("--hf-overrides", '{"sparse_method": "sparsevlm", "sparse_budget": 64}')
    said = server.communicate(timeout=400)[0]
    assert server.returncode != 0 and "needs the decoder or the question" in said


if __name__ == "__main__":
    overrides = {"sparse_method": "visionzip", "sparse_budget": 64}
    with running(CHECKPOINT, hf_overrides=overrides, tensor_parallel_size=2) as ranks:
        print("\n" + json.dumps(in_vllm(ranks, QUESTIONS + CAPTIONS)), flush=True)
