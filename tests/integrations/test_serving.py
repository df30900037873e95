"""A pruned model behind transformers' server, asked by OpenAI's client."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_sparse
from llava_sparse.evaluation import ask
from llava_sparse.integrations import serving
from llava_sparse.pictures import read_picture
from llava_sparse.reference import CHECKPOINT, SCENES

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

PICTURES = sorted((SCENES / "images").iterdir())[:3]
SETTINGS = {"sparse_method": "visionzip", "sparse_budget": 64}


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32, **SETTINGS).eval()


@pytest.fixture(scope="module")
def processor():
    return llava_sparse.SparseLlavaProcessor.from_pretrained(CHECKPOINT, **SETTINGS)


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def client_of(port: int, seconds: float = 60.0):
    """The client, as soon as the server answers."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=seconds)
    end = time.monotonic() + seconds
    while True:
        try:
            client.models.list()
            return client
        except openai.APIConnectionError:
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.1)


def answer(client, name, path, question: str) -> str:
    url = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model=str(name), temperature=0, max_tokens=6, messages=messages)
    return reply.choices[0].message.content.strip()


def expected(model, processor, things) -> list[str]:
    prompt = "USER: <image>\n{question} ASSISTANT:"
    return [
        ask(model, processor, read_picture(path), f"Is there a {thing} in the image?", prompt) for path, thing in things
    ]


ASKED = [(path, thing) for path in PICTURES for thing in ("dog", "cat")]


@pytest.fixture(scope="module")
def client(folder):
    port = free_port()
    server = serving.serve(folder, port=port, dtype="float32", device="cpu", blocking=False)
    yield client_of(port)
    server.kill_server()


def test_answers_are_those_of_the_model(client, folder, model, processor):
    asked = ASKED[:2]
    said = [answer(client, folder, path, f"Is there a {thing} in the image?") for path, thing in asked]
    assert said == expected(model, processor, asked) and len(set(said)) == 2


@pytest.mark.slow
def test_questions_at_once(client, folder, model, processor):
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda one: answer(client, folder, one[0], f"Is there a {one[1]} in the image?"), ASKED))
    assert said == expected(model, processor, ASKED)


@pytest.mark.slow
def test_a_broken_picture_is_an_error_and_the_server_goes_on(client, folder, tmp_path, model, processor):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"this is no picture")
    with pytest.raises(openai.APIError):
        answer(client, folder, broken, "Is there a dog in the image?")
    again = client.with_options(max_retries=2)  # The server has closed the connection.
    assert (
        answer(again, folder, PICTURES[0], "Is there a dog in the image?") == expected(model, processor, ASKED[:1])[0]
    )


def test_saved_folders_carry_the_chat_template(folder, model, processor, tmp_path):
    llava_sparse.hub.save_to_hub_folder(model, processor, tmp_path)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it ?"}]}]
    for path in (folder, tmp_path):
        saved = AutoProcessor.from_pretrained(path)
        assert saved.apply_chat_template(message, add_generation_prompt=True) == "USER: <image>\nIs it ? ASSISTANT:"


def test_what_cannot_be_served(folder, tmp_path):
    with pytest.raises(ValueError, match="model_type 'llava' is no pruned model"):
        serving.check_servable(CHECKPOINT)
    with pytest.raises(OSError, match=r"config\.json"):
        serving.check_servable(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="there is no chat template"):
        serving.check_servable(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"sparse_budget": 700}))
    with pytest.raises(ValueError, match=r"int in \[1, 576\]"):
        serving.check_servable(tmp_path)


@pytest.mark.slow
def test_the_command(model, processor, tmp_path):
    """A folder for the Hub, served by the command; Ctrl-C ends it."""
    llava_sparse.hub.save_to_hub_folder(model, processor, tmp_path)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "llava_sparse.cli",
        "serve",
        str(tmp_path),
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            client = client_of(port)
            said = [answer(client, tmp_path, path, f"Is there a {thing} in the image?") for path, thing in ASKED]
            assert said == expected(model, processor, ASKED)
            with pytest.raises(ConnectionRefusedError), socket.socket() as elsewhere:
                elsewhere.connect(("127.0.0.2", port))  # What listens on all addresses would take it.
        finally:
            server.terminate()
            said = server.communicate(timeout=20)[1]
    assert f"(method visionzip, budget 64) at http://127.0.0.1:{port}/v1" in said
