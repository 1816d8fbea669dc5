"""Collectives of one rank that is alone: written down, and answered by what this rank holds itself.

What other ranks would send is what this one sends, repeated to the size that is asked for: a gather finds the same
tensor on every rank, an exchange brings back what was sent. What a pipeline neighbour sends is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.utils._pytree import tree_leaves

from megatron_dllm.planning.engine_ledger import Ledger

# Where tensors lie whose values are not known: torch has shapes there, and no content.
UNKNOWN = torch.device("meta")


class LoneCollectives:
    """Answers the operations of torch's namespace c10d."""

    def __init__(self, ledger: Ledger, peers: Sequence[Sequence[Tensor]] = ()) -> None:
        """Take what to write into, and what to answer.

        Args:
            ledger: gets every call.
            peers: for each tensor whose content differs from rank to rank: that of every rank of the group that will
                gather it, in order, each of the same shape.
        """
        self._ledger, self._peers = ledger, peers

    def answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What a collective returns, its outputs filled where they have values.

        Args:
            func: torch's operation.
            args: outputs first; inputs where they are others; the group.
        """
        place = next(i for i, arg in enumerate(func._schema.arguments) if arg.name == "process_group")
        group, name = ProcessGroup.unbox(args[place]), func._schema.name.removeprefix("c10d::")
        self._ledger.add_collective(name, group, args[:place])
        tensors = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args[:place]]
        if not has_unknown(tensors[0]):
            if place == 2:
                assert not has_unknown(tensors[1]), f"{name} of unknown values into a tensor whose values are read"
                self._fill(*tensors)
            elif name == "recv_":
                for received in tensors[0]:
                    received.normal_()
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _fill(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Write what the ranks hold.

        Args:
            outputs: tensors of any shapes, whose elements one after the other are those of all ranks.
            inputs: this rank's tensors, of any shapes.
        """
        held = next((ranks for ranks in self._peers if _holds(ranks, inputs[0])), inputs)
        flat = torch.cat([value.reshape(-1) for value in held])
        start = 0
        for out in outputs:
            indices = torch.arange(start, start + out.numel(), device=flat.device).remainder_(max(1, len(flat)))
            out.copy_(flat[indices].view(out.shape))
            start += out.numel()


def has_unknown(tensors: Sequence[Tensor]) -> bool:
    """Whether one of these tensors, of any shapes, has no values."""
    return any(tensor.is_meta for tensor in tensors)


def _holds(ranks: Sequence[Tensor], mine: Tensor) -> bool:
    """Whether `mine`, of any shape, is one of these tensors."""
    return any(value.shape == mine.shape and value.dtype == mine.dtype and value.equal(mine) for value in ranks)
