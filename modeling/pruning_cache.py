"""KV-cache layers that hold fewer tokens of a prompt than the caller knows of.

`generate` and its callers count in the tokens they passed: ids and attention mask keep the length of the whole prompt.
The first cache layer of every run of layers that saw a shortened prompt remembers what that prompt became: a
`ShortenedPrompt`. It follows its layer through beam search and rollbacks; from it and the caller's attention mask come
mask and positions of the tokens that follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaModel

from .pruning_sequence import following_positions

# What transformers calls the argument and the output that hold the cache: `cache` from 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def the_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache that a caller passes under either of its names.

    Raises:
        ValueError: if both are given and differ.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them.")
    return past_key_values if cache is None else cache


@dataclass(frozen=True)
class ShortenedPrompt:
    """What a run of layers holds of a prompt.

    Attributes:
        mask: `(batch, held)` bool, false for padding; None without padding.
        held: tokens the cache layer holds of the prompt.
        length: tokens of the prompt as the caller counts.
        positions: "compact", counted within the run of layers, or "original", as the caller counts.
        next_position: `(batch, 1)` int64, the position of what follows, where it is not the number of tokens held.
        bias: `(batch, held)` float, added to the logits of all that look at the tokens; None for nothing.
        removed: `(batch, 1)` int64, by how much positions behind the prompt are less than the caller's.
    """

    mask: Tensor | None
    held: int
    length: int
    positions: str
    next_position: Tensor | None = None
    bias: Tensor | None = None
    removed: Tensor | None = None

    def mask_with(self, attention_mask: Tensor | None, total: int) -> Tensor | None:
        """The `(batch, total)` mask of all tokens that the layers hold, new ones included; None if nothing is masked.

        Args:
            attention_mask: the caller's, over the whole prompt and the tokens after it, or None.
            total: tokens held, with the new ones.

        Raises:
            ValueError: if the caller's mask does not span the prompt and what follows.
        """
        after = total - self.held
        if attention_mask is None:
            return None if self.mask is None else nn.functional.pad(self.mask, (0, after), value=True)
        if attention_mask.dim() != 2 or attention_mask.shape[1] != self.length + after:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; with this cache it must span the whole "
                f"conversation: (batch, {self.length} tokens of the prompt + {after} after it)."
            )
        new = attention_mask[:, self.length :].bool()
        prompt = new.new_ones(new.shape[0], self.held) if self.mask is None else self.mask.to(new.device)
        return torch.cat([prompt, new], dim=1)

    def total(self, attention_mask: Tensor | None, cache: Any, layer: int, new: int) -> int:
        """Tokens that cache layer `layer` holds once the `new` ones are in it."""
        length = cache.get_seq_length(layer)
        if torch.is_tensor(length) and attention_mask is not None:
            # A static cache counts on the device; the mask's shape says the same without waiting for it.
            return self.held + attention_mask.shape[1] - self.length
        return int(length) + new

    def positions_of(self, new: Tensor, mask: Tensor | None, past: int | Tensor) -> Tensor:
        """Positions, counted within the layers, of the tokens `new` `(batch, n, ...)` behind the `past` held ones.

        Args:
            mask: of `mask_with`.
        """
        if self.next_position is None:
            return following_positions(mask, past, new)
        after = None if mask is None else mask[:, self.held :]
        return self.next_position + following_positions(after, past - self.held, new)

    def followed_by(self, valid: Tensor | None, new: int, length: int | None) -> ShortenedPrompt:
        """With the `new` tokens that came in behind it, as one longer prompt.

        Args:
            valid: `(batch, new)` bool, false for padding, or None without padding.
            length: of all as the caller counts; None for what layer 0 holds.
        """
        held, following = self.held + new, self.next_position
        if following is not None:
            following = following + (new if valid is None else valid.sum(1, keepdim=True))
        whole = None if valid is None else nn.functional.pad(valid, (self.length, 0), value=True)
        mask = self.mask_with(whole, held)
        return replace(self, mask=mask, held=held, length=length or held, next_position=following)

    def map(self, change: Callable[[Tensor], Tensor]) -> ShortenedPrompt:
        """The same for other rows: `change` takes what is `(batch, ...)`."""
        own = {name: getattr(self, name) for name in ("mask", "next_position", "bias", "removed")}
        changed: dict[str, Any] = {name: None if x is None else change(x) for name, x in own.items()}
        return replace(self, **changed)

    def select(self, rows: Tensor) -> ShortenedPrompt:
        return self.map(lambda x: x[rows.to(x.device)])


class ShortenedLayerMixin:
    """Modifications: a cache layer that carries a `ShortenedPrompt` along."""

    prompt: ShortenedPrompt | None

    def __reduce__(self) -> tuple:
        # The class is made at run time; a copy is made anew from the kind of layer.
        return _shortened_layer, (type(self).__bases__[1], self.__dict__)

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
            self.prompt = self.prompt.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        held = int(self.get_seq_length())  # type: ignore[attr-defined]
        left = held + tokens_to_remove if tokens_to_remove <= 0 else min(held, tokens_to_remove)
        if self.prompt is not None and left < self.prompt.held:
            raise ValueError(
                f"crop({tokens_to_remove}) would cut into the pruned prompt: {held - self.prompt.held} tokens came "
                "after it. Run the prompt again instead."
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.prompt = None


_CLASSES: dict[type, Any] = {}


def _shortened_class(layer_class: type) -> Any:
    if layer_class not in _CLASSES:
        _CLASSES[layer_class] = type(f"Shortened{layer_class.__name__}", (ShortenedLayerMixin, layer_class), {})
    return _CLASSES[layer_class]


def _shortened_layer(layer_class: type, state: dict[str, Any]) -> Any:
    shortened = _shortened_class(layer_class)
    layer = shortened.__new__(shortened)
    layer.__dict__.update(state)
    return layer


def remember(cache: Cache, layer: int, prompt: ShortenedPrompt) -> None:
    """Lets cache layer `layer` carry `prompt`; the layer keeps its kind (dynamic, static, ...) and its contents."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    old: Any = cache.layers[layer]
    if isinstance(old, ShortenedLayerMixin):
        old.prompt = prompt
        return
    cache.layers[layer] = _shortened_layer(type(old), {**old.__dict__, "prompt": prompt})


