"""Which ranks share the tokens of a row between two layers, and how the values of all of them are brought together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.clean_slots import find_slots, is_clean, is_noisy, slot_keys


@dataclass(frozen=True)
class TokenShare:
    """Which ranks share the tokens of a row between two layers.

    Attributes:
        tensor: tensor ranks, with sequence parallelism; None: each of them has all tokens.
        context: context ranks; None: rows are whole.
        is_counting: of ranks that have the same tokens this one counts them.
    """

    tensor: ProcessGroup | None
    context: ProcessGroup | None
    is_counting: bool

    def gather(self, local: Tensor) -> Tensor:
        """[S, ...] the values [s, ...] of all ranks, without gradient (a collective).

        Args:
            local: [s, ...] of this rank's tokens.
        """
        return self.gather_context(_gather(local.detach(), self.tensor))

    def gather_context(self, values: Tensor) -> Tensor:
        """[S, ...] the same, of values [s/cp, ...] that the tensor ranks have all of."""
        return _gather(values, self.context)

    def local(self, values: Tensor) -> Tensor:
        """[s, ...] this tensor rank's part of values [s/cp, ...]."""
        return values if self.tensor is None else values.chunk(self.tensor.size())[self.tensor.rank()]


def _gather(local: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return local
    gathered = local.new_empty(local.shape[0] * group.size(), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered


def find_before_targets(share: TokenShare, offered: Batch, students: Batch, shift: bool) -> tuple[Tensor, Tensor]:
    """The clean token before what each target is (a collective of the context ranks).

    Targets on clean tokens, which predict the next one, count with a shift alone; else they are those of an AR loss.

    Args:
        share: of the tokens of both.
        offered: this context rank's part of rows with clean tokens.
        students: its part of the rows with the targets, whose slots are the same.
        shift: a position of a noisy view predicts the token after it.

    Returns:
        [T] int64 its index among the gathered tokens [S * b], any where there is none; [T] bool whether there is one.
    """
    row_length = students.input_ids.shape[1] * (1 if share.context is None else share.context.size())
    keys = slot_keys(offered.roles, offered.position_ids, row_length)
    slots = torch.stack([keys, is_clean(offered.roles).long()], dim=-1).transpose(0, 1).contiguous()
    all_keys, all_clean = share.gather_context(slots).flatten(0, 1).unbind(-1)
    own_keys = slot_keys(students.roles, students.position_ids, row_length).flatten()[students.target_positions]
    index, is_found = find_slots(own_keys if shift else own_keys - 1, all_keys, all_clean.bool())
    return index, is_found & (shift | is_noisy(students.roles).flatten()[students.target_positions])
