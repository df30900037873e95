"""Asking a model POPE's questions, and scoring what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from .data import load_pope
from .models import DENSE, LoadedModel, check_methods, fill_prompt, load_model
from .report import check_output, count_questions, describe_method, describe_model, score, versions, write_results

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Answers:
    """What a model said.

    Attributes:
        texts: one answer for every row of the dataset.
        tokens: visual tokens per decoder layer, on average over the layers and the first batch.
        distinct: distinct (image, question) pairs, each of which was asked once.
        seconds: time it took, pictures included.
    """

    texts: list[str]
    tokens: float
    distinct: int
    seconds: float


@torch.inference_mode()
def answer_questions(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    prompt: str,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answers every question of a dataset greedily, asking each distinct (image, question) pair once.

    Args:
        model: dense or pruned.
        processor: writes a placeholder for every patch.
        dataset: with the columns of `load_pope`.
        prompt: as from `LoadedModel.prompt`.
        on_progress: called with the pairs answered and the pairs in all.

    Raises:
        ValueError: for a batch size below 1, a picture that cannot be decoded, a question with an image token.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: a positive number is allowed.")
    pairs = list(zip(dataset["image_source"], dataset["question"], strict=True))
    row_of = {source: row for row, (source, _) in enumerate(pairs)}
    # Questions about one picture stand together, so that it is decoded and preprocessed once.
    order = sorted(dict.fromkeys(pairs), key=lambda pair: pair[0])
    texts: dict[tuple[str, str], str] = {}
    tokens = None

    @lru_cache(maxsize=batch_size)
    def encoded(source: str) -> tuple[Tensor, int]:
        return _encode(processor, _picture(dataset, row_of[source]), model)

    start, paused = time.perf_counter(), 0.0
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        images = [encoded(source) for source, _ in batch]
        prompts = [
            fill_prompt(prompt, question, processor.image_token * placeholders)
            for (_, question), (_, placeholders) in zip(batch, images, strict=True)
        ]
        text = processor.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        inputs = {
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "pixel_values": torch.cat([pixels for pixels, _ in images]),
        }
        ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS)
        said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.update(zip(batch, (text.strip() for text in said), strict=True))
        if tokens is None:
            measured = time.perf_counter()
            tokens = mean_visual_tokens(model, inputs)
            paused = time.perf_counter() - measured
        if on_progress:
            on_progress(len(texts), len(order))
    seconds = time.perf_counter() - start - paused
    return Answers([texts[pair] for pair in pairs], tokens or 0.0, len(order), seconds)


def _picture(dataset: datasets.Dataset, row: int) -> Any:
    """The picture of a row, `(height, width)` as it is stored."""
    try:
        image = dataset[row]["image"]
        if image is None:
            raise ValueError("there is none")
        return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to.
        question = dataset.remove_columns("image")[row]
        raise ValueError(
            f"{question['category']} split, question {question['question_id']}: image {question['image_source']!r} "
            "cannot be decoded; a readable picture is allowed."
        ) from error


def _encode(processor: Any, image: Any, model: Any) -> tuple[Tensor, int]:
    """Pixel values `(1, 3, height, width)` of an image, and the number of placeholders that its prompt needs."""
    inputs = processor(images=[image], text=[processor.image_token], return_tensors="pt")
    placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
    return inputs["pixel_values"].to(model.device, model.dtype), placeholders


@torch.inference_mode()
def mean_visual_tokens(model: Any, inputs: dict[str, Tensor]) -> float:
    """Visual tokens after each decoder layer, averaged over layers and prompts, as the papers count.

    Args:
        inputs: `input_ids` and `attention_mask` `(batch, length)` and `pixel_values`, one image a prompt.

    Returns:
        all patches for a dense model, what enters the decoder for an encoder method, the measured mean otherwise.
    """
    patches = int((inputs["input_ids"] == model.config.image_token_id).sum()) / len(inputs["input_ids"])
    method = getattr(model.model, "sparsifier", None)
    if method is None:
        return patches
    if method.kind == "encoder":
        return float(method.tokens)
    layers = model.config.text_config.num_hidden_layers
    counts = torch.full((layers, len(inputs["input_ids"])), patches)
    for stage in model(**inputs, output_selection=True).selection:
        left = (stage.kept >= 0).sum(-1).tolist()
        if stage.merge_map is not None:
            left = [kept + len(row[row >= 0].unique()) for kept, row in zip(left, stage.merge_map, strict=True)]
        counts[stage.layer :] = torch.tensor(left, dtype=counts.dtype)
    return float(counts.mean())


def evaluate_pope(
    model: str | Path | LoadedModel | None = None,
    dataset: str | Path = "reference",
    methods: Sequence[str] = ("dense", "visionzip", "sparsevlm"),
    budget: int = 64,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    output: str | Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Evaluates methods on POPE, one after the other on the same weights.

    Args:
        model: a loaded model, or the name that `load_model` takes; None for the embedded reference model.
        dataset, limit: as for `load_pope`.
        methods: names of `llava_sparse.list_methods()`, and `"dense"`.
        budget: visual tokens retained, for all methods but dense.
        output: a JSON file, written anew after every method, so that a later failure loses nothing.
        on_progress: called with the method, the questions answered and the questions in all.
        loading: dtype, device and attn_implementation for `load_model`.

    Returns:
        what `output` holds: settings, versions, questions, and for every method its scores and every answer. Scores
        are from 0 to 1.

    Raises:
        ValueError: for invalid settings or data, before the first question is asked.
        OSError: for files that cannot be read or written.
    """
    methods = list(methods)
    check_methods(methods)
    if output is not None:
        check_output(output)
    questions = load_pope(dataset, limit)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, **loading)
    for method in methods:
        loaded.with_method(method, budget)

    prompt = loaded.prompt(short_answer=True)
    run = {"dataset": str(dataset), "methods": methods, "budget": budget, "limit": limit, "batch_size": batch_size}
    results: dict[str, Any] = {
        "settings": {**describe_model(loaded), **run, "prompt": prompt, "max_new_tokens": MAX_NEW_TOKENS},
        "versions": versions(),
        "questions": count_questions(questions),
        "methods": [],
    }
    for method in methods:
        pruned = loaded.with_method(method, budget)
        progress = None if on_progress is None else partial(on_progress, method)
        answers = answer_questions(pruned, loaded.processor, questions, prompt, batch_size, progress)
        results["methods"].append(
            {
                **describe_method(method, pruned, None if method == DENSE else budget),
                "visual_tokens": answers.tokens,
                "seconds": answers.seconds,
                "questions_per_second": answers.distinct / answers.seconds,
                **score(questions, answers.texts),
            }
        )
        if output is not None:
            write_results(results, output)
    return results
