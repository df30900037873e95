"""The few attention rows that a score needs, whatever the attention backend.

The rows are taken inside the attention module's own call (a forward pre-hook), where offloaded, quantised or adapted
weights are in place. What is taken goes into a `RowTap`, which the model hands to the one layer it concerns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .pruning_ops import autocast_disabled, rows_at, to_float

TAP = "row_tap"
ROWS = 64  # of attention that are there at a time, where all are needed


class RowTap:
    """Collects queries of some rows, and the keys, of one attention module in one forward pass.

    In a decoder layer it also stands in for the cache, which is where the layer itself hands over its rotated keys.

    Attributes:
        query: `(batch, heads, rows, head_dim)`, rotated where the module rotates.
        key: `(batch, key_heads, length, head_dim)`, likewise.
        group: the processes that share the heads out among them (tensor parallelism); None where this one has all.
    """

    query: Tensor
    key: Tensor
    group: Any = None

    def __init__(self, columns: Tensor, cache: Any = None, project_keys: bool = False):
        """Takes the rows at `columns` `(batch, rows)`.

        With `project_keys` the keys are computed anew, where no cache is handed to the layer.
        """
        self.columns = columns
        self.cache = cache
        self.project_keys = project_keys

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.key = key
        return (key, value) if self.cache is None else self.cache.update(key, value, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("query", "key", "cache"):
            raise AttributeError(name)
        return getattr(self.cache, name)

    def take(self, attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> None:
        self.query = _heads(attention, "q", rows_at(hidden, self.columns))
        if rotary is not None:
            tables = [rows_at(table.expand(hidden.shape[0], -1, -1), self.columns) for table in rotary]
            self.query = apply_rotary_pos_emb(self.query, self.query, *tables)[0]
        if self.project_keys:
            self.key = _heads(attention, "k", hidden)
            if rotary is not None:
                self.key = apply_rotary_pos_emb(self.key, self.key, *rotary)[0]
        if self.query.shape[1] < attention.config.num_attention_heads:
            # transformers from 5.24 on has the weights know their mesh, before it the modules.
            owner = attention.q_proj
            mesh = getattr(owner.weight, "device_mesh", None) or owner._hf_device_mesh
            self.group = mesh.get_group()

    def of_all_heads(self, x: Tensor) -> Tensor:
        """`(batch, heads, ...)` of the heads of all processes, in their order; a score is of all of them."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)


def _heads(attention: Any, kind: str, hidden: Tensor) -> Tensor:
    """Queries ("q") or keys ("k") of `(batch, n, channels)`, normed where the module norms them."""
    x = getattr(attention, f"{kind}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{kind}_norm", None)
    return (x if norm is None else norm(x)).transpose(1, 2)


def _take_from_call(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    tap = kwargs.pop(TAP, None)
    if tap is not None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with torch.no_grad():
            tap.take(attention, hidden, kwargs.get("position_embeddings"))
    return args, kwargs


def watch(attention: nn.Module) -> None:
    """Lets `attention` fill a `RowTap` passed to its layer as keyword `row_tap`; idempotent, inactive without one."""
    if _take_from_call not in attention._forward_pre_hooks.values():
        attention.register_forward_pre_hook(_take_from_call, with_kwargs=True)


@torch.no_grad()
def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The attention that each token receives from all of them, in float32 (float64 for a float64 model).

    Blocks of rows are summed: nothing of length x length is there.

    Args:
        query: `(batch, heads, length, head_dim)`; key: `(batch, key_heads, length, head_dim)`.
        scaling: factor of the logits.

    Returns:
        `(batch, heads, length)`, summed over the tokens that look.
    """
    blocks = query.split(ROWS, dim=2)
    return sum(row_probabilities(rows, key, scaling).sum(2) for rows in blocks)  # type: ignore[return-value]


@torch.no_grad()
def row_probabilities(
    query: Tensor, key: Tensor, scaling: float, columns: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """Attention probabilities of some rows, in float32 (float64 for a float64 model).

    Args:
        query: `(batch, heads, rows, head_dim)`; key: `(batch, key_heads, length, head_dim)`, shared by groups of heads.
        scaling: factor of the logits.
        visible: `(batch, rows, length)` bool, true where a row may look; None is everywhere.
        columns: `(batch, n)` int64, the columns to return; None is all.

    Returns:
        `(batch, heads, rows, n or length)`.
    """
    batch, heads, rows, head_dim = query.shape
    with autocast_disabled(query):
        groups = to_float(query).reshape(batch, key.shape[1], -1, head_dim)
        logits = (groups @ to_float(key).transpose(2, 3) * scaling).view(batch, heads, rows, -1)
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], torch.finfo(logits.dtype).min)
    normaliser = logits.logsumexp(-1, keepdim=True)
    if columns is not None:
        logits = logits.gather(3, columns[:, None, None].expand(-1, heads, rows, -1))
    return (logits - normaliser).exp()
