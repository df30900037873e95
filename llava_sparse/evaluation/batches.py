"""Rows of a batch: ids, masks, positions, pictures, caches, and the patches that each row keeps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_sparse import Selection


def some_pictures(images: Any, rows: list[int]) -> Any:
    """Some of the pictures, in the order of `rows`; None if there are none."""
    if images is None:
        return None
    if hasattr(images, "take"):
        return images.take(rows)
    features = images.pooler_output
    return BaseModelOutputWithPooling(pooler_output=[features[row] for row in rows])


def ones_like(like: Tensor) -> Tensor:
    """A mask `(rows, length)` of tokens that are all there."""
    return torch.ones(like.shape[:2], dtype=torch.long, device=like.device)


def positions_of(mask: Tensor) -> Tensor:
    """Positions `(rows, length)` of a mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids `(rows, length)`, zeros at the left, and their mask."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1, padding_side="left")
    return ids.clamp(min=0).to(device), (ids >= 0).long().to(device)


def rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache with some rows of another, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    # From the CPU, rows can be taken of layers on any device.
    chosen.batch_select_indices(rows.cpu())
    return chosen


def kept_patches(stage: Selection, patches: int) -> np.ndarray:
    """`(rows, patches)` bool."""
    kept = stage.kept.cpu()
    mask = torch.zeros(len(kept), patches + 1, dtype=torch.bool)
    # Padding (-1), and with several stages tokens merged earlier, fall into the column that is cut off.
    mask.scatter_(1, torch.where((kept >= 0) & (kept < patches), kept, patches), True)
    return mask[:, :patches].numpy()
