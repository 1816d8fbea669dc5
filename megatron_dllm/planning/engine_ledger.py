"""What a step does besides holding memory: its collectives and its products, added up by kind."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_dllm.planning.answer import Traffic

# By torch's name of a collective, ours.
KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "all_reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "send": "send",
}
# Collectives whose calls grow with the micro-batches; those of replicas come once a step.
REPLICAS = ("dp", "edp")


class Ledger:
    """Adds up collectives and floating point operations.

    Attributes:
        flops: of matrix products and attention.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        """Args: by torch's name of a group, what it is for."""
        self.flops = 0
        self._labels = labels
        self._calls: dict[tuple[str, str, tuple[int, ...]], list[int]] = defaultdict(lambda: [0, 0])

    def clear(self) -> None:
        """Forget what has been added."""
        self.flops = 0
        self._calls.clear()

    def add_collective(self, name: str, group: dist.ProcessGroup, args: Sequence[Any]) -> None:
        """Write down one call.

        Args:
            name: torch's, without namespace.
            group: its ranks.
            args: of the operation; tensors or (nested) lists of them come first, outputs before inputs.
        """
        if name not in KINDS or group.size() == 1:
            return
        sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args[:2]]
        label = self._labels.get(group.group_name, "world" if group.size() == dist.get_world_size() else "other")
        entry = self._calls[KINDS[name], label, tuple(dist.get_process_group_ranks(group))]
        entry[0] += 1
        entry[1] += max(sizes)

    def add_product(self, func: Any, args: Sequence[Any]) -> None:
        """Count the operations of a product; others count nothing."""
        count = _FLOPS.get(func)
        if count is not None:
            self.flops += count(*args)

    def traffic(self, scale: float) -> tuple[Traffic, ...]:
        """All calls by kind and group.

        Args:
            scale: micro-batches of a step by micro-batches that have been run.
        """
        found = []
        for (kind, label, ranks), (calls, num_bytes) in sorted(self._calls.items()):
            factor = 1.0 if label in REPLICAS else scale
            found.append(Traffic(kind, label, ranks, round(calls * factor), round(num_bytes * factor)))
        return tuple(found)


def _mm(left: Tensor, right: Tensor, *_: Any) -> int:
    """[.., m, k] times [.., k, n]."""
    return 2 * math.prod(left.shape) * right.shape[-1]


def _addmm(_: Tensor, left: Tensor, right: Tensor, *__: Any) -> int:
    """Added to [.., m, n]: [.., m, k] times [.., k, n]."""
    return _mm(left, right)


def _grouped(left: Tensor, right: Tensor, *_: Any) -> int:
    """Rows [m, k] in sections times weights [e, k, n], or their gradient [k, m] in sections times [m, n]."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[-1]


def _flash(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """[b, n, q, d] queries on [b, g, k, d] keys: scores and their product with the values."""
    return 4 * math.prod(query.shape) * key.shape[2]


def _flash_backward(_: Tensor, query: Tensor, key: Tensor, *__: Any) -> int:
    """Five products of that size where the forward pass has two."""
    return 10 * math.prod(query.shape) * key.shape[2]


_aten = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    _aten.mm.default: _mm,
    _aten.mm.out: _mm,
    _aten.bmm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.addmm_.default: _addmm,
    _aten.baddbmm.default: _addmm,
    _aten._grouped_mm.default: _grouped,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _flash,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
}
