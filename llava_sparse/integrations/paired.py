"""Two runs of lmms-eval on the same questions: the difference of a metric, with its interval and a paired test.

Questions about one picture hang together, and lmms-eval takes them as independent (it names no cluster for POPE). Here
pictures are drawn as wholes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_sparse.evaluation.statistics import clustered_mean

# Where rows of lmms-eval's tasks say which picture, or video, they are about.
CLUSTERS = ("image_source", "image_id", "imageId", "image", "img_id", "video", "video_name", "video_id", "input_media")
# What the model `llava_sparse` writes beside a log, where it is told to (`pictures=`): a digest for each question.
PICTURES = "pictures.jsonl"
# Of a row that are no metric.
OWN = (
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "doc_hash", "prompt_hash", "target_hash",
    "input", "input_media", "token_counts",
)  # fmt: skip


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows that lmms-eval logged (`--log_samples`): a file `*_samples_*.jsonl`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for what is no such file, with the line.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "doc_id" not in row or "target" not in row:
            raise ValueError(f"{path}, line {number}: this is no logged sample of lmms-eval (--log_samples).")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: there are no samples in it.")
    return sorted(rows, key=lambda row: str(row["doc_id"]))


def metric_of(rows: Sequence[Mapping[str, Any]], name: str | None = None) -> str:
    """The metric to compare, a number, or a number under `score`, in some rows at least (MME has two kinds of rows).

    Args:
        name: of the metric; by default the first one.

    Raises:
        ValueError: naming those that are there, where `name` is none of them, or none is.
    """
    keys = dict.fromkeys(key for row in rows for key in row if key not in OWN and _number(row[key]) is not None)
    name = name or next(iter(keys), None)
    if name is None or name not in keys:
        raise ValueError(f"metric {name!r}: allowed, as they are numbers in the samples: {', '.join(keys) or 'none'}.")
    return name


def _number(value: Any) -> float | None:
    value = value.get("score") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else None


def cluster_of(path: str | Path, rows: Sequence[Mapping[str, Any]], field: str | None = None) -> tuple[str, list[str]]:
    """Which picture each row is about.

    Args:
        path: of the log, in whose folder, or the one above, a file `PICTURES` may lie.
        field: of the rows, their documents or their metrics; by default `PICTURES`, else the first of `CLUSTERS` that
            all have.

    Raises:
        ValueError: naming the fields that are there, where none is known, or `field` is not one of them.
    """
    known = next((found for up in Path(path).parents[:2] if (found := up / PICTURES).is_file()), None)
    if field is None and known is not None:
        lines = map(json.loads, known.read_text().splitlines())
        seen = {str(line["doc_id"]): line["picture"] for line in lines}
        if all(str(row["doc_id"]) in seen for row in rows):
            return PICTURES, [seen[str(row["doc_id"])] for row in rows]
    every = [_fields(row) for row in rows]
    there = [name for name in every[0] if all(fields.get(name) is not None for fields in every)]
    field = field or next((name for name in CLUSTERS if name in there), None)
    if field is None or field not in there:
        raise ValueError(
            f"cluster {field!r}: which field says what picture it is? There are: {', '.join(there) or 'none'}. The "
            f"model llava_sparse writes {PICTURES} with model_args pictures=FILE."
        )
    return field, [str(fields[field]) for fields in every]


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """What may name the picture of a row: in its document, in its metrics, or as a path."""
    found: dict[str, Any] = {}
    for value in (*row.values(), row.get("doc") or {}):
        if isinstance(value, dict):
            found |= {name: x for name, x in value.items() if isinstance(x, str | int)}
    media = row.get("input_media")
    return found | ({"input_media": media[0]} if media else {})


def compare(
    first: str | Path, second: str | Path, metric: str | None = None, cluster: str | None = None,
    *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Compares two logs of the same questions.

    Args:
        first, second: files of logged samples; metric, cluster: as of `metric_of` and `cluster_of`.
        resamples, confidence, seed: of the bootstrap, and of the test.

    Returns:
        `metric`, `cluster`, `questions`, `clusters`; `a` and `b`, the means; `difference`, a minus b, and its
        `interval`; `a_better` and `b_better`, in how many questions; `p`, two-sided, of the sign-flip test that takes
        pictures as wholes.

    Raises:
        ValueError: for logs of different questions, and as `read_log`, `metric_of` and `cluster_of`.
    """
    logs = [read_log(path) for path in (first, second)]
    same = [[(str(row["doc_id"]), row.get("input"), str(row["target"])) for row in rows] for rows in logs]
    if same[0] != same[1]:
        wrong = next((a for a, b in zip(*same, strict=False) if a != b), "the number of samples")
        raise ValueError(f"{first} and {second} are not of the same questions: they differ in {wrong}.")
    name = metric_of(logs[0], metric)
    logs = [[row for row in rows if _number(row.get(name)) is not None] for rows in logs]
    a, b = ([float(row[name]["score"] if isinstance(row[name], dict) else row[name]) for row in rows] for rows in logs)
    if len(a) != len(b):
        raise ValueError(f"{second}: {name} is there for {len(b)} samples, and in {first} for {len(a)}.")
    field, clusters = cluster_of(first, logs[0], cluster)
    difference = np.array(a) - np.array(b)
    scale = max(1.0, float(np.abs(difference).max()))
    # Where `clustered_mean` wants values from 0 to 1.
    settings: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    _, interval = clustered_mean((difference / scale + 1) / 2, clusters, **settings)
    return {
        "metric": name, "cluster": field, "questions": len(difference), "clusters": len(set(clusters)),
        "a": float(np.mean(a)), "b": float(np.mean(b)), "difference": float(difference.mean()),
        "interval": [(2 * bound - 1) * scale for bound in interval],
        "a_better": int((difference > 0).sum()), "b_better": int((difference < 0).sum()),
        "p": sign_flip(difference, clusters, seed=seed),
    }  # fmt: skip


def sign_flip(difference: np.ndarray, clusters: Sequence[str], *, draws: int = 20_000, seed: int = 0) -> float:
    """The two-sided p-value of the sum of differences `(n,)`, were the two runs of each cluster exchangeable.

    All sign patterns of the clusters' sums where there are no more than `draws`, else so many at random.
    """
    _, number = np.unique(list(clusters), return_inverse=True)
    sums = np.bincount(number, weights=difference)
    sums = sums[sums != 0]
    observed = abs(sums.sum()) - 1e-9
    if 2 ** len(sums) <= draws:
        patterns = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        return float((np.abs((2 * patterns - 1) @ sums) >= observed).mean())
    signs = np.random.default_rng(seed).integers(0, 2, (draws, len(sums)), dtype=np.int8) * 2 - 1
    return float(((np.abs(signs @ sums) >= observed).sum() + 1) / (draws + 1))


def summary(found: Mapping[str, Any], names: tuple[str, str]) -> str:
    """A comparison in lines."""
    low, high = found["interval"]
    return (
        f"{found['metric']} over {found['questions']:,} questions about {found['clusters']:,} pictures "
        f"({found['cluster']})\n"
        f"  {names[0]}: {found['a']:.4f}\n"
        f"  {names[1]}: {found['b']:.4f}\n"
        f"  difference {found['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}], p = {found['p']:.3g}\n"
        f"  better in {found['a_better']} questions, worse in {found['b_better']}"
    )
