"""Rows by hand, and the rules every row obeys whatever its noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dllm.config.sft import TURN_BOUNDARIES
from megatron_dllm.data.costs import segment_costs
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import row_document_tokens, row_forward_tokens
from megatron_dllm.data.row import Row
from megatron_dllm.data.row_noise import draw_row_noise
from megatron_dllm.data.row_tokens import collect_tokens
from megatron_dllm.data.shuffle import mix_key
from megatron_dllm.data.spans import MASKABLE
from megatron_dllm.diffusion.noise import sample_noise
from megatron_dllm.diffusion.roles import visible
from tests.unit.data.made_rows import EOS, MASK, PAD, make_masked_row, make_plan, make_row, spans_of_kinds, spec
from tests.unit.data.random_spans import random_spans


def test_block_diffusion_row_by_hand() -> None:
    geometry = RowGeometry("block_diffusion", 2, 8, 16, 1)
    row = make_masked_row([5, 2], geometry, [[0, 1, 0, 0, 1, 1, 0]], epoch=3)
    # Segment 0: 5 noisy, 4 clean (blocks of 2, 2, 1: the last is not read). Segment 1: one block, no clean copy.
    assert row.input_ids.tolist() == [1, 99, 3, 4, 99, 1, 2, 3, 4, 99, 12] + [PAD] * 5
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1] + [0] * 5
    assert row.roles[:, 0].tolist() == [0] * 9 + [1] * 2 + [-1] * 5
    assert row.roles[:, 1].tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 1, 0, 0] + [0] * 5
    assert row.roles[:, 2].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1] + [0] * 5
    assert np.flatnonzero(row.is_masked).tolist() == [1, 4, 9]
    assert row.target_positions.tolist() == [1, 4, 9]
    assert row.target_ids.tolist() == [2, 5, 11]
    assert row.loss_weights.tolist() == [11.0, 11.0, 11.0]
    np.testing.assert_allclose(row.target_t, [0.2, 0.5, 0.1], rtol=1e-6)
    assert (row.num_maskable, row.num_document_tokens, row.num_forward_tokens) == (7, 7, 11)
    assert row.row_keys.tolist() == [mix_key(3, 0)]
    assert row.sample_ids.tolist() == [0, 100]


def test_complementary_row_by_hand() -> None:
    row = make_masked_row([3], RowGeometry("block_diffusion", 2, 4, 12, 2), [[1, 0, 0], [0, 1, 1]])
    assert row.input_ids.tolist() == [99, 2, 3, 1, 99, 99, 1, 2] + [PAD] * 4
    assert row.roles[:8].tolist() == [
        [0, 0, 1],
        [0, 0, 1],
        [0, 1, 1],
        [0, 0, 2],
        [0, 0, 2],
        [0, 1, 2],
        [0, 0, 0],
        [0, 0, 0],
    ]
    assert row.target_positions.tolist() == [0, 4, 5]
    assert row.target_ids.tolist() == [1, 2, 3]
    assert row.loss_weights.tolist() == [11.0, 12.0, 12.0]
    assert (row.num_maskable, row.num_document_tokens, row.num_forward_tokens) == (6, 3, 8)


def test_mdlm_row_by_hand() -> None:
    row = make_masked_row([3, 4], RowGeometry("block_diffusion", 4, 4, 8, 1), [[1, 1, 0, 0, 0, 0, 1]])
    assert row.input_ids.tolist() == [99, 99, 3, 11, 12, 13, 99, PAD]
    assert row.roles.tolist() == [[0, 0, 1]] * 3 + [[1, 0, 1]] * 4 + [[-1, 0, 0]]
    assert row.target_ids.tolist() == [1, 2, 14]


def test_ar_row_by_hand() -> None:
    row = make_row([3, 1, 2], RowGeometry("ar", 1, 4, 8, 0), None)
    assert row.input_ids.tolist() == [1, 2, 3, 11, 21, 22, PAD, PAD]
    assert row.roles.tolist() == [
        [0, 0, 0],
        [0, 1, 0],
        [0, 2, 0],
        [1, 0, 0],
        [2, 0, 0],
        [2, 1, 0],
        [-1, 0, 0],
        [-1, 0, 0],
    ]
    # The last token of a segment predicts nothing.
    assert row.target_positions.tolist() == [0, 1, 4]
    assert row.target_ids.tolist() == [2, 3, 22]
    assert row.loss_weights.tolist() == [1.0] * 3 and row.target_t.tolist() == [0.0] * 3
    assert (row.num_maskable, row.num_document_tokens, row.num_forward_tokens) == (3, 6, 6)
    assert not row.is_masked.any()


def test_row_grid_by_hand() -> None:
    geometry = RowGeometry("block_diffusion", 2, 4, 16, 1, block_origin="row")
    row = make_masked_row([3, 4], geometry, [[1, 0, 0, 0, 1, 0, 0]])
    # Tokens 0..6 of the row in blocks of 2: segment 0 has sizes 2, 1; segment 1 starts in mid-block with 1, 2, 1.
    assert row.roles[:, 1].tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3, 1, 2, 2] + [0] * 4
    assert row.roles[:, 2].tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0] + [0] * 4
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2] + [0] * 4


def test_shifted_row_by_hand() -> None:
    geometry = RowGeometry("block_diffusion", 2, 5, 16, 2, shift=True)
    row = make_masked_row([5, 2], geometry, [[0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0]])
    # Segment 0: the last block's one token is predicted before it, so no view shows it. Segment 1: one block.
    noisy, clean = [1, 99, 3, 99, 1, 2, 3, 99], [1, 2, 3, 4]
    assert row.input_ids.tolist() == [*noisy, *clean, 11, 99, 11, 12]
    assert row.roles[:12, 1].tolist() == [0, 0, 1, 1] * 3
    assert np.flatnonzero(row.is_masked).tolist() == [1, 3, 7, 13]
    # Noisy tokens at the slot before them; tokens 3 and 5, first of their blocks, at the clean 2 and 4.
    assert row.target_positions.tolist() == [0, 2, 6, 9, 11, 12]
    assert row.target_ids.tolist() == [2, 4, 4, 3, 5, 12]
    # A first token is predicted once for both views, in each of which it would weigh 1.
    assert row.loss_weights.tolist() == [11.0, 11.0, 12.0, 2.0, 2.0, 11.0]
    assert row.target_t[3:5].tolist() == [0.0, 0.0]
    # All but the first token of each segment, in two views.
    assert row.num_maskable == 2 * 5 and row.segment_maskable.tolist() == [4, 1]
    assert (row.num_document_tokens, row.num_forward_tokens) == (7, 16)


@pytest.mark.parametrize("prune_clean", [True, False])
@pytest.mark.parametrize("kinds", [None, [0, 0, 1, 1, 1, 0, 1, 1, 0]])
def test_blocks_of_one_token_with_a_shift_are_ar(kinds: list[int] | None, prune_clean: bool) -> None:
    geometry = RowGeometry("block_diffusion", 1, 8, 16, 1, prune_clean=prune_clean, shift=True)
    row = make_row([5, 1, 3], replace(geometry, row_length=32), spec(), kinds=kinds)
    ar = make_row([5, 1, 3], RowGeometry("ar", 1, 8, 16, 0), None, kinds=kinds)
    slots = [roles.tolist() for roles in row.roles[row.target_positions]]
    assert slots == [roles.tolist() for roles in ar.roles[ar.target_positions]]
    assert row.target_ids.tolist() == ar.target_ids.tolist() and not row.is_masked.any()
    assert row.loss_weights.tolist() == ar.loss_weights.tolist()
    assert (row.num_maskable, row.num_answers) == (ar.num_maskable, ar.num_answers)
    # What the model sees is less than in AR: the last token of a segment predicts nothing.
    assert not prune_clean or row.num_forward_tokens <= ar.num_forward_tokens


@pytest.mark.parametrize("boundary", TURN_BOUNDARIES)
@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_shifted_rows_predict_every_token_once_a_view_and_never_from_itself(block_size: int, boundary: str) -> None:
    generator = np.random.default_rng(block_size)
    for num_views in (1, 2):
        lengths = generator.integers(1, 17, 6)
        kinds = random_spans(lengths.tolist(), seed=block_size).kinds(lengths).tolist()
        spans = spans_of_kinds(lengths.tolist(), kinds)
        geometry = RowGeometry("block_diffusion", block_size, 16, 1000, num_views, fill="eos", turn_boundary=boundary)
        geometry = replace(geometry, shift=True)
        row = make_row(lengths.tolist(), geometry, spec(num_views), kinds=kinds)
        assert row.num_forward_tokens == row_forward_tokens(geometry, lengths, spans)
        mask = visible(torch.from_numpy(row.roles), torch.from_numpy(row.roles)).numpy()
        sees_clean = mask & ~row.is_masked
        for slot, token in zip(row.target_positions, row.target_ids, strict=True):
            place = row.position_ids[slot] + 1
            assert token == EOS or token == 1 + place + 10 * row.roles[slot, 0]
            is_itself = (row.position_ids == place) & (row.roles[:, 0] == row.roles[slot, 0])
            assert not (sees_clean[slot] & is_itself).any()
        if boundary in ("split_views", "all"):
            # Every trained token but the first of a segment, and the fill, is counted once a view.
            starts = np.cumsum(lengths) - lengths
            num_trained = (np.array(kinds) == MASKABLE).sum() - (np.array(kinds)[starts] == MASKABLE).sum()
            fill = row_document_tokens(geometry, lengths, spans) - lengths.sum()
            assert row.num_maskable == num_views * (num_trained + fill)


@pytest.mark.parametrize("block_origin", ["document", "row"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_shifted_text_costs_what_its_rows_hold(block_size: int, block_origin: str) -> None:
    generator = np.random.default_rng(7)
    for _ in range(20):
        lengths = generator.integers(1, 9, 5)
        geometry = RowGeometry("block_diffusion", block_size, 8, 300, 2, block_origin, shift=True)
        row = make_row(lengths.tolist(), geometry, spec(2))
        assert row.num_forward_tokens == row_forward_tokens(geometry, lengths)
        assert row.num_maskable == 2 * (lengths - 1).sum()
        assert row.num_forward_tokens <= segment_costs(geometry, lengths).sum()


@pytest.mark.parametrize("block_origin", ["document", "row"])
def test_a_row_draws_the_noise_of_its_segments(block_origin: str) -> None:
    geometry = RowGeometry("block_diffusion", 2, 8, 16, 1, block_origin)
    plan, content = make_plan([3, 4], epoch=3, kinds=[1, 1, 1, 1, 0, 1, 1])
    tokens = collect_tokens(content, np.array([3, 4]), geometry, None)
    drawn = draw_row_noise(plan, content, tokens, spec(), seed=5)
    # Block ids count from each segment's first: under the row grid the second segment begins in mid-block.
    second = [0, 0, 1, 1] if block_origin == "document" else [0, 1, 1, 2]
    for sample_id, ordinal, place, block_ids in [(0, 0, slice(0, 3), [0, 0, 1]), (100, 1, slice(3, 7), second)]:
        expected = sample_noise(
            spec(),
            seed=5,
            epoch=3,
            sample_id=sample_id,
            ordinal=ordinal,
            row_key=mix_key(3, 0),
            block_ids=np.array(block_ids),
            loss_mask=np.array([1, 1, 1, 1, 0, 1, 1], bool)[place],
        )
        for name in ("is_masked", "loss_weights", "t"):
            np.testing.assert_array_equal(getattr(drawn, name)[1:, place], getattr(expected, name))
    assert not drawn.is_masked[0].any() and drawn.is_masked.any()


def test_fixed_tokens_carry_no_loss() -> None:
    kinds = [0, 0, 1, 1, 1, 0, 1]
    row = make_row([5, 2], RowGeometry("ar", 1, 8, 8, 0), None, kinds=kinds)
    assert row.target_ids.tolist() == [3, 4, 5, 12] and row.num_maskable == 4
    row = make_row([5, 2], RowGeometry("block_diffusion", 4, 8, 24, 2), spec(2), kinds=kinds)
    assert sorted(row.target_ids.tolist()) == [3, 4, 5, 12]  # a complementary pair masks each of them once
    assert row.num_maskable == 8
    assert (row.input_ids[:2] == [1, 2]).all()


def test_pruned_row_by_hand() -> None:
    """Blocks of 2. Segment 0: prompt of 3, answer of 2, a tail of 3. Segment 1: everything may carry a loss."""
    geometry = RowGeometry("block_diffusion", 2, 8, 24, 2)
    kinds = [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    # Masked among the noisy tokens: 3 to 6 of segment 0, then segment 1.
    row = make_masked_row([8, 3], geometry, [[0, 1] + [0] * 5, [0, 0, 1, 0, 0, 0, 1]], kinds=kinds)
    # Noisy: blocks 1 and 2, twice. Clean: blocks 0 and 1, which block 2 reads. The tail is nowhere.
    first, second = [3, 99, 5, 6, 3, 4, 99, 6, 1, 2, 3, 4], [11, 12, 13, 11, 12, 99, 11, 12]
    assert row.input_ids.tolist() == [*first, *second, *[PAD] * 4]
    assert row.position_ids[:12].tolist() == [2, 3, 4, 5, 2, 3, 4, 5, 0, 1, 2, 3]
    assert row.roles[:12, 1].tolist() == [1, 1, 2, 2, 1, 1, 2, 2, 0, 0, 1, 1]
    assert row.roles[:12, 2].tolist() == [1] * 4 + [2] * 4 + [0] * 4
    assert row.target_positions.tolist() == [1, 6, 17] and row.target_ids.tolist() == [4, 5, 13]
    assert (row.num_maskable, row.num_document_tokens, row.num_forward_tokens) == (10, 11, 20)


def test_hidden_tokens_are_masked_in_every_view_without_a_loss() -> None:
    """Kind 2 in a kept block shows the mask token in both views, and the real token in the clean copy."""
    geometry = RowGeometry("block_diffusion", 2, 6, 16, 2)
    row = make_masked_row([5], geometry, [[0, 1, 0], [1, 0, 1]], kinds=[1, 1, 0, 2, 1])
    # Block 1 holds no maskable token, so it has no noisy copy, hidden token or not.
    assert row.input_ids.tolist() == [1, 99, 5, 99, 2, 99, 1, 2, 3, 4] + [PAD] * 6
    row = make_masked_row([4], geometry, [[1, 0, 1, 0], [0, 1, 0, 0]], kinds=[1, 1, 1, 2])
    assert row.input_ids.tolist() == [99, 2, 99, 99, 1, 99, 3, 99, 1, 2] + [PAD] * 6
    assert np.flatnonzero(row.is_masked).tolist() == [0, 2, 3, 5, 7]
    assert row.target_positions.tolist() == [0, 2, 5] and row.target_ids.tolist() == [1, 3, 2]
    assert row.num_maskable == 6


def test_row_of_no_segments_is_padding() -> None:
    for geometry, noise in [
        (RowGeometry("ar", 1, 4, 8, 0), None),
        (RowGeometry("block_diffusion", 2, 4, 8, 1), spec()),
    ]:
        row = make_row([], geometry, noise)
        assert (row.input_ids == PAD).all() and (row.roles == [-1, 0, 0]).all()
        assert (row.num_maskable, row.num_document_tokens, row.num_forward_tokens, len(row.target_ids)) == (0, 0, 0, 0)


GEOMETRIES = [
    RowGeometry("block_diffusion", 4, 32, 96, 1),
    RowGeometry("block_diffusion", 8, 32, 96, 2),
    RowGeometry("block_diffusion", 32, 32, 64, 1),
    RowGeometry("block_diffusion", 1, 32, 96, 1),
    RowGeometry("block_diffusion", 8, 32, 96, 1, block_origin="row"),
    RowGeometry("block_diffusion", 4, 32, 96, 1, prune_clean=False),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rules_of_every_diffusion_row(geometry: RowGeometry) -> None:
    lengths = [13, 1, 9, 6]
    row = make_row(lengths, geometry, spec(geometry.num_views))
    clean_ids = np.concatenate([1 + np.arange(n) + 10 * i for i, n in enumerate(lengths)])
    starts = np.cumsum(lengths) - lengths
    doc, block, view = row.roles.T
    present = doc >= 0
    expected_ids = clean_ids[np.where(present, starts[doc] + row.position_ids, 0)]
    assert row.num_forward_tokens == present.sum() == row_forward_tokens(geometry, lengths)
    assert (row.input_ids[present & ~row.is_masked] == expected_ids[present & ~row.is_masked]).all()
    assert (row.input_ids[row.is_masked] == MASK).all() and (view[row.is_masked] > 0).all()
    assert (row.target_positions == np.flatnonzero(row.is_masked)).all()
    assert (row.target_ids == expected_ids[row.target_positions]).all()
    assert (row.loss_weights > 0).all() and ((row.target_t > 0) & (row.target_t < 1)).all()
    if geometry.block_origin == "document":
        assert (block[present] == row.position_ids[present] // geometry.block_size).all()
    for number in range(1, geometry.num_views + 1):
        keys = [(d, p) for d, p, v in zip(doc, row.position_ids, view, strict=True) if v == number]
        assert keys == [(d, p) for d, n in enumerate(lengths) for p in range(n)]
    if geometry.num_views == 2:
        masked = [row.is_masked[view == number] for number in (1, 2)]
        assert (masked[0] ^ masked[1]).all()


@pytest.mark.parametrize("block_origin", ["document", "row"])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("block_size", [1, 3, 8, 16])
def test_pruned_clean_tokens_are_seen_by_no_noisy_query(block_origin: str, num_views: int, block_size: int) -> None:
    lengths = [11, 1, 5, 7]

    def seen_keys(prune_clean: bool) -> dict:
        geometry = RowGeometry("block_diffusion", block_size, 16, 128, num_views, block_origin, prune_clean)
        row = make_row(lengths, geometry, spec(num_views))
        roles = torch.from_numpy(row.roles)
        allowed = visible(roles, roles).numpy()
        names = list(zip(*row.roles.T[[0, 2]].tolist(), row.position_ids.tolist(), row.input_ids.tolist(), strict=True))
        return {names[q][:3]: {names[k] for k in np.flatnonzero(allowed[q])} for q in range(128) if names[q][1] > 0}

    pruned, expected_keys = seen_keys(True), seen_keys(False)
    assert len(pruned) == num_views * sum(lengths)
    assert pruned == expected_keys


@pytest.mark.parametrize("geometry", GEOMETRIES[:4])
def test_a_segment_has_the_same_noise_in_another_row(geometry: RowGeometry) -> None:
    def segments_of(row: Row) -> dict:
        """Everything the row says about each sample, by copy."""
        is_target = np.zeros(geometry.row_length)
        is_target[row.target_positions] = row.loss_weights
        content = np.stack([row.input_ids, row.position_ids, row.roles[:, 1], row.roles[:, 2], is_target])
        return {int(s): content[:, row.roles[:, 0] == i].tolist() for i, s in enumerate(row.sample_ids)}

    noise = spec(geometry.num_views, at_least_one=False)
    expected_segments = segments_of(make_row([13, 9, 6], geometry, noise, sample_ids=[0, 100, 200]))
    assert segments_of(make_row([6, 13], geometry, noise, sample_ids=[200, 0])) == {
        s: expected_segments[s] for s in (200, 0)
    }
    assert segments_of(make_row([13], geometry, noise, epoch=1, sample_ids=[0]))[0] != expected_segments[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("geometry", [*GEOMETRIES, RowGeometry("ar", 1, 32, 96, 0)])
def test_a_row_takes_the_tokens_that_packing_counts(geometry: RowGeometry, seed: int) -> None:
    lengths = [13, 1, 9, 6]
    spans = random_spans(lengths, seed)
    kinds = spans.kinds(np.array(lengths)).tolist()
    noise = spec(geometry.num_views) if geometry.num_views else None
    row = make_row(lengths, geometry, noise, kinds=kinds)
    assert row.num_forward_tokens == (row.roles[:, 0] >= 0).sum() == row_forward_tokens(geometry, lengths, spans)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_origin", ["document", "row"])
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_no_target_misses_what_was_left_out(block_origin: str, num_views: int, seed: int) -> None:
    """Every target of the full layout is there when pruned, with the same keys, mask, weight and label."""
    lengths = [11, 1, 5, 7]
    kinds = random_spans(lengths, seed).kinds(np.array(lengths)).tolist()

    def targets(prune_clean: bool) -> dict:
        geometry = RowGeometry("block_diffusion", 4, 16, 160, num_views, block_origin, prune_clean)
        row = make_row(lengths, geometry, spec(num_views), kinds=kinds)
        roles = torch.from_numpy(row.roles)
        allowed = visible(roles, roles).numpy()
        names = list(zip(*row.roles.T.tolist(), row.position_ids.tolist(), row.input_ids.tolist(), strict=True))
        values = zip(row.target_positions.tolist(), row.target_ids, row.loss_weights, row.target_t, strict=True)
        return {
            names[place]: (label, weight, t, {names[k] for k in np.flatnonzero(allowed[place])})
            for place, label, weight, t in values
        }

    assert targets(True) == targets(False)


def test_what_could_carry_a_loss_is_counted_once_for_all_views() -> None:
    geometry = RowGeometry("block_diffusion", 4, 8, 64, 3, fill="eos", turn_boundary="split_views")
    # Answers of 2 and 3 tokens, the first filled up with 2 to its block's end; a segment without an answer.
    row = make_row([6, 3, 4], geometry, spec(3), epoch=2, kinds=[0] * 4 + [1] * 2 + [0] * 3 + [0, 1, 1, 1])
    assert row.segment_maskable.tolist() == [4, 0, 3] and row.num_maskable == 3 * 7
    assert row.segment_epochs.tolist() == [2, 2, 2]
    ar = make_row([6, 3], RowGeometry("ar", 1, 8, 64, 0), None)
    assert ar.segment_maskable.tolist() == [5, 2]
