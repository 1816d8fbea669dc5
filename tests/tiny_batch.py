"""Micro-batches written by hand from document lengths, for tests that must not depend on the packing of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.batch import Batch


def tiny_batch(
    model: ModelConfig,
    rows: Sequence[Sequence[int]],
    row_length: int,
    block_size: int,
    *,
    num_views: int = 1,
    has_clean: bool = True,
    mask_ratio: float = 0.5,
    seed: int = 0,
) -> Batch:
    """Rows of documents of the given lengths; num_views 0 is AR (clean tokens that predict the next).

    Each document lies as its noisy views and then its clean copy; the rest of a row is padding.
    """
    generator = torch.Generator().manual_seed(seed)
    b, shape = len(rows), (len(rows), row_length)
    input_ids, labels = torch.full(shape, model.pad_token_id), torch.full(shape, -1)
    position_ids, is_masked = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    roles = torch.tensor([-1, 0, 0], dtype=torch.int32).repeat(*shape, 1)
    for row, lengths in enumerate(rows):
        start = 0
        for document, length in enumerate(lengths):
            tokens = torch.randint(model.vocab_size - 4, (length,), generator=generator)
            views = [*range(1, num_views + 1)] + ([0] if has_clean or num_views == 0 else [])
            for view in views:
                place = slice(start, start + length)
                masked = (torch.rand(length, generator=generator) < mask_ratio) & (view > 0)
                input_ids[row, place] = torch.where(masked, model.mask_token_id, tokens)
                is_masked[row, place] = masked
                labels[row, place] = torch.where(masked, tokens, -1)
                if num_views == 0:
                    labels[row, start : start + length - 1] = tokens[1:]
                position_ids[row, place] = torch.arange(length)
                block = torch.arange(length) if num_views == 0 else torch.arange(length) // block_size
                roles[row, place] = torch.stack(
                    [torch.full_like(block, document), block, torch.full_like(block, view)], -1
                ).int()
                start += length
        assert start <= row_length, f"documents of {start} tokens in a row of {row_length}"
    targets = (labels.flatten() >= 0).nonzero().flatten()
    weights = 0.5 + torch.rand(len(targets), generator=generator)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        roles=roles,
        is_masked=is_masked,
        target_positions=targets,
        target_ids=labels.flatten()[targets],
        loss_weights=weights,
        target_t=torch.full((len(targets),), mask_ratio),
        num_segments=torch.tensor([len(lengths) for lengths in rows]),
        segment_epochs=torch.zeros(sum(len(row) for row in rows), dtype=torch.int64),
        segment_maskable=torch.tensor([length for lengths in rows for length in lengths]),
        row_keys=torch.arange(b) * 7919 + 13,
        sample_ids=torch.arange(sum(len(row) for row in rows)),
        is_fill=torch.zeros(len(targets), dtype=torch.bool),
        is_ar_target=torch.zeros(len(targets), dtype=torch.bool),
        num_maskable=torch.tensor(len(targets)),
        num_answers=torch.tensor(sum(len(row) for row in rows)),
        num_ar_maskable=torch.tensor(0),
        num_document_tokens=torch.tensor(sum(sum(row) for row in rows)),
        num_forward_tokens=torch.tensor(int((roles[..., 0] >= 0).sum())),
    )
