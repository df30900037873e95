"""Training data of the reference model: rendered scenes on disk, batches of crops, questions with their answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .model import END, MEAN, NO, STD, VOCABULARY, YES, article
from .scenes import CATEGORIES, GRID, PATCH, SIDE, Assets, scenes

HARD = 8  # adversarial questions ask for one of the absent categories that most often stand beside those present
QUESTION_TOKENS, CAPTION_TOKENS, MOST_NAMED = 10, 19, 6
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Crops of `side` x `side` patches.

    Attributes:
        pixels: `(batch, 3, 14 side, 14 side)`, normalised.
        labels: `(batch, side²)` int64, labels of `Scene.labels`.
        present: `(batch, categories)`: 1 present, 0 absent, -1 too little of it lies in the crop to tell.
        corners: the first row and column of each crop in patches.
    """

    pixels: Tensor
    labels: Tensor
    present: np.ndarray
    corners: list[tuple[int, int]]


def render_scenes(folder: Path, seed: int, count: int, assets: Assets, processes: int) -> None:
    """Renders the training scenes once; 0.34 MB each. Goes on where an earlier run stopped."""
    done = folder / "scenes.done"
    pictures, labels = folder / "pictures.npy", folder / "labels.npy"
    if done.is_file() and done.read_text() == f"{seed} {count}":
        return
    shape = (count, SIDE, SIDE, 3)
    p = np.lib.format.open_memmap(pictures, "w+", np.uint8, shape)
    q = np.lib.format.open_memmap(labels, "w+", np.uint8, (count, GRID, GRID))
    for number, scene in enumerate(scenes(seed, count, assets, processes)):
        p[number], q[number] = scene.picture, scene.labels
        if number % 2000 == 0:
            print(f"render {number}/{count}", flush=True)
    p.flush()
    q.flush()
    done.write_text(f"{seed} {count}")


class Scenes:
    """Rendered scenes, from which batches are drawn; the same batch for the same generator."""

    def __init__(self, folder: Path) -> None:
        self.pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy")
        flat = self.labels.reshape(len(self.labels), -1)
        self.patches = np.stack([(flat == c + 1).sum(1) for c in range(len(CATEGORIES))], 1)
        present = (self.patches > 0).astype(np.float64)
        self.frequency = present.mean(0) + 1e-4
        self.together = present.T @ present
        np.fill_diagonal(self.together, 0)

    def batch(self, rng: np.random.Generator, size: int, side: int) -> Batch:
        """Draws crops; of two random windows the one with more objects, half of them mirrored."""
        numbers = rng.integers(0, len(self.pictures), size)
        pixels = np.empty((size, PATCH * side, PATCH * side, 3), np.uint8)
        labels = np.empty((size, side, side), np.uint8)
        corners = []
        for row, number in enumerate(numbers):
            windows = [tuple(rng.integers(0, GRID - side + 1, 2)) for _ in range(2 if side < GRID else 1)]
            y, x = max(windows, key=lambda w: self._objects_in(number, w, side))
            pixels[row] = self.pictures[number, PATCH * y : PATCH * (y + side), PATCH * x : PATCH * (x + side)]
            labels[row] = self.labels[number, y : y + side, x : x + side]
            corners.append((int(y), int(x)))
            if rng.random() < 0.5:
                pixels[row], labels[row] = pixels[row, :, ::-1].copy(), labels[row, :, ::-1].copy()
        flat = labels.reshape(size, -1)
        seen = np.stack([(flat == c + 1).sum(1) for c in range(len(CATEGORIES))], 1)
        enough = np.maximum(1, np.minimum(4, 0.5 * self.patches[numbers]))
        present = np.where(seen >= enough, 1.0, np.where(seen == 0, 0.0, -1.0)).astype(np.float32)
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        tint = torch.from_numpy(rng.normal(1, 0.1, (size, 3, 1, 1)).astype(np.float32))
        return Batch((tensor * tint - MEAN) / STD, torch.from_numpy(flat.astype(np.int64)), present, corners)

    def _objects_in(self, number: int, corner: tuple[int, int], side: int) -> int:
        y, x = corner
        return int((self.labels[number, y : y + side, x : x + side] % 254 > 0).sum())

    def questions(self, rng: np.random.Generator, present: np.ndarray, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`count` yes/no questions and a caption for each crop.

        Returns:
            ids `(batch, count * 10 + 19)`, the slots one after the other; answers `(batch, count)`, 1 for yes;
            the caption's labels `(batch, 19)`.
        """
        ids = np.zeros((len(present), count * QUESTION_TOKENS + CAPTION_TOKENS), np.int64)
        answers = np.zeros((len(present), count), np.int64)
        captions = np.full((len(present), CAPTION_TOKENS), IGNORED, np.int64)
        for row, known in enumerate(present):
            there, absent = np.flatnonzero(known == 1), np.flatnonzero(known == 0)
            half = count // 2 if len(there) else 0
            asked = list(np.resize(rng.permutation(there), half)) if half else []
            asked += [self._absent(rng, there, absent) for _ in range(count - half)]
            answers[row, :half] = 1
            caption, labels = _caption(there)
            ids[row] = np.concatenate([*(_question(c, j < half) for j, c in enumerate(asked)), caption])
            if not (known < 0).any() and 0 < len(there) <= MOST_NAMED:
                captions[row] = labels
        return torch.from_numpy(ids), torch.from_numpy(answers), torch.from_numpy(captions)

    def _absent(self, rng: np.random.Generator, there: np.ndarray, absent: np.ndarray) -> int:
        """An absent category: any, a popular one, or one that often stands beside those present."""
        kind = rng.random()
        if kind < 0.4:
            return int(rng.choice(absent))
        if kind < 0.65 or not len(there):
            weights = self.frequency[absent]
            return int(rng.choice(absent, p=weights / weights.sum()))
        beside = self.together[there].sum(0)[absent]
        return int(rng.choice(absent[np.argsort(-beside)[:HARD]]))


def _question(category: int, present: bool) -> list[int]:
    name = CATEGORIES[category]
    words = ["Is", "there", article(name), name, "in", "the", "image", "?", "ASSISTANT:"]
    return [VOCABULARY[word] for word in words] + [YES if present else NO]


def _caption(there: np.ndarray) -> tuple[list[int], list[int]]:
    """Ids of `What is in the image? ASSISTANT: cat, dog`, categories in order, and the label at each of them."""
    named: list[int] = []
    for category in sorted(there)[:MOST_NAMED]:
        named += ([VOCABULARY[","]] if named else []) + [VOCABULARY[CATEGORIES[category]]]
    asked = [VOCABULARY[word] for word in ["What", "is", "in", "the", "image", "?", "ASSISTANT:"]]
    ids, labels = [*asked, *named, END], [*[IGNORED] * (len(asked) - 1), *named, END, IGNORED]
    padding = CAPTION_TOKENS - len(ids)
    return ids + [0] * padding, labels + [IGNORED] * padding
