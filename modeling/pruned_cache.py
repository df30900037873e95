"""KV-cache layers that hold fewer tokens of a prompt than the caller knows of.

`generate` and its callers count in the tokens they passed: ids and attention mask keep the length of the whole prompt.
The first cache layer of every run of layers that saw a shortened prompt remembers what that prompt became: a
`ShortenedPrompt`. It follows its layer through beam search and rollbacks; from it and the caller's attention mask come
mask and positions of the tokens that follow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


@dataclass(frozen=True)
class ShortenedPrompt:
    """What a run of layers holds of a prompt.

    Attributes:
        mask: `(batch, held)` bool, false for padding; None without padding.
        counts: `(batch, 1)` int64, valid tokens held.
        held: tokens the cache layer holds of the prompt.
        length: tokens of the prompt as the caller counts.
        positions: "compact", counted within the run of layers, or "original", as the caller counts.
    """

    mask: Tensor | None
    counts: Tensor
    held: int
    length: int
    positions: str

    def mask_with(self, attention_mask: Tensor | None, total: int) -> Tensor | None:
        """The `(batch, total)` mask of all tokens that the layers hold, new ones included; None if nothing is masked.

        Args:
            attention_mask: the caller's, over the whole prompt and the tokens after it, or None.
            total: tokens held, with the new ones.

        Raises:
            ValueError: if the caller's mask does not span the prompt and what follows.
        """
        if self.mask is None and attention_mask is None:
            return None
        after = total - self.held
        if attention_mask is not None and attention_mask.shape[1] != self.length + after:
            raise ValueError(
                f"attention_mask spans {attention_mask.shape[1]} tokens; with this cache it must span the whole "
                f"conversation: {self.length} tokens of the prompt and {after} after it."
            )
        prompt = self.mask if self.mask is not None else self._ones(self.held)
        new = self._ones(after) if attention_mask is None else attention_mask[:, self.length :].bool()
        return torch.cat([prompt, new], dim=1)

    def next_positions(self, attention_mask: Tensor | None, new: int, total: int) -> Tensor:
        """Compact positions `(batch, new)` of the newest tokens; arguments as in `mask_with`."""
        if attention_mask is None:
            steps = torch.arange(total - self.held - new, total - self.held, device=self.counts.device)
            return self.counts + steps
        after = attention_mask[:, self.length :].to(torch.int64).cumsum(1)
        return (self.counts + after[:, after.shape[1] - new :] - 1).clamp(min=0)

    def _ones(self, length: int) -> Tensor:
        return torch.ones(self.counts.shape[0], length, dtype=torch.bool, device=self.counts.device)

    def select(self, rows: Tensor) -> ShortenedPrompt:
        rows = rows.to(self.counts.device)
        return replace(self, mask=None if self.mask is None else self.mask[rows], counts=self.counts[rows])


class ShortenedLayerMixin:
    """Modifications: a cache layer that carries a `ShortenedPrompt` along."""

    prompt: ShortenedPrompt | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.prompt is not None:
            self.prompt = self.prompt.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.prompt is not None:
            self.prompt = self.prompt.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.prompt is not None:
            rows = torch.arange(self.prompt.counts.shape[0], device=self.prompt.counts.device)
            self.prompt = self.prompt.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        held = int(self.get_seq_length())  # type: ignore[attr-defined]
        left = held + tokens_to_remove if tokens_to_remove <= 0 else min(held, tokens_to_remove)
        if self.prompt is not None and left < self.prompt.held:
            raise ValueError(
                f"crop({tokens_to_remove}) would cut into the pruned prompt: {held - self.prompt.held} tokens came after "
                "it. Run the prompt again instead."
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.prompt = None


@functools.cache
def _shortened_class(layer_class: type) -> type:
    return type(f"Shortened{layer_class.__name__}", (ShortenedLayerMixin, layer_class), {})


def remember(cache: Cache, layer: int, prompt: ShortenedPrompt) -> None:
    """Lets cache layer `layer` carry `prompt`; the layer keeps its kind (dynamic, static, ...) and its contents."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    old: Any = cache.layers[layer]
    if isinstance(old, ShortenedLayerMixin):
        old.prompt = prompt
        return
    new = _shortened_class(type(old)).__new__(_shortened_class(type(old)))
    new.__dict__.update(old.__dict__, prompt=prompt)
    cache.layers[layer] = new


def remembered(cache: Any) -> dict[int, ShortenedPrompt]:
    """The prompts that cache layers carry, by layer; empty for a cache of whole prompts or none."""
    layers = getattr(cache, "layers", ())
    return {i: layer.prompt for i, layer in enumerate(layers) if getattr(layer, "prompt", None) is not None}


def surplus(cache: Any) -> int:
    """Tokens of the prompt that the caller counts and layer 0 does not hold."""
    prompt = getattr(cache.layers[0], "prompt", None) if getattr(cache, "layers", None) else None
    return 0 if prompt is None else prompt.length - prompt.held
