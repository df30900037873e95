"""Questions about videos: preparing a release, the exact rule, and a judge behind OpenAI's interface."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llava_sparse.integrations import video_qa


@pytest.fixture
def release(tmp_path):
    questions = [{"video_name": "v1", "question": "what runs", "question_id": 7}]
    (tmp_path / "test_q.json").write_text(json.dumps(questions))
    (tmp_path / "test_a.json").write_text(json.dumps([{"answer": "dog", "question_id": "7"}]))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v1.avi").write_bytes(b"")
    return tmp_path


def test_prepare(release):
    file = video_qa.prepare("msvd_qa", release, release / "videos", release / "prepared")
    row = json.loads(file.read_text())
    video = str((release / "videos" / "v1.avi").resolve())
    assert row == {"question_id": "7", "video": video, "question": "what runs", "answer": "dog"}
    (release / "videos" / "v1.avi").unlink()
    with pytest.raises(FileNotFoundError, match="there is no video v1"):
        video_qa.prepare("msvd_qa", release, release / "videos", release)
    (release / "test_a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"question 7 .* has no answer"):
        video_qa.prepare("msvd_qa", release, release / "videos", release)
    with pytest.raises(ValueError, match="allowed: tgif_qa"):
        video_qa.prepare("msvd", release, release, release)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [("A dog.", "dog", 1), ("Two", "2", 1), ("the dogs", "dog", 0), ("", "dog", 0), ("dog and cat", "dog", 0)],
)
def test_the_exact_rule(said, answer, right, monkeypatch):
    monkeypatch.delenv(video_qa.JUDGE_URL, raising=False)
    assert video_qa.score({"question": "what", "answer": answer}, said) == {"accuracy": right}


@pytest.fixture
def judge(monkeypatch):
    """A server that says what its list says."""
    replies, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"content": replies.pop(0)}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(video_qa.JUDGE_URL, f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv(video_qa.JUDGE_MODEL, "judge")
    yield replies, asked
    server.shutdown()
    server.server_close()


def test_a_judge(judge, monkeypatch):
    replies, asked = judge
    row = {"question": "what runs", "answer": "dog"}
    replies += ['Sure: {"pred": "yes", "score": 4}', '{"pred": "no", "score": 1}', "yes", '{"pred": "yes", "score": 9}']
    assert video_qa.score(row, "a puppy") == {"accuracy": 1.0, "judge_score": 4.0}
    assert video_qa.score(row, "a cat") == {"accuracy": 0.0, "judge_score": 1.0}
    assert asked[0]["temperature"] == 0 and "a puppy" in asked[0]["messages"][0]["content"]
    # No verdict is no wrong answer: it is an error.
    for _ in range(2):
        with pytest.raises(ValueError, match="the judge judge replied"):
            video_qa.score(row, "a cat")
    monkeypatch.delenv(video_qa.JUDGE_MODEL)
    with pytest.raises(ValueError, match="name the model that judges"):
        video_qa.score(row, "a cat")
