"""Drawing what pruning did to a picture: plain data in, a figure out."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, HPacker, OffsetBox, TextArea, VPacker
from matplotlib.patches import Patch
from numpy.typing import NDArray

# Okabe and Ito's colours, which readers tell apart whatever their colour vision.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
RATER, INK, FAINT = "#FFD34D", "#1A1A1A", "#555555"
# Inches.
PANEL, GAP, MARGIN, LINE = 2.6, 0.14, 0.2, 0.22
LETTERS_PER_INCH = 13
RATERS_LABEL = "raters, marked:"

Array = NDArray[Any]


@dataclass(frozen=True)
class Stage:
    """What is left of the picture after a stage.

    Attributes:
        place: where it acts, in words.
        owners: `(patches,)` int64, what each patch has become: itself (its own number) where it is kept, the number of
            a merged token (`patches` or more), -1 where it is dropped.
        cls: whether CLS is left, too.
    """

    place: str
    owners: Array
    cls: bool

    @property
    def kept(self) -> Array:
        """`(patches,)` bool: the patches that are tokens of their own."""
        return self.owners == np.arange(len(self.owners))

    @property
    def merged(self) -> Array:
        """Numbers of the merged tokens, ascending."""
        return np.unique(self.owners[self.owners >= len(self.owners)])

    @property
    def tokens(self) -> int:
        """Visual tokens that are left."""
        return int(self.kept.sum()) + len(self.merged) + self.cls


@dataclass(frozen=True)
class Trace:
    """What a method did with a picture and a question.

    Attributes:
        method: its name, or dense.
        answer: what the model said.
        tokens: visual tokens of the dense model.
        stages: none for a dense model.
        text: what follows the picture in the prompt.
        raters: start and end of the pieces of `text` that rate the visual tokens; none where no text does, or where a
            tokenizer cannot tell which piece a token stands for.
    """

    method: str
    answer: str
    tokens: int
    stages: tuple[Stage, ...]
    text: str
    raters: tuple[tuple[int, int], ...]

    @property
    def flow(self) -> str:
        """Visual tokens before the first stage and after each."""
        return " → ".join(str(n) for n in (self.tokens, *(stage.tokens for stage in self.stages)))


def draw(picture: Array, question: str, traces: Sequence[Trace]) -> Figure:
    """Draws what methods did with a picture.

    Args:
        picture: `(height, width, 3)` uint8, as the model sees it, under a square grid of patches.
        traces: one for each method.
    """
    panels = max(2, 1 + max((len(t.stages) for t in traces), default=0))
    width = 2 * MARGIN + panels * PANEL + (panels - 1) * GAP
    letters = int(LETTERS_PER_INCH * (width - 2 * MARGIN))
    title = textwrap.wrap(f"“{' '.join(question.split())}”", letters * 3 // 4)
    rows = [_Row(t, _answer(t, letters), _rated(t, letters), bool(t.stages) or len(traces) == 1) for t in traces]
    columns = 1 if panels == 2 else 2
    legend = _legend(traces)
    height = 2 * MARGIN + (1.3 * len(title) + 1 + len(legend) / columns) * LINE + sum(row.height for row in rows)
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        page = _Page(Figure(figsize=(width, height), facecolor="white"), width, height)
        page.write(MARGIN, _block([_text(line, 13, weight="bold") for line in title]))
        y = MARGIN + 1.3 * len(title) * LINE
        for row in rows:
            _draw_row(page, y, picture, row)
            y += row.height
        page.figure.legend(
            handles=legend,
            loc="lower left",
            bbox_to_anchor=(MARGIN / width, MARGIN / height),
            ncols=columns,
            fontsize=8.5,
            frameon=False,
            borderaxespad=0,
            borderpad=0,
        )
    return page.figure


# A word, in pieces that rate or do not.
Word = list[tuple[str, bool]]


@dataclass(frozen=True)
class _Row:
    """A trace, its answer and its text broken into lines, and whether it has panels.

    A dense model has none below others, whose first panel is all that it would show.
    """

    trace: Trace
    answer: list[str]
    text: list[list[Word]]
    panels: bool

    @property
    def words_height(self) -> float:
        return (1.5 + len(self.answer) + 1.2 * len(self.text)) * LINE

    @property
    def height(self) -> float:
        return self.words_height + 0.5 * LINE + self.panels * (PANEL + 1.8 * LINE)


@dataclass(frozen=True)
class _Page:
    """A figure addressed in inches from its top left corner."""

    figure: Figure
    width: float
    height: float

    def write(self, y: float, box: OffsetBox) -> None:
        place = (MARGIN / self.width, 1 - y / self.height)
        self.figure.add_artist(
            AnnotationBbox(box, place, xycoords="figure fraction", box_alignment=(0, 1), frameon=False, pad=0)
        )

    def panel(self, column: int, y: float, title: str) -> Axes:
        x = MARGIN + column * (PANEL + GAP)
        place = (x / self.width, 1 - (y + PANEL) / self.height, PANEL / self.width, PANEL / self.height)
        axes = self.figure.add_axes(place, xticks=[], yticks=[])
        axes.set_title(title, fontsize=8.5, color=INK, loc="left", pad=3)
        return axes


def _line(boxes: list[Artist], sep: float = 4) -> HPacker:
    return HPacker(children=boxes, sep=sep, pad=0, align="baseline")


def _block(boxes: list[Artist]) -> VPacker:
    return VPacker(children=boxes, sep=4, pad=0)


def _text(text: str, size: float, **style: Any) -> TextArea:
    return TextArea(text, textprops={"fontsize": size, "color": INK, **style})


def _answer(t: Trace, letters: int) -> list[str]:
    answer = f"answer: {' '.join(t.answer.split()) or '(empty)'}"
    return textwrap.wrap(answer, letters * 9 // 10, max_lines=6, placeholder=" …")


def _rated(t: Trace, letters: int) -> list[list[Word]]:
    """The text of a trace in lines of words; no lines where nothing rates."""
    if not t.raters:
        return []
    rates = np.zeros(len(t.text), bool)
    for start, end in t.raters:
        rates[start:end] = True
    lines: list[list[Word]] = [[]]
    used = len(RATERS_LABEL) + 2
    for found in re.finditer(r"\S{1,40}", t.text):
        if used + len(found[0]) > letters:
            lines.append([])
            used = 0
        used += len(found[0]) + 2
        pieces = groupby(range(*found.span()), key=lambda i: bool(rates[i]))
        lines[-1].append([("".join(t.text[i] for i in group), rating) for rating, group in pieces])
    return lines


def _draw_row(page: _Page, y: float, picture: Array, row: _Row) -> None:
    t = row.trace
    heading: list[Artist] = [
        _text(t.method, 11, weight="bold"),
        _text(f"visual tokens: {t.flow}", 9.5, color=FAINT),
    ]
    boxes: list[Artist] = [_line(heading, sep=14), *(_text(line, 10) for line in row.answer)]
    for number, line in enumerate(row.text):
        words: list[Artist] = [_line([_piece(*p) for p in word], sep=0) for word in line]
        boxes.append(_line(words if number else [_text(RATERS_LABEL, 9, color=FAINT), *words]))
    page.write(y + 0.5 * LINE, _block(boxes))
    if not row.panels:
        return
    y += row.words_height + 1.8 * LINE
    page.panel(0, y, f"what the model sees\n{t.tokens} tokens").imshow(picture)
    for column, stage in enumerate(t.stages, start=1):
        parts = [f"{stage.kept.sum()} kept", f"{len(stage.merged)} merged" if len(stage.merged) else ""]
        parts.append("CLS" if stage.cls else "")
        axes = page.panel(column, y, f"{stage.place}\n{' + '.join(part for part in parts if part)}")
        _draw_stage(axes, picture, stage.owners)


def _piece(text: str, rates: bool) -> TextArea:
    box = {"facecolor": RATER, "edgecolor": "none", "pad": 1.2}
    return _text(text, 9, weight="bold", bbox=box) if rates else _text(text, 9)


def _draw_stage(axes: Axes, picture: Array, owners: Array) -> None:
    """Kept patches as they are, merged ones in the colour of their token, dropped ones pale."""
    side = round(len(owners) ** 0.5)
    grid = owners.reshape(side, side)
    height, width = (size // side * side for size in picture.shape[:2])
    shape = (height // side, width // side)
    seen = picture[:height, :width] / 255
    large = np.kron(grid, np.ones(shape, int))
    pale = 0.8 + 0.2 * seen.mean(-1, keepdims=True)
    shown = np.where((large == -1)[..., None], np.broadcast_to(pale, seen.shape), seen)
    for token, colour in _coloured(grid).items():
        shown[large == token] = (0.5 * np.array(to_rgb(colour)) + 0.5 * pale)[large == token]
    axes.imshow(shown)
    kept = grid == np.arange(grid.size).reshape(grid.shape)
    for area, colour, line in ((grid * ~kept, FAINT, 0.3), (kept, "black", 1.5)):
        axes.add_collection(LineCollection(_borders(area) * shape[::-1] - 0.5, colors=colour, linewidths=line))


def _borders(area: Array) -> Array:
    """The lines between cells of a grid that differ, `(lines, 2, 2)`: their ends as x and y in cells."""
    beside, below = np.argwhere(area[:, 1:] != area[:, :-1]), np.argwhere(area[1:] != area[:-1])
    lines = [[(x + 1, y), (x + 1, y + 1)] for y, x in beside] + [[(x, y + 1), (x + 1, y + 1)] for y, x in below]
    return np.array(lines, float).reshape(-1, 2, 2)


def _coloured(grid: Array) -> dict[int, str]:
    """A colour for each merged token of a square grid of owners, another than those of its neighbours if possible."""
    pairs = np.concatenate(
        [np.stack([grid[:, 1:], grid[:, :-1]], -1).reshape(-1, 2), np.stack([grid[1:], grid[:-1]], -1).reshape(-1, 2)]
    )
    colours: dict[int, str] = {}
    tokens, sizes = np.unique(grid[grid >= grid.size], return_counts=True)
    for token in tokens[np.argsort(-sizes, kind="stable")].tolist():
        beside = [colours.get(a + b - token) for a, b in pairs[(pairs == token).any(1)].tolist()]
        used = list(colours.values())
        colours[token] = min(COLOURS, key=lambda colour: (beside.count(colour), used.count(colour)))
    return colours


def _legend(traces: Sequence[Trace]) -> list[Patch]:
    """What occurs in a drawing, with its colour."""
    stages = [stage for t in traces for stage in t.stages]
    entries = []
    if stages:
        entries.append(Patch(facecolor="#8FA9BF", edgecolor="black", linewidth=1.5, label="kept (dominant)"))
    if any(len(stage.merged) for stage in stages):
        label = "merged (contextual, recycled): a colour for each token, repeated"
        entries.append(Patch(facecolor=COLOURS[1], edgecolor=FAINT, linewidth=0.3, label=label))
    if any((stage.owners == -1).any() for stage in stages):
        entries.append(Patch(facecolor="#E4E4E4", edgecolor=FAINT, linewidth=0.3, label="dropped"))
    if any(t.raters for t in traces):
        entries.append(Patch(facecolor=RATER, label="rater: its attention scores the patches"))
    return entries
