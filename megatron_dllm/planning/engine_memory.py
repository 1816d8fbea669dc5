"""Which bytes are alive: the storages of all tensors that come into being while it watches, real or fake.

It counts what torch's allocator would be asked for. Memory inside one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The autograd node of the LM head (`model.head`).
_HEAD_NODE = "_TargetCrossEntropy"


class LiveMemory(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at a time since `start_peak`.
        peak_head: of these, what the head's backward pass has allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.peak_head = 0
        self._head, self._is_inside = 0, False
        # By address of the storage: what tells of its end, its bytes, and whether the head has made it.
        self._storages: dict[int, tuple[weakref.ref[Any], int, bool]] = {}

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_head = self.live, self._head

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """Operations that run as one: what lives only between them does not count."""
        self._is_inside = True
        yield
        self._is_inside = False
        self._see_peak()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages or not num_bytes:
            return
        node = torch._C._current_autograd_node()
        is_head = node is not None and node.name().startswith(_HEAD_NODE)
        self._storages[key] = weakref.ref(storage, lambda _: self._forget(key)), num_bytes, is_head
        self.live += num_bytes
        self._head += num_bytes if is_head else 0
        if not self._is_inside:
            self._see_peak()

    def _see_peak(self) -> None:
        if self.live > self.peak:
            self.peak, self.peak_head = self.live, self._head

    def _forget(self, key: int) -> None:
        _, num_bytes, is_head = self._storages.pop(key)
        self.live -= num_bytes
        self._head -= num_bytes if is_head else 0
