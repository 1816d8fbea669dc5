"""Rows joined into a micro-batch."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megatron_dllm.data.batch import Batch, Kind, collate, kind_of
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import row_forward_tokens
from megatron_dllm.data.row import Row
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
    assert batch.num_segments.tolist() == [2, 0, 1]
    assert batch.to("cpu").input_ids.equal(batch.input_ids)


@pytest.fixture
def rows() -> list[Row]:
    geometry = RowGeometry("block_diffusion", 4, 32, 96, 2)
    return [
        make_row(lengths, geometry, spec(2), sample_ids=[100 * (start + i) for i in range(len(lengths))])
        for start, lengths in [(0, [13, 6]), (2, []), (3, [20]), (4, [1, 2, 3])]
    ]


def test_rows_taken_apart_are_the_rows_that_were_joined(rows: list[Row]) -> None:
    batch = collate(rows)
    for part, row in zip(batch.split_rows(), rows, strict=True):
        expected_part = collate([row])
        for item in fields(Batch):
            expected_value = getattr(batch if kind_of(item) is Kind.TOTAL else expected_part, item.name)
            assert torch.equal(getattr(part, item.name), expected_value), item.name


def test_targets_know_their_document_and_view(rows: list[Row]) -> None:
    batch = collate(rows)
    lengths = enumerate([13, 6, 20, 1, 2, 3])
    tokens = [(segment, view, token) for segment, n in lengths for view in (1, 2) for token in range(n)]
    is_masked = torch.cat([torch.from_numpy(row.is_masked[row.roles[:, 2] > 0]) for row in rows])
    expected = [name for name, masked in zip(tokens, is_masked.tolist(), strict=True) if masked]
    positions = batch.position_ids.flatten()[batch.target_positions]
    found = zip(batch.target_segments.tolist(), batch.target_views.tolist(), positions.tolist(), strict=True)
    assert list(found) == expected and len(expected) == 45


def test_tokens_taken_in_another_order_keep_their_targets(rows: list[Row]) -> None:
    batch = collate(rows)
    order = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(row)) for row in range(4)])
    part = batch.take_tokens(order[:, :40])
    assert part.roles.shape == (4, 40, 3)
    expected_ids = batch.input_ids.gather(1, order[:, :40])
    assert torch.equal(part.input_ids, expected_ids)
    # Each target of the part stands on a masked token, and they are all there.
    assert part.target_positions.sort().values.tolist() == part.is_masked.flatten().nonzero().flatten().tolist()
    place = {(row, int(token)): index for row in range(4) for index, token in enumerate(order[row, :40])}
    kept = [i for i, position in enumerate(batch.target_positions.tolist()) if divmod(position, 96) in place]
    assert 0 < len(kept) < len(batch.target_ids)
    for name in ("target_ids", "target_t", "loss_weights", "target_segments", "target_views"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[kept]), name
