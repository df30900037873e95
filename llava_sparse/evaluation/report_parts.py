"""What a report is made of, as plain data that every template can write."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from llava_sparse.pictures import read_picture
from llava_sparse.preprocessing import parts

from .failures import Objects, Pair
from .figures import theme
from .results import Entry, Results
from .tables import Table
from .tasks.rows import file_inside

THUMBNAIL = 168
# LLaVA-1.5's checkpoints in transformers' form.
MIDDLE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_center_crop": True}


@dataclass(frozen=True)
class Source:
    """Results, with what is known beside them.

    Attributes:
        name: of the file.
        results: as from `read_results`, with the timing beside them.
        kept: packed masks of each stage for each pair, by run, as far as the log beside the results has them;
            `no_kept` says why some are missing.
        objects, images: boxes, and the folder of the pictures; None if unknown.
    """

    name: str
    results: Results
    kept: Mapping[str, Mapping[Pair, Sequence[str]]]
    no_kept: str
    objects: Objects | None
    images: Path | None

    @property
    def entries(self) -> Sequence[Entry]:
        """The runs."""
        return self.results.methods


@dataclass(frozen=True)
class Drawing:
    """A figure; `draw` is called with the keyword `dark`."""

    draw: Callable[..., Figure]
    alt: str
    caption: str

    @property
    def light(self) -> str:
        """The figure for light pages, as a data URI."""
        return self._svg(dark=False)

    @property
    def dark(self) -> str:
        """The figure for dark pages, as a data URI."""
        return self._svg(dark=True)

    def _svg(self, dark: bool) -> str:
        out = io.BytesIO()
        with theme(dark):
            self.draw(dark=dark).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        return data_uri("image/svg+xml", out.getvalue())


@dataclass(frozen=True)
class Shot:
    """What a run answers, and as a data URI, if there is one, the picture with the patches it keeps."""

    run: str
    answer: str
    right: bool
    picture: str
    alt: str


@dataclass(frozen=True)
class Example:
    """A question that runs answer differently."""

    image: str
    question: str
    label: str
    shots: Sequence[Shot]


@dataclass
class Section:
    """A part of a report.

    Attributes:
        drawings: in groups that stand together.
        listed: lines of a list.
        left_out: what is missing, and why.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    drawings: list[list[Drawing]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Article:
    """The report on one results file."""

    name: str
    summary: str
    sections: Sequence[Section]


def data_uri(kind: str, content: bytes) -> str:
    """The content as a `data:` URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(
    folder: Path, name: str, masks: Sequence[NDArray[np.bool_]], preprocessing: Mapping[str, Any] | None = None
) -> str:
    """A small picture, as the model sees it, as a data URI; patches are the paler, the earlier they stop being tokens.

    Args:
        folder, name: of the picture.
        masks: `(patches,)` of each stage.
        preprocessing: as `preprocessing.recorded` gives it; None, as in files of earlier versions: the middle square.

    Raises:
        ValueError: if the name leaves the folder, or is no picture that can be read.
    """
    file = file_inside(folder.resolve(), name)
    whole = read_picture(file)
    seen = parts(MIDDLE if preprocessing is None else preprocessing, whole.size)[0]
    picture = np.asarray(Image.fromarray(seen.see(whole)).resize((THUMBNAIL, THUMBNAIL)), float)
    if masks:
        side = round(len(masks[0]) ** 0.5)
        left = Image.fromarray(np.mean(masks, axis=0).reshape(side, side).astype(np.float32))
        share = np.asarray(left.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST))[..., None]
        pale = 205 + 0.2 * picture.mean(-1, keepdims=True)
        picture = share * picture + (1 - share) * pale
    out = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return data_uri("image/jpeg", out.getvalue())


def by_budget(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Runs of each budget with the dense model, so that no figure has too many lines, and words that name them."""
    budgets = sorted({entry.budget for entry in entries if entry.budget is not None})
    if len(budgets) < 2:
        return [("", list(entries))]
    return [(f", budget {b}", [entry for entry in entries if entry.budget in (None, b)]) for b in budgets]
