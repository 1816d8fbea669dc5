"""From packed rows to the tensors of one micro-batch: layout of a row's tokens, noise, roles, targets.

A document piece of n tokens is laid out as its noisy views, one after the other, followed by the
clean tokens that some later block reads:

    [view 1: n tokens] [view 2: n tokens] ... [clean: n tokens, less the last block]

so that a query's visible keys are at most two intervals of the row. An AR piece is its clean tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


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
