"""Differences of two logs of lmms-eval, with pictures as wholes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from llava_sparse import cli
from llava_sparse.integrations import paired


def write(path, scores, *, per_picture=4, changed=None):
    """A log: each score is a question, a few of them about one picture."""
    rows = []
    for i, score in enumerate(scores):
        row = {"doc_id": i, "target": "yes", "input": f"q{i}", "filtered_resps": "Yes"}
        picture = f"picture{i // per_picture}"
        row["pope_accuracy"] = {"question_id": i, "score": score, "image_source": picture}
        rows.append(row | (changed or {}))
    rows.reverse()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_difference_interval_and_test(tmp_path):
    draw = np.random.default_rng(0)
    a, b = draw.random(400) < 0.8, draw.random(400) < 0.7
    logs = [write(tmp_path / f"{name}.jsonl", x.astype(float)) for name, x in (("a", a), ("b", b))]
    found = paired.compare(*logs)
    assert (found["metric"], found["cluster"], found["questions"], found["clusters"]) == (
        "pope_accuracy", "image_source", 400, 100,
    )  # fmt: skip
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert (found["a_better"], found["b_better"]) == ((a & ~b).sum(), (b & ~a).sum())
    # Against the interval of normal theory with clusters' sums, and McNemar's test: questions here are independent.
    sums = (a.astype(float) - b).reshape(100, 4).sum(1)
    error = sums.std(ddof=1) * 10 / 400
    low, high = found["interval"]
    assert low == pytest.approx(found["difference"] - 1.96 * error, abs=0.008)
    assert high == pytest.approx(found["difference"] + 1.96 * error, abs=0.008)
    exact = binomtest(int((a & ~b).sum()), int((a ^ b).sum())).pvalue
    assert found["p"] == pytest.approx(exact, rel=0.6)
    assert paired.compare(*logs[::-1])["difference"] == pytest.approx(-found["difference"])


def test_questions_about_one_picture_count_once():
    """Five pictures that agree are five observations, however many questions there are about each."""
    difference = np.ones(50)
    clusters = [str(i // 10) for i in range(50)]
    assert paired.sign_flip(difference, clusters) == pytest.approx(2 / 2**5)
    assert paired.sign_flip(difference, [str(i) for i in range(50)]) < 1e-4
    assert paired.sign_flip(np.zeros(4), ["a", "b", "c", "d"]) == 1


def test_the_models_own_file_says_which_picture(tmp_path):
    log = write(tmp_path / "a.jsonl", [1.0, 0.0, 1.0])
    lines = [{"doc_id": i, "picture": "ab"[i // 2]} for i in range(3)]
    (tmp_path / paired.PICTURES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = paired.compare(log, log)
    assert (found["cluster"], found["clusters"], found["p"]) == (paired.PICTURES, 2, 1.0)
    assert paired.compare(log, log, cluster="image_source")["clusters"] == 1


def test_the_command(tmp_path, capsys):
    logs = [write(tmp_path / f"{i}.jsonl", [1.0, 1.0, 0.0, float(i)]) for i in range(2)]
    with pytest.raises(SystemExit) as exit:
        cli.main(["compare", *map(str, logs)])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "difference -0.2500" in out and "4 questions about 1 pictures" in out


def test_what_is_refused(tmp_path):
    a = write(tmp_path / "a.jsonl", [1.0, 0.0])
    for other, message in [
        (write(tmp_path / "b.jsonl", [1.0, 0.0], changed={"input": "x"}), "not of the same questions"),
        (write(tmp_path / "c.jsonl", [1.0]), "not of the same questions"),
    ]:
        with pytest.raises(ValueError, match=message):
            paired.compare(a, other)
    with pytest.raises(ValueError, match=r"metric 'f1': allowed, .*pope_accuracy"):
        paired.compare(a, a, "f1")
    with pytest.raises(ValueError, match="There are: question_id, image_source"):
        paired.compare(a, a, cluster="picture")
    (tmp_path / "d.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match="line 1: this is no logged sample"):
        paired.compare(a, tmp_path / "d.jsonl")
