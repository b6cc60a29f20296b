"""Bytes of tensors alive, counted by storage, and their peak over a stretch of code."""

from __future__ import annotations

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def live_bytes() -> int:
    """Bytes of all storages that some tensor known to Python uses."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class PeakBytes(TorchDispatchMode):
    """Count the storages that operations make while it is active, and `peak` bytes of them alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._count((args, kwargs), made=False)  # what was there before is not counted, nor are views of it
        result = function(*args, **(kwargs or {}))
        self._count(result, made=True)
        return result

    def _count(self, values, *, made: bool) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen:
                    size = self._seen[storage._cdata] = storage.nbytes() if made else 0
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)
