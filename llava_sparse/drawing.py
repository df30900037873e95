"""Drawing what pruning did to a picture: plain data in, a figure out."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isqrt
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
# Of blocks' height: what is between them; of `PANEL`: widths of panels. Grey of newlines.
SPACE, NARROWEST, WIDEST, NEWLINE = 0.04, 0.75, 2.2, 0.45
LETTERS_PER_INCH = 13
RATERS_LABEL = "raters, marked:"

Array = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """A grid of visual tokens over what the model sees there: a picture, its tiles, a frame.

    Attributes:
        pixels: `(height, width, 3)` uint8.
        numbers: `(rows, columns)` int64, the number of each token.
        ends: `(rows,)` int64, of the newline behind each row, -1 for none; None where there are no newlines.
        share: of the picture, how much of it the model sees there.
    """

    pixels: Array
    numbers: Array
    ends: Array | None = None
    share: float = 1.0

    @property
    def cells(self) -> Array:
        """`numbers` with `ends` as a further column."""
        return self.numbers if self.ends is None else np.column_stack([self.numbers, self.ends])

    @property
    def edges(self) -> tuple[Array, Array]:
        """Where rows and columns of `cells` begin and end, in pixels; a newline is half as wide as a patch."""
        (height, width), (rows, columns) = self.pixels.shape[:2], self.numbers.shape
        across = np.linspace(0, width, columns + 1).round().astype(int)
        across = across if self.ends is None else np.append(across, width + max(1, width // columns // 2))
        return np.linspace(0, height, rows + 1).round().astype(int), across

    @property
    def aspect(self) -> float:
        """Width over height."""
        down, across = self.edges
        return across[-1] / down[-1]


@dataclass(frozen=True)
class Stage:
    """What is left of what is shown after a stage.

    Attributes:
        place: where it acts, in words.
        owners: `(numbers,)` int64, what each visual token has become: itself (its own number) where it is kept, the
            number of a merged token (`numbers` or more), -1 where it is dropped.
        unnumbered: CLS tokens that are left and have no number.
    """

    place: str
    owners: Array
    unnumbered: int = 0

    @property
    def kept(self) -> Array:
        """`(numbers,)` bool: what is a token of its own."""
        return self.owners == np.arange(len(self.owners))

    @property
    def merged(self) -> Array:
        """Numbers of the merged tokens, ascending."""
        return np.unique(self.owners[self.owners >= len(self.owners)])

    @property
    def tokens(self) -> int:
        """Visual tokens that are left."""
        return int(self.kept.sum()) + len(self.merged) + self.unnumbered


@dataclass(frozen=True)
class Trace:
    """What a method did with pictures, or a video, and a question.

    Attributes:
        method: its name, or dense.
        answer: what the model said.
        tokens: visual tokens of the dense model.
        blocks: what the model sees, numbered as the method does.
        stages: none for a dense model.
        text: what follows the pictures in the prompt.
        raters: start and end of the pieces of `text` that rate the visual tokens; none where no text does, or where a
            tokenizer cannot tell which piece a token stands for.
    """

    method: str
    answer: str
    tokens: int
    blocks: Sequence[Block]
    stages: tuple[Stage, ...]
    text: str
    raters: tuple[tuple[int, int], ...]

    @property
    def flow(self) -> str:
        """Visual tokens before the first stage and after each."""
        return " → ".join(str(n) for n in (self.tokens, *(stage.tokens for stage in self.stages)))


def draw(question: str, traces: Sequence[Trace]) -> Figure:
    """Draws what methods did with what is shown, one trace for each."""
    panels = max(2, 1 + max((len(t.stages) for t in traces), default=0))
    aspects = [_arranged(t.blocks)[1] for t in traces] or [1.0]
    across = PANEL * min(max(*aspects, NARROWEST), WIDEST)
    down = min(PANEL, across / min(aspects))
    width = 2 * MARGIN + panels * across + (panels - 1) * GAP
    letters = int(LETTERS_PER_INCH * (width - 2 * MARGIN))
    title = textwrap.wrap(f"“{' '.join(question.split())}”", letters * 3 // 4)
    alone = len(traces) == 1
    rows = [_Row(t, _answer(t, letters), _rated(t, letters), down if t.stages or alone else 0) for t in traces]
    columns = 1 if panels == 2 else 2
    legend = _legend(traces)
    height = 2 * MARGIN + (1.3 * len(title) + 1 + len(legend) / columns) * LINE + sum(row.height for row in rows)
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        page = _Page(Figure(figsize=(width, height), facecolor="white"), width, height, across)
        page.write(MARGIN, _block([_text(line, 13, weight="bold") for line in title]))
        y = MARGIN + 1.3 * len(title) * LINE
        for row in rows:
            _draw_row(page, y, row)
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
    """A trace, its answer and its text broken into lines, and the height of its panels.

    A dense model has none, 0, below others, whose first panel is all that it would show.
    """

    trace: Trace
    answer: list[str]
    text: list[list[Word]]
    panels: float

    @property
    def words_height(self) -> float:
        return (1.5 + len(self.answer) + 1.2 * len(self.text)) * LINE

    @property
    def height(self) -> float:
        return self.words_height + 0.5 * LINE + (self.panels + 1.8 * LINE) * bool(self.panels)


@dataclass(frozen=True)
class _Page:
    """A figure addressed in inches from its top left corner."""

    figure: Figure
    width: float
    height: float
    panel_width: float

    def write(self, y: float, box: OffsetBox) -> None:
        place = (MARGIN / self.width, 1 - y / self.height)
        self.figure.add_artist(
            AnnotationBbox(box, place, xycoords="figure fraction", box_alignment=(0, 1), frameon=False, pad=0)
        )

    def panel(self, column: int, y: float, height: float, title: str) -> Axes:
        x = MARGIN + column * (self.panel_width + GAP)
        place = (x / self.width, 1 - (y + height) / self.height, self.panel_width / self.width, height / self.height)
        axes = self.figure.add_axes(place, xticks=[], yticks=[], anchor="NW")
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


def _draw_row(page: _Page, y: float, row: _Row) -> None:
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
    share = np.mean([block.share for block in t.blocks])
    whole = "" if share > 0.995 else f", {100 * share:.0f} % of it"
    panels: list[tuple[str, Array | None]] = [(f"what the model sees{whole}\n{t.tokens} tokens", None)]
    panels += [(f"{stage.place}\n{_count(t.blocks, stage)}", stage.owners) for stage in t.stages]
    for column, (title, owners) in enumerate(panels):
        _draw_blocks(page.panel(column, y, row.panels, title), t.blocks, owners)


def _count(blocks: Sequence[Block], stage: Stage) -> str:
    """What is left, of each kind."""
    patches, ends = (_kept_in(stage, numbers) for numbers in (_all(b.numbers for b in blocks), _newlines(blocks)))
    cls = int(stage.kept.sum()) - patches - ends + stage.unnumbered
    parts = [f"{patches} kept", *([f"{len(stage.merged)} merged"] if len(stage.merged) else [])]
    parts += [f"{cls} CLS" if cls > 1 else "CLS"] * (cls > 0) + [f"{ends} newline{'s' * (ends > 1)}"] * (ends > 0)
    return " + ".join(parts)


def _all(numbers: Iterable[Array]) -> Array:
    return np.concatenate([np.zeros(0, int), *(x.ravel() for x in numbers)])


def _newlines(blocks: Sequence[Block]) -> Array:
    ends = _all(block.ends for block in blocks if block.ends is not None)
    return ends[ends >= 0]


def _kept_in(stage: Stage, numbers: Array) -> int:
    return int(stage.kept[numbers].sum())


def _piece(text: str, rates: bool) -> TextArea:
    box = {"facecolor": RATER, "edgecolor": "none", "pad": 1.2}
    return _text(text, 9, weight="bold", bbox=box) if rates else _text(text, 9)


def _arranged(blocks: Sequence[Block]) -> tuple[list[tuple[float, float]], float]:
    """Left upper corners of blocks of height 1, a few in a row, and the width of all over their height."""
    rows = -(-len(blocks) // max(1, isqrt(2 * len(blocks))))
    columns = -(-len(blocks) // rows)
    corners, widths = [], []
    for row in range(rows):
        x = 0.0
        for block in blocks[row * columns : (row + 1) * columns]:
            corners.append((x, row * (1 + SPACE)))
            x += block.aspect + SPACE
        widths.append(x - SPACE)
    return corners, max(widths) / (rows * (1 + SPACE) - SPACE)


def _draw_blocks(axes: Axes, blocks: Sequence[Block], owners: Array | None) -> None:
    """Kept tokens as they are, merged ones in the colour of their token, dropped ones pale; all as they are of None."""
    corners, _ = _arranged(blocks)
    grids = [block.cells if owners is None else np.where(block.cells < 0, -1, owners[block.cells]) for block in blocks]
    colours = {} if owners is None else _coloured(grids, len(owners))
    for (x, y), block, grid in zip(corners, blocks, grids, strict=True):
        down, across = block.edges
        scale = 1 / down[-1]
        end = across[-1] - block.pixels.shape[1]
        seen = np.pad(block.pixels / 255, ((0, 0), (0, end), (0, 0)), constant_values=NEWLINE)
        large = grid.repeat(np.diff(down), axis=0).repeat(np.diff(across), axis=1)
        if owners is not None:
            pale = 0.8 + 0.2 * seen.mean(-1, keepdims=True)
            seen = np.where((large == -1)[..., None], np.broadcast_to(pale, seen.shape), seen)
            for token in set(np.unique(grid).tolist()) & colours.keys():
                seen[large == token] = (0.5 * np.array(to_rgb(colours[token])) + 0.5 * pale)[large == token]
        seen[(block.cells < 0).repeat(np.diff(down), axis=0).repeat(np.diff(across), axis=1)] = 1
        axes.imshow(seen, extent=(x, x + block.aspect, y + 1, y))
        kept = (grid == block.cells) & (grid >= 0)
        for area, colour, line in ((grid * ~kept, FAINT, 0.3), (kept, "black", 1.5)) if owners is not None else ():
            lines = _borders(area)
            ends = np.stack([x + scale * across[lines[..., 0]], y + scale * down[lines[..., 1]]], -1)
            axes.add_collection(LineCollection(list(ends), colors=colour, linewidths=line))
    axes.set_xlim(0, max(x + block.aspect for (x, _), block in zip(corners, blocks, strict=True)))
    axes.set_ylim(max(y for _, y in corners) + 1, 0)
    axes.spines[:].set_visible(False)


def _borders(area: Array) -> Array:
    """The lines between cells of a grid that differ, `(lines, 2, 2)` int64: their ends as x and y in cells."""
    beside, below = np.argwhere(area[:, 1:] != area[:, :-1]), np.argwhere(area[1:] != area[:-1])
    lines = [[(x + 1, y), (x + 1, y + 1)] for y, x in beside] + [[(x, y + 1), (x + 1, y + 1)] for y, x in below]
    return np.array(lines, int).reshape(-1, 2, 2)


def _coloured(grids: Sequence[Array], first: int) -> dict[int, str]:
    """A colour for each merged token, `first` or more, of grids of owners: not its neighbours' if possible."""
    pairs = np.concatenate(
        [np.stack([a, b], -1).reshape(-1, 2) for g in grids for a, b in ((g[:, 1:], g[:, :-1]), (g[1:], g[:-1]))]
    )
    colours: dict[int, str] = {}
    every = _all(grids)
    tokens, sizes = np.unique(every[every >= first], return_counts=True)
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
    if any(len(_newlines(t.blocks)) for t in traces):
        entries.append(Patch(facecolor=str(NEWLINE), edgecolor=FAINT, linewidth=0.3, label="newline, behind a row"))
    if any(t.raters for t in traces):
        entries.append(Patch(facecolor=RATER, label="rater: its attention scores the patches"))
    return entries
