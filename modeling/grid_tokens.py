"""Uniform grid and average pooling: the controls that look at nothing but places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sparsifier import EncoderSparsifier, Images, Reduced
from .tensors import cluster_mean, to_float

PAPER = "a control, as in Token Pruning in Multimodal LLMs: Are We Solving the Right Problem? (arXiv 2502.11501)"


def grid_of(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image."""
    rows = round((patches * height / width) ** 0.5)
    return rows, patches // rows


def bands(tokens: int, rows: int, columns: int) -> list[int]:
    """Into how many cells each band of the grid is divided: bands and cells as square as `tokens` cells allow."""
    count = round((tokens * rows / columns) ** 0.5)
    count = min(rows, tokens, max(1, count, -(-tokens // columns)))
    return [(band + 1) * tokens // count - band * tokens // count for band in range(count)]


def grid_patches(tokens: int, rows: int, columns: int) -> list[int]:
    """The patches in the middle of every cell, ascending."""
    cells = bands(tokens, rows, columns)
    middle = [(2 * band + 1) * rows // (2 * len(cells)) for band in range(len(cells))]
    return [
        row * columns + (2 * cell + 1) * columns // (2 * count)
        for row, count in zip(middle, cells, strict=True)
        for cell in range(count)
    ]


def grid_cells(tokens: int, rows: int, columns: int) -> list[int]:
    """The cell of every patch, in reading order; cells differ by a row and a column at most."""
    cells = bands(tokens, rows, columns)
    before = [sum(cells[:band]) for band in range(len(cells))]
    # Of n bands, row r belongs to the last one that begins at floor(band * rows / n) or before.
    band_of = [((row + 1) * len(cells) - 1) // rows for row in range(rows)]
    return [before[band] + ((column + 1) * cells[band] - 1) // columns for band in band_of for column in range(columns)]


def _grid(images: Images) -> tuple[int, int]:
    return grid_of(images.hidden.shape[1] - 1, images.pixels.shape[-2], images.pixels.shape[-1])


@dataclass(frozen=True)
class UniformTokens(EncoderSparsifier):
    """Keeps the patches of a regular grid, as the tower gives them; the same for all images.

    The image is cut into bands, the bands into cells, `sparse_budget` in all; the patch in the middle of each stays.
    `sparse_budgets` is [tokens]. No CLS, nothing merged; all patches are the dense model. Complexity: none.
    """

    name = "uniform"
    paper = PAPER
    summary = "keeps the patches of a regular grid: a control"
    cost = "1"

    def reduce(self, images: Images) -> Reduced:
        hidden = images.hidden[:, 1:]
        kept = torch.tensor(grid_patches(self.tokens, *_grid(images)), device=hidden.device).expand(len(hidden), -1)
        scores = torch.zeros(hidden.shape[:2], device=hidden.device).scatter(1, kept, 1.0)
        return Reduced.kept(hidden, kept, scores)


@dataclass(frozen=True)
class PooledTokens(EncoderSparsifier):
    """Averages the patches of every cell of a regular grid, as the tower gives them.

    For 64 of 24 x 24 patches, the mean of 3 x 3. Where cells are no whole patches, `uniform` need not keep one of each.
    `sparse_budgets` is [tokens]. No CLS; all patches are the dense model. Complexity: one pass over the features.
    """

    name = "pool"
    paper = PAPER
    summary = "averages the patches of every cell of a regular grid: a control"
    cost = "N d"

    @property
    def new_tokens(self) -> int:
        return self.tokens

    def reduce(self, images: Images) -> Reduced:
        hidden = images.hidden[:, 1:]
        cells = torch.tensor(grid_cells(self.tokens, *_grid(images)), device=hidden.device)
        features = cluster_mean(to_float(hidden), cells.expand(len(hidden), -1), self.tokens, epsilon=0.0)
        numbers, merged = number_cells(cells, self.tokens)
        scores = torch.ones(hidden.shape[:2], device=hidden.device)
        batch = len(hidden)
        return Reduced(features.to(hidden.dtype), numbers.expand(batch, -1), scores, merged.expand(batch, -1))


def number_cells(cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For `Reduced`: what each of `count` cells is, and the new token of each patch, from its cell `(patches,)`.

    A patch that has its cell to itself stays what it was.
    """
    patches = cells.shape[0]
    size = torch.zeros(count, dtype=torch.int64, device=cells.device).scatter_add(0, cells, torch.ones_like(cells))
    order = (size > 1).cumsum(0) - 1
    alone = torch.zeros_like(size).scatter(0, cells, torch.arange(patches, device=cells.device))
    return torch.where(size > 1, patches + order, alone), torch.where(size[cells] > 1, order[cells], -1)
