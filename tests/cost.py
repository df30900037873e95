"""What the operations of a forward pass return, for tests of what it must not build."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Records every operation and the shapes of every tensor that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, torch.Size]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        self.names.append(name)
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self.names.append("nonzero")
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.append((name, tensor.shape))
        return out

    def square(self, shortest: int) -> list[tuple[str, torch.Size]]:
        """Results with two dimensions of at least `shortest`, a sequence length."""
        return [(name, shape) for name, shape in self.shapes if sum(size >= shortest for size in shape) >= 2]
