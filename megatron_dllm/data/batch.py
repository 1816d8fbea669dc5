"""The tensors of one micro-batch, joined from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from megatron_dllm.data.row import Row


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `b` rows of `s` tokens, `T` tokens that carry a loss (flattened over rows).

    Attributes:
        input_ids: [b, s] int64, what the model reads: x_t in noisy views, x_0 in clean copies.
        position_ids: [b, s] int64, position inside the document piece; every copy of a token shares it.
        roles: [b, s, 3] int32 (doc, block, view), see `diffusion.roles`.
        is_masked: [b, s] bool, noisy tokens replaced by the mask token.
        target_positions: [T] int64, index into the flattened [b * s] tokens whose output carries a loss.
        target_ids: [T] int64, the token to be predicted there.
        loss_weights: [T] fp32, e.g. 1/t for the ELBO.
        target_t: [T] fp32, noise level of the target's block (0 in AR).
        row_keys: [b] int64, a number that identifies the row's content wherever it is computed.
        sample_ids: [p] int64, sample ids of the pieces in the micro-batch, in order.
        num_maskable: [] int64, tokens that could have carried a loss: the denominator.
        num_document_tokens: [] int64, tokens of the corpus consumed (each once, whatever its copies).
        num_forward_tokens: [] int64, tokens the model sees, padding not counted.
    """

    input_ids: Tensor
    position_ids: Tensor
    roles: Tensor
    is_masked: Tensor
    target_positions: Tensor
    target_ids: Tensor
    loss_weights: Tensor
    target_t: Tensor
    row_keys: Tensor
    sample_ids: Tensor
    num_maskable: Tensor
    num_document_tokens: Tensor
    num_forward_tokens: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Copy every tensor to `device` (asynchronously from pinned memory)."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> Batch:
        """Copy every tensor to page-locked memory; a DataLoader calls it."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows of one length into a micro-batch; target positions then count over all of them."""
    row_length = len(rows[0].input_ids)
    positions = [row.target_positions + index * row_length for index, row in enumerate(rows)]
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        position_ids=torch.from_numpy(np.stack([row.position_ids for row in rows])),
        roles=torch.from_numpy(np.stack([row.roles for row in rows])),
        is_masked=torch.from_numpy(np.stack([row.is_masked for row in rows])),
        target_positions=torch.from_numpy(np.concatenate(positions)),
        target_ids=torch.from_numpy(np.concatenate([row.target_ids for row in rows])),
        loss_weights=torch.from_numpy(np.concatenate([row.loss_weights for row in rows])),
        target_t=torch.from_numpy(np.concatenate([row.target_t for row in rows])),
        row_keys=torch.tensor([row.row_key for row in rows], dtype=torch.int64),
        sample_ids=torch.from_numpy(np.concatenate([row.sample_ids for row in rows])),
        num_maskable=torch.tensor(sum(row.num_maskable for row in rows)),
        num_document_tokens=torch.tensor(sum(row.num_document_tokens for row in rows)),
        num_forward_tokens=torch.tensor(sum(row.num_forward_tokens for row in rows)),
    )