def remembered(cache: Any) -> dict[int, ShortenedPrompt]:
    """The prompts that cache layers carry, by layer; empty for a cache of whole prompts or none.

    What layer 0 carries was dropped before the decoder, and is the business of the model around it.
    """
    layers = getattr(cache, "layers", ())
    return {i: layer.prompt for i, layer in enumerate(layers) if getattr(layer, "prompt", None) is not None}


def surplus(cache: Any) -> int:
    """Tokens of the prompt that the caller counts and layer 0 does not hold."""
    prompt = remembered(cache).get(0)
    return 0 if prompt is None else prompt.length - prompt.held


def trim(cache: Cache, layers: range, columns: Tensor, there: Tensor, prompt: ShortenedPrompt) -> None:
    """Keeps of a prompt, in some layers, the tokens at `columns` `(batch, n)`; `prompt` is what they then hold.

    Args:
        there: `(batch, n)` bool, false for columns that stand for no token.

    Raises:
        ValueError: for a cache that does not just hold tensors of all tokens.
    """
    for index in layers:
        layer: Any = cache.layers[index]
        kind = type(layer).__bases__[1] if isinstance(layer, ShortenedLayerMixin) else type(layer)
        if kind is not DynamicLayer:
            raise ValueError(
                f"sparse_options: trim_cache=True works on a dynamic cache of full attention, not on {kind.__name__}."
            )
        rows = columns.where(there, torch.zeros_like(columns)).to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(2, rows.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, rows.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
    remember(cache, layers.start, prompt)
