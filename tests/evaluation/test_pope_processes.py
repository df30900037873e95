"""Evaluations as processes: killed at any moment, several at once, one of them dying."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_sparse.evaluation.answer_log import read_log

pytestmark = pytest.mark.slow
POPE = [
    "-m",
    "llava_sparse.cli",
    "pope",
    "--methods",
    "dense,visionzip,sparsevlm",
    "--limit",
    "10",
    "--batch-size",
    "6",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# What accelerate launch runs on machines with several devices.
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def pope(folder: Path, *, launch: list[str] | None = None, **options) -> subprocess.Popen:
    command = [*(launch or [sys.executable]), *POPE, "--output", str(folder / "run.json")]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def written(folder: Path) -> tuple[dict, dict]:
    """Results, and the line of each key."""
    return json.loads((folder / "run.json").read_text()), read_log(folder / "run.answers.jsonl")[1]


def some_of(whole: tuple[dict, dict], folder: Path) -> None:
    """What was logged so far are answers of the whole."""
    lines = read_log(folder / "run.answers.jsonl", torn=False)[1]
    assert lines == {key: whole[1][key] for key in lines}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, dict]:
    """What one process writes at a stretch."""
    folder = tmp_path_factory.mktemp("whole")
    process = pope(folder)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return written(folder)


def test_killed_at_random_points_and_continued(whole, tmp_path):
    lines = len(whole[1]) + 1
    drawn = random.Random(0)
    log = tmp_path / "run.answers.jsonl"
    for until in sorted(drawn.sample(range(2, lines * 3 // 4), 3)):
        process = pope(tmp_path)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= until:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        some_of(whole, tmp_path)
    process = pope(tmp_path)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert written(tmp_path) == whole
    resumed = json.loads((tmp_path / "run.timing.json").read_text())["runs"]
    assert sum(run["questions"] for run in resumed.values()) < lines - 1


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_give_what_one_gives(whole, tmp_path, count):
    process = pope(tmp_path, launch=[*LAUNCH[:-1], str(count)])
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert written(tmp_path) == whole
    assert said.count("POPE, reference") == 1
    assert json.loads((tmp_path / "run.timing.json").read_text())["processes"] == count


def test_a_process_that_dies_fails_the_run_and_loses_nothing(whole, tmp_path):
    process = pope(tmp_path, launch=LAUNCH, start_new_session=True)
    log = tmp_path / "run.answers.jsonl"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (log.exists() and log.read_bytes().count(b"\n") > 8):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(worker_of(process.pid, rank=1), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode not in (0, None)
    assert "Signal 9" in errors or "another of the 2 processes has stopped" in errors
    some_of(whole, tmp_path)
    assert not (tmp_path / "run.json").exists() or len(written(tmp_path)[0]["methods"]) < len(whole[0]["methods"])
    assert pope(tmp_path).wait(timeout=300) == 0
    assert written(tmp_path) == whole


def worker_of(parent: int, rank: int) -> int:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text().rpartition(") ")[2].split()
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(status[1]) == parent and f"RANK={rank}".encode() in environment:
                return int(folder.name)
    pytest.fail(f"there is no process of rank {rank}")
