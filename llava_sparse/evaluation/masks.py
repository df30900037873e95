"""Masks of the patches that a run keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def pack_kept(mask: ArrayLike) -> str:
    """A mask `(patches,)` of kept patches in hexadecimal, eight patches a byte, the first one the highest bit."""
    return np.packbits(np.asarray(mask, bool)).tobytes().hex()


def unpack_kept(packed: str, patches: int) -> Array:
    """The boolean mask `(patches,)` that `pack_kept` wrote.

    Raises:
        ValueError: if the text is no such mask of so many patches.
    """
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8)).astype(bool)
    except (TypeError, ValueError) as error:
        raise ValueError(f"kept {packed!r}: hexadecimal digits are allowed ({error}).") from error
    if len(bits) != 8 * -(-patches // 8) or bits[patches:].any():
        raise ValueError(f"kept {packed!r}: a mask of {patches} patches is allowed; these are {len(bits)} bits.")
    return bits[:patches]


def kept_overlap(a: ArrayLike, b: ArrayLike) -> float:
    """Mean over pictures of the overlap of kept patches, intersection over union; 1 where neither keeps any.

    Args:
        a, b: boolean masks `(n, patches)` of two runs.

    Raises:
        ValueError: for different or empty shapes.
    """
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(f"masks {first.shape} and {second.shape}: two of the same shape (n, patches) are allowed.")
    both, either = (first & second).sum(axis=1), (first | second).sum(axis=1)
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())
