"""Clean copies in blocks of their own, and the AR targets of their tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import row_forward_tokens
from megatron_dllm.data.row import Row
from megatron_dllm.diffusion.roles import visible, visible_keys
from tests.unit.data.made_rows import PAD, make_masked_row, make_row, spec
from tests.unit.data.random_spans import random_spans

GUIDED = RowGeometry("block_diffusion", 4, 32, 128, 1, clean_block_size=1, ar_share=1.0)
LENGTHS = [13, 1, 9, 6]


def test_guided_row_by_hand() -> None:
    geometry = RowGeometry("block_diffusion", 2, 8, 16, 1, clean_block_size=1, ar_share=1.0)
    row = make_masked_row([5, 2], geometry, [[0, 1, 0, 0, 1, 1, 0]])
    # Noisy blocks have the numbers of the clean tokens that they begin with.
    assert row.roles[:11, 1].tolist() == [0, 0, 2, 2, 4, 0, 1, 2, 3, 0, 0]
    row = make_row([5, 2], geometry, spec())
    assert row.input_ids[[*range(5, 9), 11]].tolist() == [1, 2, 3, 4, 11] and row.input_ids[12:].tolist() == [PAD] * 4
    assert row.roles[:12, 2].tolist() == [1] * 5 + [0] * 4 + [1] * 2 + [0]
    is_clean = row.is_ar_target
    assert row.target_positions[is_clean].tolist() == [5, 6, 7, 8, 11]
    assert row.target_ids[is_clean].tolist() == [2, 3, 4, 5, 12]
    assert row.loss_weights[is_clean].tolist() == [1.0] * 5 and row.target_t[is_clean].tolist() == [0.0] * 5
    assert (row.num_maskable, row.num_ar_maskable, row.num_forward_tokens) == (7, 5, 12)
    assert (np.diff(row.target_positions) > 0).all()


def _equal(left: Row, right: Row) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in Row.__dataclass_fields__)


@pytest.mark.parametrize("block_origin", ["document", "row"])
def test_clean_blocks_as_large_as_noisy_ones_are_the_default(block_origin: str) -> None:
    geometry = RowGeometry("block_diffusion", 4, 32, 96, 2, block_origin)
    expected = make_row(LENGTHS, geometry, spec(2))
    assert _equal(make_row(LENGTHS, replace(geometry, clean_block_size=4), spec(2)), expected)
    assert not _equal(make_row(LENGTHS, replace(geometry, clean_block_size=1), spec(2)), expected)


def _expected_mask(row: Row, block_size: int, clean: int, first: np.ndarray) -> np.ndarray:
    """By positions: noisy tokens see their block and the clean blocks before, clean ones up to their block's end."""
    doc, _, view = row.roles.T
    place = row.position_ids + np.where(doc >= 0, first[doc], 0)
    noisy_block, clean_block = place // block_size, place // clean
    same = (doc[:, None] == doc) & (doc[:, None] >= 0)
    is_clean_key, is_clean_query = view == 0, (view == 0)[:, None]
    own = (view[:, None] == view) & (noisy_block[:, None] == noisy_block)
    before = is_clean_key & (noisy_block < noisy_block[:, None])
    return same & np.where(is_clean_query, is_clean_key & (clean_block <= clean_block[:, None]), own | before)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("block_size, clean", [(4, 4), (4, 2), (4, 1), (6, 3), (1, 1)])
def test_the_predicate_gives_the_mask_of_two_grids(block_size: int, clean: int, seed: int) -> None:
    generator = np.random.default_rng([seed, block_size, clean])
    lengths = generator.integers(1, 13, generator.integers(1, 4)).tolist()
    views, origin = int(generator.integers(1, 3)), ["document", "row"][seed % 2]
    share = 1.0 if clean == 1 and seed % 3 else 0.0
    geometry = RowGeometry(
        "block_diffusion", block_size, 12, 120, views, origin, clean_block_size=clean, ar_share=share
    )
    row = make_row(lengths, geometry, spec(views))
    roles = torch.from_numpy(row.roles)
    mask = visible(roles, roles).numpy()
    first = geometry.grid_starts(np.cumsum(lengths) - lengths)
    assert (mask == _expected_mask(row, block_size, clean, first)).all()
    assert (visible_keys(row.roles) == mask.sum(1)).all()


