"""Pictures of pruning: which patches a method keeps, merges and drops, and which words of the question decide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .drawing import Stage, Trace, draw
from .evaluation.files import check_output
from .evaluation.model import LoadedModel, ask, check_methods, fill_in, load_model
from .evaluation.plan import UNPRUNED
from .families import model_types
from .layouts import blocks
from .modeling.pruning_types import Selection
from .pictures import read_picture

FORMATS = (".png", ".svg", ".pdf")
Shown = str | Path | Image.Image


def visualize(
    model: str | Path | LoadedModel | None,
    image: Shown | Sequence[Shown],
    question: str,
    methods: Sequence[str] = ("visionzip", "sparsevlm"),
    budget: float = 64,
    prompt: str | None = None,
    video: bool = False,
) -> Figure:
    """Shows how methods prune what is shown for one question: a row for each method, a panel for each of its stages.

    Args:
        model: a loaded model, or the name that `load_model` takes; None for the embedded reference model.
        image: a picture or its file, several, or the frames of a video.
        methods: names of `llava_sparse.list_methods()`, and `"dense"`.
        budget: visual tokens retained, or a ratio of the dense model's, for all methods but dense.
        prompt: with `<image>` and `{question}`; None for the model's own.
        video: whether they are frames.

    Returns:
        a figure, for `savefig` or for a notebook to show.

    Raises:
        ValueError: for an unknown method, an invalid budget, prompt or question, an unreadable picture.
        OSError: for files that do not exist.
    """
    methods = list(methods)
    check_methods(methods)
    shown = [read_picture(x) for x in ([image] if isinstance(image, str | Path | Image.Image) else image)]
    loaded = model if isinstance(model, LoadedModel) else load_model(model, model_types=model_types())
    return draw(question, [trace(loaded, shown, question, method, budget, prompt, video) for method in methods])


def check_figure_output(path: str | Path) -> None:
    """Checks, before anything is computed, that a figure can be written to a file.

    Raises:
        ValueError: for a name that does not end in .png, .svg or .pdf.
        OSError: if the folder does not exist, or the path is a folder.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a name that ends in {', '.join(FORMATS)} is allowed for a figure.")
    check_output(path)


@torch.inference_mode()
def trace(
    loaded: LoadedModel,
    shown: Sequence[Image.Image],
    question: str,
    method: str,
    budget: float | None = None,
    prompt: str | None = None,
    video: bool = False,
    drawn: bool = True,
    max_new_tokens: int = 128,
) -> Trace:
    """Asks a model about pictures, or about one video, and records what was pruned on the way.

    Args:
        shown: pictures as of `read_picture`, or frames.
        method: a method, or dense.
        budget: visual tokens retained, or a ratio of the dense model's; without meaning for dense.
        prompt: with `<image>` and `{question}`; None for the model's own.
        drawn: whether the trace is to be drawn; without, it has no blocks.
        max_new_tokens: of the answer.

    Raises:
        ValueError: for an unknown method, an invalid budget, prompt or question; to be drawn, also for a processor
            whose settings do not tell where the visual tokens lie.
    """
    model, processor = loaded.with_method(method, budget), loaded.processor
    prompt = loaded.prompt(False, len(shown), video) if prompt is None else prompt
    answer = ask(model, processor, shown, question, prompt, max_new_tokens, video)
    text, inputs = fill_in(model, processor, shown, question, prompt, video)
    token = processor.video_token if video else processor.image_token
    ids = inputs["input_ids"][0]
    visual = (ids == processor.tokenizer.convert_tokens_to_ids(token)).nonzero().flatten()
    tokens, behind = len(visual), text.rindex(token) + len(token)
    sparsifier = None if method in UNPRUNED else model.model.sparsifier
    if sparsifier is None:
        layout = blocks(model, processor, inputs, shown, video, tokens) if drawn else []
        return Trace(method, answer, tokens, layout, (), text[behind:], ())
    outputs = model(**inputs, logits_to_keep=1, output_selection=True)
    selection = outputs.selection
    numbers = selection[0].scores.shape[1]
    layout = blocks(model, processor, inputs, shown, video, numbers) if drawn else []
    raters: tuple[tuple[int, int], ...] = ()
    if selection[0].raters is not None:
        columns = selection[0].raters[0].unique().cpu()
        raters = _pieces(processor.tokenizer, text, behind, len(ids), columns[columns > visual[-1].cpu()])
    entering = int(outputs.visual_tokens[0, 0])
    return Trace(method, answer, tokens, layout, follow(selection, sparsifier, entering), text[behind:], raters)


def _pieces(tokenizer: Any, text: str, behind: int, length: int, columns: Tensor) -> tuple[tuple[int, int], ...]:
    """Start and end in `text[behind:]` of some of the `length` tokens that a processor made of a text.

    What it put in for placeholders is in front of them, so that they are counted from the end.
    """
    if not tokenizer.is_fast:
        return ()
    offsets = tokenizer([text], return_offsets_mapping=True)["offset_mapping"][0]
    pieces = [offsets[column - length] for column in columns.tolist()]
    return tuple((start - behind, end - behind) for start, end in pieces if start >= behind)


def follow(selections: Sequence[Selection], sparsifier: Any, entering: int) -> tuple[Stage, ...]:
    """What has become of every visual token after each stage of a prompt.

    Args:
        selections: the stages, one row each.
        sparsifier: the method that made them.
        entering: visual tokens that the decoder is given, those without a number included.
    """
    encoder = sparsifier.encoder
    owners = np.arange(selections[0].scores.shape[1])
    stages: list[Stage] = []
    for selection in selections:
        chosen = selection.kept[0][selection.kept[0] >= 0].cpu().numpy()
        kept = np.isin(owners, chosen)
        into = np.full_like(owners, -1)
        if selection.merge_map is not None:
            merge_map = selection.merge_map[0].cpu().numpy()
            into[owners >= 0] = merge_map[owners[owners >= 0]]
        known = owners
        owners = np.where(kept & (owners >= 0), owners, into)
        in_decoder = encoder is None or bool(stages)
        place = f"after {'decoder' if in_decoder else 'encoder'} layer {selection.layer}"
        if not in_decoder and encoder.place == "projector":
            place = "behind the projector"
        stage = Stage(place, owners, int((~np.isin(chosen, known)).sum()))
        if not in_decoder:
            stage = Stage(place, owners, entering - stage.tokens)
        stages.append(stage)
    return tuple(stages)
