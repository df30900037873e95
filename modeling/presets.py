"""Where in a decoder methods act, carried over from the 32 layers that papers give their settings for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .checks import check_counts

PRESET_PATCHES = 576
PRESET_DEPTH = 32


def scale_layers(published: Sequence[int], depth: int) -> tuple[int, ...]:
    """The published layers for 32 decoder layers or more; fewer layers scale them down in proportion.

    Scaled layers lie at least two apart (one, where that does not fit before the last layer), the first from layer 1
    on: of 8 layers, 1, 3, 5 stand for 2, 6, 15. A model with fewer layers than stages drops the earliest stages.
    """
    if depth >= PRESET_DEPTH:
        return tuple(published)
    for gap in (2, 1):
        layers: list[int] = []
        for layer in published:
            scaled = max(1, int(layer * depth / PRESET_DEPTH + 0.5))
            layers.append(max(scaled, layers[-1] + gap) if layers else scaled)
        if layers[-1] <= depth - 2:
            return tuple(layers)
    last = max(1, depth - 1)
    return tuple(range(max(0, last - len(published)), last))


def check_stages(
    depth: int, layers: Sequence[int] | None, preset: tuple[int, ...], budgets: object, first: int = 0
) -> tuple[int, ...]:
    """The layers at which to prune, by default those of the `preset`, the last ones where `budgets` are fewer.

    Raises:
        ValueError: for `layers` that are not ascending, or not within `first` and the decoder's last.
    """
    if layers is None:
        fewer = isinstance(budgets, list | tuple) and 0 < len(budgets) < len(preset)
        return preset[-len(budgets) :] if fewer else preset  # type: ignore[arg-type]
    stages = check_counts("sparse_layers", layers, first, depth - 1)
    if any(a >= b for a, b in pairwise(stages)):
        raise ValueError(f"sparse_layers={list(layers)}: ascending decoder layers, each once, are allowed.")
    return stages