def test_with_a_shift_the_first_tokens_of_blocks_have_two_losses() -> None:
    """The slot before a block predicts its first token for the diffusion loss and, as all do, for the AR loss."""
    geometry = replace(GUIDED, shift=True)
    row = make_row(LENGTHS, geometry, spec())
    plain = make_row(LENGTHS, replace(geometry, ar_share=0.0), spec())
    own = ~row.is_ar_target
    for name in ("target_ids", "loss_weights", "target_t"):
        assert getattr(row, name)[own].tolist() == getattr(plain, name).tolist()
    assert row.num_maskable == plain.num_maskable
    places = row.target_positions[row.is_ar_target]
    assert len(places) == len(set(places.tolist())) == row.num_ar_maskable == sum(LENGTHS) - len(LENGTHS)
    assert (row.target_ids[row.is_ar_target] == row.input_ids[places] + 1).all()
    leading = set(row.target_positions[own].tolist()) & set(places.tolist())
    assert len(leading) == 3 + 0 + 2 + 1, "block starts 4, 8, 12 of 13 tokens, 4 and 8 of 9, 4 of 6"


def test_an_ar_target_is_the_next_token_of_its_document() -> None:
    row = make_row(LENGTHS, replace(GUIDED, ar_share=0.5), spec(), epoch=2)
    is_clean = row.roles[row.target_positions, 2] == 0
    places = row.target_positions[is_clean]
    # Tokens of document i are 1, 2, 3, ... + 10 i, so the next one is one more, and never beyond the document's last.
    assert (row.target_ids[is_clean] == row.input_ids[places] + 1).all()
    assert (row.position_ids[places] + 1 < np.array(LENGTHS)[row.roles[places, 0]]).all()
    assert set(row.loss_weights[is_clean].tolist()) == {2.0} and row.num_ar_maskable == sum(LENGTHS) - len(LENGTHS)


def _drawn(lengths: list[int], sample_ids: list[int], epoch: int = 0, share: float = 0.5) -> set[tuple[int, int]]:
    """(sample, place) of the clean tokens that were drawn."""
    row = make_row(lengths, replace(GUIDED, ar_share=share), spec(), epoch=epoch, sample_ids=sample_ids)
    places = row.target_positions[row.roles[row.target_positions, 2] == 0]
    return set(zip(row.sample_ids[row.roles[places, 0]].tolist(), row.position_ids[places].tolist(), strict=True))


def test_the_share_follows_from_the_sample_alone() -> None:
    expected = _drawn([30, 20], [0, 100])
    assert _drawn([20, 30], [100, 0]) == expected
    assert _drawn([30, 20], [0, 100], epoch=1) != expected


def test_the_share_is_unbiased() -> None:
    number = sum(len(_drawn([32], [100 * sample], share=0.25)) for sample in range(400))
    mean, deviation = 400 * 31 * 0.25, (400 * 31 * 0.25 * 0.75) ** 0.5
    assert abs(number - mean) < 4 * deviation


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "geometry",
    [
        GUIDED,
        replace(GUIDED, prune_clean=False),
        replace(GUIDED, block_origin="row", block_size=8),
        replace(GUIDED, shift=True),
        replace(GUIDED, shift=True, block_size=1),
    ],
)
def test_only_what_may_carry_a_loss_is_predicted(geometry: RowGeometry, seed: int) -> None:
    spans = random_spans(LENGTHS, seed)
    kinds = spans.kinds(np.array(LENGTHS))
    row = make_row(LENGTHS, geometry, spec(), kinds=kinds.tolist())
    assert row.num_forward_tokens == (row.roles[:, 0] >= 0).sum() == row_forward_tokens(geometry, LENGTHS, spans)
    places, starts = row.target_positions[row.is_ar_target], np.cumsum(LENGTHS) - LENGTHS
    predicted = starts[row.roles[places, 0]] + row.position_ids[places] + 1
    expected = [place for place in np.flatnonzero(kinds == 1) if place not in starts]
    assert sorted(predicted.tolist()) == expected and row.num_ar_maskable == len(expected)


def test_clean_tokens_that_nobody_needs_are_left_out() -> None:
    """4 noisy tokens of the last block, clean ones up to the one that predicts the last answer's token."""
    kinds = [0] * 9 + [1, 1, 0]
    for share, expected in ((0.0, 4 + 8), (1.0, 4 + 10)):
        row = make_row([12], replace(GUIDED, ar_share=share), spec(), kinds=kinds)
        assert row.num_forward_tokens == expected
