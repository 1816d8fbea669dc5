"""Context-parallel shards of a micro-batch: together they are the whole batch, token by token."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megatron_dllm.data.batch import Batch
from megatron_dllm.data.context_shard import deal_context, take_context_shard
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch

COUNTS = (
    "row_keys",
    "sample_ids",
    "num_segments",
    "segment_epochs",
    "segment_maskable",
    "num_maskable",
    "num_answers",
    "num_ar_maskable",
    "num_document_tokens",
    "num_forward_tokens",
)


@pytest.fixture
def batch() -> Batch:
    return tiny_batch(tiny_model(), [[40, 20], [57], [3]], row_length=128, block_size=4)


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_shards_together_are_the_batch(batch: Batch, cp_size: int) -> None:
    order = deal_context(batch, cp_size)
    assert order.shape == (3, cp_size, 128 // cp_size)
    shards = [take_context_shard(batch, rank, cp_size) for rank in range(cp_size)]
    place = order.flatten(1).argsort(1)
    for name in ("input_ids", "position_ids", "is_masked"):
        whole = torch.cat([getattr(shard, name) for shard in shards], 1).gather(1, place)
        assert torch.equal(whole, getattr(batch, name))
    roles = torch.cat([shard.roles for shard in shards], 1)
    assert torch.equal(roles.gather(1, place.unsqueeze(-1).expand(-1, -1, 3)), batch.roles)
    for name in COUNTS:
        assert all(getattr(shard, name) is getattr(batch, name) for shard in shards)
    assert {f.name for f in fields(Batch)} == {
        *COUNTS,
        "input_ids",
        "position_ids",
        "is_masked",
        "roles",
        "target_positions",
        "target_ids",
        "loss_weights",
        "target_t",
        "is_fill",
        "is_ar_target",
    }


@pytest.mark.parametrize("cp_size", [2, 4])
def test_targets_point_at_the_same_tokens(batch: Batch, cp_size: int) -> None:
    """A target is found again by the row, role and position of its token."""

    def named(part: Batch) -> list[tuple[float, ...]]:
        row = part.target_positions // part.input_ids.shape[1]
        roles = part.roles.flatten(0, 1)[part.target_positions]
        positions = part.position_ids.flatten()[part.target_positions]
        columns = [row, *roles.unbind(-1), positions, part.target_ids, part.loss_weights, part.target_t]
        return list(zip(*(column.tolist() for column in columns), strict=True))

    found = [name for rank in range(cp_size) for name in named(take_context_shard(batch, rank, cp_size))]
    assert sorted(found) == sorted(named(batch)) and len(found) > 20


@pytest.mark.parametrize("cp_size", [2, 4])
def test_sums_over_documents_add_up_over_shards(batch: Batch, cp_size: int) -> None:
    def sums(part: Batch) -> torch.Tensor:
        zero = torch.zeros(len(part.sample_ids), dtype=torch.float64)
        return zero.index_add(0, part.target_segments, part.loss_weights.double())

    shards = [take_context_shard(batch, rank, cp_size) for rank in range(cp_size)]
    torch.testing.assert_close(sum(sums(shard) for shard in shards), sums(batch), rtol=1e-12, atol=0)
    assert sums(batch).count_nonzero() == 4  # every document of the batch


def test_one_rank_keeps_the_batch(batch: Batch) -> None:
    assert take_context_shard(batch, 0, 1) is batch
