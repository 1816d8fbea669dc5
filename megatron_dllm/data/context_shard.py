"""A context-parallel rank's share of a micro-batch: which tokens of every row it holds, and the targets among them.

    1 deal    every rank deals every row to all ranks by itself (`diffusion.context_deal`); no communication is needed
    2 take    each keeps its own tokens, with their roles, positions and noise
    3 number  targets count their position within the shard

A row of 6 tokens with targets 1 and 4, dealt [0 1 5] and [2 3 4]: the first rank has target 1 at its position 1, the
second target 4 at its position 2. What belongs to whole rows (sample ids, the loss's denominator) stays the same on
every rank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.context_deal import deal_row


def deal_context(batch: Batch, cp_size: int) -> Tensor:
    """Which tokens of each row each context-parallel rank holds, from roles and targets alone.

    Args:
        batch: whole rows, on the CPU.
        cp_size: context-parallel ranks.

    Returns:
        [b, cp_size, s / cp_size] int64 indexes into the row.
    """
    # The number of targets matters too: a rank with many of them has more of the LM head to compute.
    is_target = np.zeros(batch.input_ids.shape, dtype=np.bool_)
    is_target.reshape(-1)[batch.target_positions.numpy()] = True
    rows = zip(batch.roles.numpy(), is_target, strict=True)
    return torch.from_numpy(np.stack([deal_row(roles, targets, cp_size) for roles, targets in rows]))


def take_context_shard(batch: Batch, cp_rank: int, cp_size: int, dealt_as: Batch | None = None) -> Batch:
    """This context-parallel rank's tokens of the micro-batch.

    Tensors per token become [b, s / cp_size]; targets are those of these tokens, with positions that count in
    the shard. What counts rows and segments and the totals (num_maskable, ...) stay those of the whole rows: totals
    must not be summed over context-parallel ranks.

    Args:
        batch: whole rows, on the CPU; the same on every rank of the group.
        cp_rank: this rank's place in the group.
        cp_size: size of the group; 1 returns the batch itself.
        dealt_as: whole rows that decide which token goes where; None: these.
    """
    if cp_size == 1:
        return batch
    return batch.take_tokens(deal_context(batch if dealt_as is None else dealt_as, cp_size)[:, cp_rank])
