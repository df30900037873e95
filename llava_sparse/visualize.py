"""Pictures of pruning: which patches a method keeps, merges and drops, and which words of the question decide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from .drawing import Array, Stage, Trace, draw
from .evaluation.models import DENSE, LoadedModel, ask, check_methods, fill_prompt, load_model
from .evaluation.report import check_output
from .modeling.pruning_types import Selection
from .pictures import read_picture

FORMATS = (".png", ".svg", ".pdf")


def visualize(
    model: str | Path | LoadedModel | None,
    image: str | Path | Image.Image,
    question: str,
    methods: Sequence[str] = ("visionzip", "sparsevlm"),
    budget: float = 64,
) -> Figure:
    """Shows how methods prune one picture for one question: a row for each method, a panel for each of its stages.

    Args:
        model: a loaded model, or the name that `load_model` takes; None for the embedded reference model.
        image: a picture or its file.
        methods: names of `llava_sparse.list_methods()`, and `"dense"`.
        budget: visual tokens retained, or a ratio of the patches, for all methods but dense.

    Returns:
        a figure, for `savefig` or for a notebook to show.

    Raises:
        ValueError: for an unknown method, an invalid budget, a question with an image token, an unreadable picture.
        OSError: for files that do not exist.
    """
    methods = list(methods)
    check_methods(methods)
    picture = read_picture(image)
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    traces = [trace(loaded, picture, question, method, budget) for method in methods]
    return draw(model_view(loaded.processor, picture), question, traces)


def check_figure_output(path: str | Path) -> None:
    """Checks, before anything is computed, that a figure can be written to a file.

    Raises:
        ValueError: for a name that does not end in .png, .svg or .pdf.
        OSError: if the folder does not exist, or the path is a folder.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a name that ends in {', '.join(FORMATS)} is allowed for a figure.")
    check_output(path)


def model_view(processor: Any, picture: Image.Image) -> Array:
    """The part of a picture that a model sees, at its resolution: `(height, width, 3)` uint8."""
    seen = processor.image_processor(images=picture, do_normalize=False, do_rescale=False, return_tensors="pt")
    return seen["pixel_values"][0].permute(1, 2, 0).round().clip(0, 255).byte().cpu().numpy()


@torch.inference_mode()
def trace(loaded: LoadedModel, picture: Image.Image, question: str, method: str, budget: float | None = None) -> Trace:
    """Asks a model about a picture, and records what was pruned on the way.

    Args:
        method: a method, or dense.
        budget: visual tokens retained, or a ratio of the patches; without meaning for dense.

    Raises:
        ValueError: for an unknown method, an invalid budget, a question with an image token.
    """
    model, processor = loaded.with_method(method, budget), loaded.processor
    prompt = loaded.prompt(short_answer=False)
    answer = ask(model, processor, picture, question, prompt)
    alone = processor(images=[picture], text=[processor.image_token], return_tensors="pt")
    tokens = int((alone["input_ids"] == processor.image_token_id).sum())
    placeholders = processor.image_token * tokens
    text = fill_prompt(prompt, question, placeholders)
    start = text.index(placeholders) + len(placeholders)
    sparsifier = None if method == DENSE else model.model.sparsifier
    if sparsifier is None:
        return Trace(method, answer, tokens, (), text[start:], ())

    knows_text = processor.tokenizer.is_fast
    tokenized = processor.tokenizer([text], return_offsets_mapping=knows_text, return_tensors="pt")
    selection = model(
        input_ids=tokenized["input_ids"].to(model.device),
        attention_mask=tokenized["attention_mask"].to(model.device),
        pixel_values=alone["pixel_values"].to(model.device, model.dtype),
        logits_to_keep=1,
        output_selection=True,
    ).selection
    raters: tuple[tuple[int, int], ...] = ()
    if knows_text and selection[0].raters is not None:
        columns = selection[0].raters[0].unique().cpu()
        pieces = tokenized["offset_mapping"][0][columns[columns >= 0]].tolist()
        raters = tuple((a - start, b - start) for a, b in pieces if a >= start)
    stages = follow(selection, sparsifier, tokens, model.model.patches_per_image)
    return Trace(method, answer, tokens, stages, text[start:], raters)


def follow(selections: Sequence[Selection], sparsifier: Any, tokens: int, patches: int) -> tuple[Stage, ...]:
    """What has become of every patch after each stage of a prompt with one image.

    Args:
        selections: the stages, one row each.
        sparsifier: the method that made them.
        tokens: visual tokens of the dense model, one more than `patches` where CLS is fed to the decoder.
    """
    encoder = sparsifier.encoder
    # Decoder methods alone number the tokens that enter the decoder.
    cls = 0 if encoder is not None else tokens - patches
    owners = np.arange(cls + patches)
    stages: list[Stage] = []
    for selection in selections:
        kept = np.isin(owners, selection.kept[0].cpu().numpy())
        into = np.full_like(owners, -1)
        if selection.merge_map is not None:
            merge_map = selection.merge_map[0].cpu().numpy()
            into[owners >= 0] = merge_map[owners[owners >= 0]]
        owners = np.where(kept & (owners >= 0), owners, into)
        in_decoder = encoder is None or bool(stages)
        place = f"after {'decoder' if in_decoder else 'encoder'} layer {selection.layer}"
        if not in_decoder and encoder.place == "projector":
            place = "behind the projector"
        stage = Stage(place, np.maximum(owners[cls:] - cls, -1), bool(cls) and owners[0] == 0)
        if not in_decoder and stage.tokens + 1 == encoder.tokens:
            stage = Stage(place, stage.owners, True)
        stages.append(stage)
    return tuple(stages)
