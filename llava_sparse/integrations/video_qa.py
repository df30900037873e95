"""Open-ended questions about videos, as Video-LLaVA and SparseVLM ask them: TGIF-QA, MSVD-QA and MSRVTT-QA.

Their release (`GPT_Zero_Shot_QA` of Video-ChatGPT and Video-LLaVA) is a folder for each, with `test_q.json`,
`test_a.json` and the videos. `prepare` makes of it what the task files of lmms-eval read.
"""

from __future__ import annotations

import json
import os
import re
import string
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BENCHMARKS = ("tgif_qa", "msvd_qa", "msrvtt_qa")
PREPARED = Path("prepared")
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif", "")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
JUDGE_URL, JUDGE_MODEL, JUDGE_KEY = "LLAVA_SPARSE_JUDGE_URL", "LLAVA_SPARSE_JUDGE_MODEL", "OPENAI_API_KEY"
JUDGE = """You grade answers to questions about a video. Does the predicted answer mean the same as the correct one? \
Synonyms and paraphrases count.

Question: {question}
Correct answer: {answer}
Predicted answer: {prediction}

Reply with a JSON object and nothing else: {{"pred": "yes" or "no", "score": an integer from 0 (unrelated) to 5}}"""


def prepare(benchmark: str, folder: str | Path, videos: str | Path, output: str | Path = PREPARED) -> Path:
    """Joins questions, answers and videos to the rows that a task reads: JSON lines in `output`, in the working folder.

    Args:
        benchmark: one of `BENCHMARKS`; folder: with `test_q.json` and `test_a.json`; videos: where the videos are.

    Returns:
        the file.

    Raises:
        ValueError: for another benchmark, and questions without answer.
        FileNotFoundError: for a file or a video that is missing.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"{benchmark!r} is unknown; allowed: {', '.join(BENCHMARKS)}.")
    questions, answers = (json.loads((Path(folder) / f"test_{kind}.json").read_text()) for kind in "qa")
    known = {str(row["question_id"]): row for row in answers}
    rows = []
    for row in questions:
        answer = known.get(str(row["question_id"]))
        if answer is None:
            raise ValueError(f"{folder}: question {row['question_id']} of test_q.json has no answer in test_a.json.")
        rows.append(
            {
                "question_id": str(row["question_id"]),
                "video": str(_video(Path(videos), row["video_name"])),
                "question": row["question"],
                "answer": str(answer["answer"]),
            }
        )
    return write_rows(rows, Path(output) / f"{benchmark}.jsonl")


def write_rows(rows: list[dict[str, Any]], file: Path) -> Path:
    """Rows as JSON lines; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _video(folder: Path, name: str) -> Path:
    for suffix in SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file() or (not suffix and path.is_dir()):
            return path.resolve()
    raise FileNotFoundError(f"{folder}: there is no video {name}, with any of the endings {', '.join(SUFFIXES[:-1])}.")


def normal(text: str) -> str:
    """An answer without case, punctuation and articles, numbers as digits."""
    words = re.sub(f"[{re.escape(string.punctuation)}]", " ", text.lower()).split()
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(str(NUMBERS.index(word)) if word in NUMBERS else word for word in words)


def score(row: Mapping[str, Any], prediction: str) -> dict[str, float]:
    """`accuracy` of one answer: 1 where it is the label, by `normal`; with a judge, `judge_score`, 0 to 5, too.

    With `LLAVA_SPARSE_JUDGE_URL`, an OpenAI-compatible address up to `/v1`, a model there (`LLAVA_SPARSE_JUDGE_MODEL`)
    decides instead, as in the papers.
    """
    url = os.environ.get(JUDGE_URL)
    if not url:
        return {"accuracy": float(normal(prediction) == normal(row["answer"]))}
    verdict = judge(url, row, prediction)
    return {"accuracy": float(verdict["pred"] == "yes"), "judge_score": float(verdict["score"])}


def judge(url: str, row: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """What a model says of an answer: `pred`, "yes" or "no", and `score`, 0 to 5.

    Raises:
        ValueError: without a model's name, and for a reply that is no verdict: none is counted as a wrong answer.
        OSError: if it cannot be reached.
    """
    model = os.environ.get(JUDGE_MODEL)
    if not model:
        raise ValueError(f"{JUDGE_URL} is set, and {JUDGE_MODEL} is not: name the model that judges.")
    text = JUDGE.format(question=row["question"], answer=row["answer"], prediction=prediction)
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(JUDGE_KEY, 'none')}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        said = json.load(reply)["choices"][0]["message"]["content"]
    found = re.search(r"\{.*?\}", said, re.DOTALL)
    try:
        verdict: dict[str, Any] = json.loads(found[0]) if found else {}
    except ValueError:
        verdict = {}
    if verdict.get("pred") not in ("yes", "no") or verdict.get("score") not in range(6):
        raise ValueError(f"the judge {model} replied {said!r}; {{'pred': 'yes' or 'no', 'score': 0 to 5}} is allowed.")
    return verdict
