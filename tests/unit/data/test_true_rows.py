"""Rows as an AR model reads them: each token once, with its true id, in the slots that are there."""

from __future__ import annotations

import pytest
import torch

from megatron_dllm.data.true_rows import true_rows
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch

LENGTHS = [[17, 9], [24]]


@pytest.mark.parametrize("has_clean", [True, False])
def test_every_token_of_a_document_stands_once_and_unmasked(has_clean: bool) -> None:
    model = tiny_model()
    noisy = tiny_batch(model, LENGTHS, row_length=80, block_size=4, num_views=2, has_clean=has_clean)
    expected = tiny_batch(model, LENGTHS, row_length=80, block_size=4, num_views=2, has_clean=has_clean, mask_ratio=0.0)
    # The masks of the second batch are drawn too, so its tokens are those of the first.
    shown = true_rows(noisy, shift=False)
    assert not bool(shown.is_masked.any()) and torch.equal(shown.target_positions, noisy.target_positions)
    assert torch.equal(shown.position_ids, noisy.position_ids)
    for row, lengths in enumerate(LENGTHS):
        is_here = shown.roles[row, :, 0] >= 0
        assert int(is_here.sum()) == sum(lengths)
        assert torch.equal(shown.input_ids[row, is_here], expected.input_ids[row, is_here])
        for document, length in enumerate(lengths):
            roles = shown.roles[row][shown.roles[row, :, 0] == document]
            places = shown.position_ids[row][shown.roles[row, :, 0] == document]
            assert sorted(places.tolist()) == list(range(length))
            assert torch.equal(roles[:, 1].long(), places) and bool((roles[:, 2] == 0).all())


def test_a_target_of_the_next_token_tells_that_one() -> None:
    model = tiny_model()
    batch = tiny_batch(model, [[9]], row_length=12, block_size=4, mask_ratio=0.0, has_clean=False)
    true_ids = batch.input_ids.clone()
    batch.input_ids[0, 3], batch.is_masked[0, 3] = model.mask_token_id, True
    batch = batch.__class__(
        **{
            **vars(batch),
            "target_positions": torch.tensor([2]),
            "target_ids": true_ids[0, 3:4],
            "target_t": torch.ones(1),
            "loss_weights": torch.ones(1),
            "is_fill": torch.zeros(1, dtype=torch.bool),
        }
    )
    assert torch.equal(true_rows(batch, shift=True).input_ids, true_ids)
