"""The number that says what a step was trained on."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from megatron_dllm.data.batch import Batch
from megatron_dllm.training.observers.fingerprint import row_digests
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch


@pytest.fixture
def batch() -> Batch:
    """Rows of two, one and three documents."""
    return tiny_batch(tiny_model(), [[10, 5], [20], [3, 4, 5]], row_length=48, block_size=4)


def _row(batch: Batch, row: int, samples: slice) -> Batch:
    """One row as a micro-batch of its own."""
    length = batch.input_ids.shape[1]
    mine = batch.target_positions // length == row
    per_row = {
        name: getattr(batch, name)[row : row + 1]
        for name in ("input_ids", "position_ids", "roles", "is_masked", "row_keys", "num_segments")
    }
    per_target = {
        name: getattr(batch, name)[mine]
        for name in ("target_ids", "loss_weights", "target_t", "is_fill", "is_ar_target")
    }
    return replace(
        batch,
        **per_row,
        **per_target,
        target_positions=batch.target_positions[mine] - row * length,
        sample_ids=batch.sample_ids[samples],
    )


def test_rows_have_the_same_digest_in_any_micro_batch(batch: Batch) -> None:
    alone = [_row(batch, row, samples) for row, samples in enumerate([slice(0, 2), slice(2, 3), slice(3, 6)])]
    assert [digest for part in alone for digest in row_digests(part)] == row_digests(batch)
    assert len(set(row_digests(batch))) == 3


def test_the_digest_is_of_these_fields_in_this_order(batch: Batch) -> None:
    """The order that every recorded fingerprint was made in."""
    row = _row(batch, 1, slice(2, 3))
    names = ("sample_ids", "row_keys", "input_ids", "is_masked")
    names += ("target_positions", "target_ids", "target_t", "loss_weights")
    content = b"".join(getattr(row, name).numpy().tobytes() for name in names)
    assert row_digests(batch)[1] == hashlib.sha256(content).digest()


@pytest.mark.parametrize(
    "name", ["input_ids", "is_masked", "row_keys", "sample_ids", "target_ids", "target_t", "loss_weights"]
)
def test_any_change_shows_in_its_row_alone(batch: Batch, name: str) -> None:
    value = getattr(batch, name).clone()
    if value.dim() == 1 and name not in ("row_keys", "sample_ids"):
        place = int((batch.target_positions // batch.input_ids.shape[1] == 1).nonzero()[0])
    else:
        place = {"sample_ids": 2}.get(name, 1)
    first = value[place] if value.dim() == 1 else value[place][0]
    first.copy_(~first if first.dtype == torch.bool else first + 1)
    before, after = row_digests(batch), row_digests(replace(batch, **{name: value}))
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
