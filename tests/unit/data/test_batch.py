"""Rows joined into a micro-batch."""

from __future__ import annotations

import torch

from megatron_dllm.data.batch import collate
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import row_forward_tokens
from megatron_dllm.data.shuffle import mix_key
from tests.unit.data.made_rows import make_row, spec


def test_collate_counts_targets_over_all_rows() -> None:
    geometry = RowGeometry("block_diffusion", 4, 32, 64, 1)
    rows = [
        make_row([13, 6], geometry, spec()),
        make_row([], geometry, spec()),
        make_row([20], geometry, spec(), sample_ids=[700]),
    ]
    batch = collate(rows)
    assert batch.input_ids.shape == batch.position_ids.shape == batch.is_masked.shape == (3, 64)
    assert batch.roles.shape == (3, 64, 3) and batch.roles.dtype == torch.int32
    assert batch.input_ids.dtype == batch.target_positions.dtype == batch.target_ids.dtype == torch.int64
    assert batch.loss_weights.dtype == batch.target_t.dtype == torch.float32
    assert batch.is_masked.reshape(-1).nonzero().reshape(-1).tolist() == batch.target_positions.tolist()
    assert batch.target_ids.tolist() == [*rows[0].target_ids, *rows[2].target_ids]
    assert batch.row_keys.tolist() == [mix_key(0, 0), 0, mix_key(0, 700)]
    assert batch.sample_ids.tolist() == [0, 100, 700]
    assert (batch.num_maskable.item(), batch.num_document_tokens.item()) == (39, 39)
    assert batch.num_forward_tokens.item() == row_forward_tokens(geometry, [13, 6]) + row_forward_tokens(geometry, [20])
    assert batch.to("cpu").input_ids.equal(batch.input_ids)
