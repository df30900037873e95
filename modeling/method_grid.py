"""Uniform grid and average pooling: the controls that look at nothing but places."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pruning_methods import EncoderSparsifier
from .pruning_ops import cluster_mean, to_float
from .pruning_registry import register_method
from .pruning_types import VisionFeatures, VisualTokens

PAPER = "a control, as in Token Pruning in Multimodal LLMs: Are We Solving the Right Problem? (arXiv 2502.11501)"


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


@register_method
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
    needs_grid = True

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        x = vision.features
        kept = torch.tensor(grid_patches(self.tokens, *vision.grid), device=x.device).expand(len(x), -1)
        scores = torch.zeros(x.shape[:2], device=x.device).scatter(1, kept, 1.0)
        return VisualTokens.kept(x, kept, scores)


@register_method
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
    needs_grid = True

    @property
    def new_tokens(self) -> int:
        return self.tokens

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        x, items = vision.features, len(vision.features)
        cells = torch.tensor(grid_cells(self.tokens, *vision.grid), device=x.device)
        features = cluster_mean(to_float(x), cells.expand(items, -1), self.tokens, epsilon=0.0)
        index, merged = number_cells(cells, self.tokens)
        scores = torch.ones(x.shape[:2], device=x.device)
        middle = torch.tensor(grid_patches(self.tokens, *vision.grid), device=x.device).expand(items, -1)
        tokens = VisualTokens(features.to(x.dtype), index.expand(items, -1), scores, merged.expand(items, -1))
        return replace(tokens, anchors=middle)


def number_cells(cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For `VisualTokens`: what each of `count` cells is, and the new token of each patch, from its cell `(patches,)`.

    A patch that has its cell to itself stays what it was.
    """
    patches = cells.shape[0]
    size = torch.zeros(count, dtype=torch.int64, device=cells.device).scatter_add(0, cells, torch.ones_like(cells))
    order = (size > 1).cumsum(0) - 1
    alone = torch.zeros_like(size).scatter(0, cells, torch.arange(patches, device=cells.device))
    return torch.where(size > 1, patches + order, alone), torch.where(size[cells] > 1, order[cells], -1)
