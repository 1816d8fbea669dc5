"""Rows of chats: what turns show and train, by hand, and that rows, costs and progress agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dllm.data.costs import document_tokens
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import row_forward_tokens
from megatron_dllm.data.row import Row
from megatron_dllm.diffusion.roles import visible
from tests.unit.data.made_rows import EOS, MASK, PAD, make_masked_row, make_row, spans_of_kinds, spec
from tests.unit.data.random_spans import random_spans
from tests.unit.data.test_noisy_blocks import BOUNDARIES

GEOMETRY = RowGeometry("block_diffusion", 4, 16, 64, 1, fill="eos", turn_boundary="split_views")
# Question of 1, answer of 2, question of 2, answer of 1: the answers end in blocks 0 and 1 of 4 tokens.
LENGTH, KINDS = 6, [0, 1, 1, 0, 0, 1]


def test_turns_apart_by_hand() -> None:
    row = make_masked_row([LENGTH], GEOMETRY, [[0, 1, 0, 0, 0, 1, 0, 1]], kinds=KINDS)
    assert row.input_ids.tolist() == [1, MASK, 3, EOS, 5, MASK, EOS, MASK, 1, 2, 3, 4] + [PAD] * 52
    assert row.position_ids[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert row.roles[:12, 1].tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert row.roles[:12, 2].tolist() == [1] * 8 + [0] * 4
    assert row.target_ids.tolist() == [2, 6, EOS] and row.is_fill.tolist() == [False, False, True]
    # 3 tokens of answers and 3 of fill; the document counts its 6 tokens and the fill.
    assert (row.num_maskable, row.num_answers, row.num_document_tokens, row.num_forward_tokens) == (6, 2, 9, 12)


def test_turns_of_one_block_have_views_of_their_own() -> None:
    geometry = replace(GEOMETRY, block_size=8, num_views=2, row_length=96)
    row = make_row([LENGTH], geometry, spec(2), kinds=KINDS)
    # Copies 0 and 1 of block 0, each in two views; nothing reads a clean copy.
    assert row.roles[:, 2].tolist()[:32] == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8 and row.num_forward_tokens == 32
    assert row.input_ids[16:21].tolist() == [1, 2, 3, 4, 5]  # the second turn reads the first one
    # Together the two views train each answer token and each fill token once.
    fill = sorted(row.target_ids[row.is_fill].tolist())
    assert sorted(row.target_ids[~row.is_fill].tolist()) == [2, 3, 6] and fill == [EOS] * 7
    roles = torch.from_numpy(row.roles)
    sees = visible(roles, roles)
    assert not sees[:8, 8:].any() and sees[16:24, 16:24].all() and not sees[16:24, :16].any()


def test_later_turns_of_a_block_are_masked_by_hand() -> None:
    geometry = replace(GEOMETRY, block_size=8, turn_boundary="mask_later")
    row = make_masked_row([LENGTH], geometry, [[0, 1, 0, 0, 0, 0]], kinds=KINDS)
    assert row.input_ids[:7].tolist() == [1, MASK, 3, MASK, MASK, MASK, PAD]
    assert row.target_ids.tolist() == [2] and (row.num_maskable, row.num_answers) == (2, 1)


def test_only_the_last_turn_by_hand() -> None:
    row = make_masked_row([LENGTH], replace(GEOMETRY, turn_boundary="last"), [[0, 1, 0, 0]], kinds=KINDS)
    assert row.input_ids[:9].tolist() == [5, MASK, EOS, EOS, 1, 2, 3, 4, PAD]
    assert row.target_ids.tolist() == [6] and (row.num_maskable, row.num_answers) == (3, 1)


def test_weights_of_fill_and_of_answers_by_hand() -> None:
    def weights(**changes: object) -> Row:
        settings = {"loss_weight": "uniform", "at_least_one": False, "t_min": 1.0, "t_max": 1.0} | changes
        return make_row([LENGTH], GEOMETRY, spec(1, **settings), kinds=KINDS)

    assert weights().loss_weights.tolist() == [1.0] * 6
    assert weights(fill_weight=0.25).loss_weights.tolist() == [1.0, 1.0, 0.25, 1.0, 0.25, 0.25]
    # Answers of 2 + 1 and 1 + 2 tokens, fill included.
    np.testing.assert_allclose(weights(loss_per="answer").loss_weights, [1 / 3] * 6, rtol=1e-6)


@pytest.mark.parametrize("fill", ["eos", "none"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("prune_clean", [True, False])
def test_a_row_takes_the_tokens_that_packing_and_progress_count(boundary: str, fill: str, prune_clean: bool) -> None:
    lengths = [13, 1, 9, 6, 16]
    for seed in range(4):
        spans = random_spans(lengths, seed)
        for size, num_views in ((1, 1), (4, 2), (8, 3)):
            geometry = RowGeometry(
                "block_diffusion", size, 16, 800, num_views, "document", prune_clean, None, fill, boundary
            )
            kinds = spans.kinds(np.array(lengths)).tolist()
            row = make_row(lengths, geometry, spec(num_views), kinds=kinds)
            own = spans_of_kinds(lengths, kinds)
            assert row.num_forward_tokens == (row.roles[:, 0] >= 0).sum() == row_forward_tokens(geometry, lengths, own)
            assert row.num_document_tokens == document_tokens(geometry, np.array(lengths), own).sum()
            # Whole blocks where turns are filled: what is decoded at once is trained at once.
            if fill == "none":
                assert not row.is_fill.any()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_pruned_rows_keep_every_target_with_its_keys_and_noise(boundary: str) -> None:
    lengths = [11, 1, 5, 16]

    def targets(prune_clean: bool, seed: int) -> dict:
        geometry = RowGeometry("block_diffusion", 4, 16, 300, 2, "document", prune_clean, None, "eos", boundary)
        kinds = random_spans(lengths, seed).kinds(np.array(lengths)).tolist()
        row = make_row(lengths, geometry, spec(2), kinds=kinds)
        roles = torch.from_numpy(row.roles)
        sees = visible(roles, roles).numpy()
        names = list(zip(*row.roles.T.tolist(), row.position_ids.tolist(), row.input_ids.tolist(), strict=True))
        values = zip(row.target_positions.tolist(), row.target_ids, row.loss_weights, row.target_t, strict=True)
        return {
            names[place]: (label, weight, t, {names[k] for k in np.flatnonzero(sees[place])})
            for place, label, weight, t in values
        }

    for seed in range(5):
        assert targets(True, seed) == targets(False, seed)


def test_what_follows_a_turn_is_nowhere_that_the_turn_sees() -> None:
    """No key of a target lies behind its turn, except in the naive mode."""
    lengths, kinds = [LENGTH, 9], [*KINDS, 0, 1, 0, 1, 1, 0, 0, 1, 1]
    stops = {(0, 1): 3, (0, 2): 3, (0, 5): 6, (1, 1): 2, (1, 3): 5, (1, 4): 5, (1, 7): 9, (1, 8): 9}
    for boundary in BOUNDARIES:
        row = make_row(lengths, replace(GEOMETRY, block_size=8, turn_boundary=boundary), spec(1), kinds=kinds)
        roles = torch.from_numpy(row.roles)
        sees = visible(roles, roles).numpy()
        leaks = False
        for place in row.target_positions[~row.is_fill]:
            keys = np.flatnonzero(sees[place] & (row.input_ids != MASK) & (row.input_ids != EOS))
            stop = stops[int(row.roles[place, 0]), int(row.position_ids[place])]
            leaks |= bool((row.position_ids[keys] >= stop).any())
        assert leaks == (boundary == "all")


def test_plain_text_that_is_blended_with_chats_is_text() -> None:
    """And rows of padding are padding."""
    text = replace(GEOMETRY, fill="none", turn_boundary="all")
    for lengths in ([13, 6], []):
        found, expected = (make_row(lengths, geometry, spec(1)) for geometry in (GEOMETRY, text))
        for name in Row.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
