"""Functions that the task files beside name."""

from __future__ import annotations

from typing import Any

from PIL import Image

from llava_sparse.integrations import video_qa


def doc_to_video(doc: dict[str, Any]) -> list[str]:
    return [doc["video"]]


def doc_to_picture(doc: dict[str, Any]) -> list[Image.Image]:
    with Image.open(doc["image"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    given = lmms_eval_specific_kwargs or {}
    return f"{given.get('pre_prompt', '')}{doc['question'].strip()}{given.get('post_prompt', '')}"


def process_video(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return video_qa.score(doc, results[0])


def process_yes_no(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The first word decides; what is neither is wrong, and counts as no yes."""
    word = results[0].lower().replace(",", " ").replace(".", " ").split()[:1]
    said = word[0] if word and word[0] in ("yes", "no") else "no"
    pair = {"said": said, "label": doc["answer"]}
    return {"accuracy": float(said == doc["answer"]), "f1": pair, "precision": pair, "recall": pair, "yes_ratio": pair}


def _count(pairs: list[dict[str, str]], said: str, label: str) -> int:
    return sum(pair["said"] == said and pair["label"] == label for pair in pairs)


def precision(pairs: list[dict[str, str]]) -> float:
    hits = _count(pairs, "yes", "yes")
    return hits / max(1, hits + _count(pairs, "yes", "no"))


def recall(pairs: list[dict[str, str]]) -> float:
    hits = _count(pairs, "yes", "yes")
    return hits / max(1, hits + _count(pairs, "no", "yes"))


def f1(pairs: list[dict[str, str]]) -> float:
    p, r = precision(pairs), recall(pairs)
    return 2 * p * r / (p + r) if p + r else 0.0


def yes_ratio(pairs: list[dict[str, str]]) -> float:
    return sum(pair["said"] == "yes" for pair in pairs) / max(1, len(pairs))
