"""Choices of a question share the clean copy of their context, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import RowPlan
from megatron_dllm.data.row import Row
from megatron_dllm.diffusion.roles import BLOCK, DOC, VIEW
from megatron_dllm.evaluation.continuations import NUM_SIBLING_BITS, Continuation, source_of
from megatron_dllm.evaluation.estimators import noise_of
from megatron_dllm.evaluation.shared_contexts import SharedContexts, group_choices

MASK, PAD, EOS, SIZE, NUM_VIEWS = 97, 98, 99, 4, 2
CONTEXT = (10, 11, 12, 13, 14)
ASKED = [Continuation(CONTEXT, tokens, 7) for tokens in ((20,), (21, 22), (23, 24, 25))]
ASKED += [Continuation((30, 31, 32, 33), tokens, 8) for tokens in ((40, 41), (42,), (43, 44, 45))]


def groups(asked: list[Continuation], fill: str = "mask", row_length: int = 1000) -> list[tuple[int, ...]]:
    found = group_choices(asked, SIZE, fill, 100, NUM_VIEWS, row_length)
    assert all(len(part) == size for size, parts in found.items() for part in parts)
    return sorted(part for parts in found.values() for part in parts)


def test_choices_of_one_context_go_together_if_they_end_in_the_block_where_they_begin() -> None:
    assert groups(ASKED) == [(0, 1, 2), (3, 4, 5)]
    longer = [*ASKED, Continuation(CONTEXT, (1, 2, 3, 4), 7), Continuation(CONTEXT, (5, 6, 7, 8), 7)]
    assert groups(longer) == [(0, 1, 2), (3, 4, 5), (6,), (7,)]


def test_without_fill_only_choices_of_one_length_go_together() -> None:
    letters = [Continuation(CONTEXT, (token,), 7) for token in (1, 2, 3)]
    assert groups([*ASKED[:3], *letters], fill="none") == [(0, 3, 4, 5), (1,), (2,)]


def test_a_group_is_no_longer_than_a_row() -> None:
    # A context with 4 clean tokens and choices of 2 x 4 tokens: two of them fit 20, and one always does.
    assert groups(ASKED[:3], row_length=20) == [(0, 1), (2,)]
    assert groups(ASKED[:3], row_length=3) == [(0,), (1,), (2,)]


def _alone(fill: str) -> RowDataset:
    source = source_of(ASKED, SIZE, fill, 100, EOS)
    geometry = RowGeometry("block_diffusion", SIZE, 100, 32, NUM_VIEWS, longest_cost=12)
    noise = noise_of("stratified", NUM_VIEWS)
    return RowDataset(source, geometry, noise, 3, MASK, PAD, num_sibling_bits=NUM_SIBLING_BITS)


def _together(fill: str, members: list[tuple[int, ...]]) -> tuple[SharedContexts, list[int]]:
    alone, num_views = _alone(fill), NUM_VIEWS * len(members[0])
    source = source_of([ASKED[places[0]] for places in members], SIZE, fill, 100, EOS)
    geometry = RowGeometry("block_diffusion", SIZE, 100, 64, num_views, longest_cost=28)
    shared = RowDataset(
        source, geometry, noise_of("stratified", num_views), 3, MASK, PAD, num_sibling_bits=NUM_SIBLING_BITS
    )
    lengths = alone.source.document_lengths  # type: ignore[attr-defined]
    return SharedContexts.of(shared, alone, members, lengths), source.document_lengths.tolist()


def _seen(row: Row, document: int, view: int) -> list[tuple[int, ...]]:
    """What stands in a view of a document: token, position, block, and where it is a target its id and weight."""
    slots = np.flatnonzero((row.roles[:, DOC] == document) & (row.roles[:, VIEW] == view))
    targets = {
        place: (token, weight)
        for place, token, weight in zip(
            row.target_positions.tolist(), row.target_ids.tolist(), row.loss_weights.tolist(), strict=True
        )
    }
    return [
        (
            int(row.input_ids[slot]),
            int(row.position_ids[slot]),
            int(row.roles[slot, BLOCK]),
            bool(row.is_masked[slot]),
            *targets.get(int(slot), ()),
        )
        for slot in slots
    ]


@pytest.mark.parametrize("fill", ["mask", "eos"])
def test_a_shared_row_shows_every_choice_as_its_own_row_does(fill: str) -> None:
    members = [(0, 1, 2), (3, 4, 5)]
    dataset, lengths = _together(fill, members)
    segments = np.array([[document, 0, length, document] for document, length in enumerate(lengths)])
    row = dataset[RowPlan(segments, 0)]
    alone = _alone(fill)
    num_targets = 0
    for document, places in enumerate(members):
        for choice, place in enumerate(places):
            one = alone[RowPlan(np.array([[place, 0, 8, 0]]), 0)]
            num_targets += len(one.target_positions)
            for view in range(1, NUM_VIEWS + 1):
                assert _seen(row, document, choice * NUM_VIEWS + view) == _seen(one, 0, view)
            assert _seen(row, document, 0) == _seen(one, 0, 0) and len(_seen(one, 0, 0)) == SIZE
    assert len(row.target_positions) == num_targets
    assert row.num_forward_tokens == 2 * (3 * NUM_VIEWS * SIZE + SIZE) == int((row.roles[:, DOC] >= 0).sum())
    assert row.sample_ids.tolist() == [7 << NUM_SIBLING_BITS, 8 << NUM_SIBLING_BITS]
    assert (len(row.input_ids), row.num_segments.tolist()) == (64, [2])
    assert set(row.input_ids[row.num_forward_tokens :].tolist()) == {PAD}


def test_a_row_of_padding_is_one() -> None:
    row = _together("mask", [(0, 1, 2)])[0][RowPlan(np.zeros((0, 4), np.int64), 0)]
    assert row.num_forward_tokens == 0 and set(row.input_ids.tolist()) == {PAD} and not len(row.target_positions)
