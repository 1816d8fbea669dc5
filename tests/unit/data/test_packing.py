"""The sequence of rows: complete, in bounds, and exactly continued from any saved position."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import (
    DOCUMENT,
    LENGTH,
    OFFSET,
    ORDINAL,
    RowPlan,
    RowStream,
    assign_rows,
    estimate_fill,
    row_forward_tokens,
    split_segments,
)
from megatron_dllm.data.spans import MASKABLE, MASKED, Spans, segment_spans
from tests.unit.data.random_spans import expected_kinds, random_spans

GEOMETRIES = [
    RowGeometry("block_diffusion", 4, 16, 48, 1),
    RowGeometry("block_diffusion", 1, 16, 48, 1),
    RowGeometry("block_diffusion", 16, 16, 48, 1),
    RowGeometry("block_diffusion", 4, 16, 48, 2),
    RowGeometry("block_diffusion", 4, 16, 48, 1, prune_clean=False),
    RowGeometry("block_diffusion", 8, 16, 48, 1, block_origin="row"),
    RowGeometry("block_diffusion", 16, 16, 40, 2, block_origin="row", prune_clean=False),
    RowGeometry("ar", 1, 16, 32, 0),
]


def random_lengths(num_documents: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, num_documents).astype(np.int32)


def epoch_of_plans(stream: RowStream, geometry: RowGeometry) -> list[RowPlan]:
    """Rows of the first epoch."""
    plans = []
    while (plan := stream.next(geometry)).epoch == 0:
        plans.append(plan)
    return plans


def covered_tokens(plans: list[RowPlan], num_documents: int) -> list[tuple[int, int]]:
    """Every (document, token) that the plans hold, as often as they hold it."""
    spans = [(d, o, n) for plan in plans for d, o, n, _ in plan.segments.tolist()]
    return sorted((d, o + i) for d, o, n in spans for i in range(n))


def test_documents_are_cut_at_multiples_of_the_context() -> None:
    segments = np.array([[7, 0, 10, 0], [8, 0, 0, 1], [9, 0, 4, 2], [5, 4, 3, 9]])
    expected_segments = [[7, 0, 4, 0], [7, 4, 4, 0], [7, 8, 2, 0], [9, 0, 4, 2], [5, 4, 3, 9]]
    assert split_segments(segments, 4).tolist() == expected_segments
    assert split_segments(np.zeros((0, 4), dtype=np.int64), 4).shape == (0, 4)


def test_best_fit_by_hand() -> None:
    ar = RowGeometry("ar", 1, 8, 10, 0)
    # 6 -> row 0 (4 free), 7 -> row 1 (3 free), 3 -> row 1 exactly, 4 -> row 0 exactly, 2 -> row 2.
    assert assign_rows(ar, np.array([6, 7, 3, 4, 2])).tolist() == [0, 1, 1, 0, 2]


def test_equally_full_rows_take_the_older_first() -> None:
    ar = RowGeometry("ar", 1, 8, 10, 0)
    assert assign_rows(ar, np.array([7, 7, 7, 3, 3, 3])).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_token_of_an_epoch_is_in_one_row(geometry: RowGeometry) -> None:
    lengths = random_lengths(100)
    plans = epoch_of_plans(RowStream(lengths, seed=3, chunk=17), geometry)
    expected_tokens = [(d, i) for d, n in enumerate(lengths.tolist()) for i in range(n)]
    assert covered_tokens(plans, 100) == expected_tokens
    for plan in plans:
        assert row_forward_tokens(geometry, plan.segments[:, LENGTH]) <= geometry.row_length
        assert (plan.segments[:, OFFSET] % geometry.context_length == 0).all()
    ordinals = np.sort(np.concatenate([plan.segments[:, ORDINAL] for plan in plans]))
    np.testing.assert_array_equal(ordinals, np.arange(len(ordinals)))


def test_ordinals_count_segments_in_shuffled_order_whatever_the_geometry_and_chunk() -> None:
    lengths = random_lengths(60)
    orders = []
    for geometry, chunk in [(GEOMETRIES[0], 7), (GEOMETRIES[7], 7), (GEOMETRIES[3], 60)]:
        segments = np.concatenate([p.segments for p in epoch_of_plans(RowStream(lengths, 5, chunk), geometry)])
        orders.append(segments[np.argsort(segments[:, ORDINAL])].tolist())
    assert orders[0] == orders[1] == orders[2]


def test_epochs_have_different_orders_and_seeds_too() -> None:
    lengths = np.full(50, 16, dtype=np.int32)

    def order(seed: int, epoch: int) -> list[int]:
        stream = RowStream(lengths, seed, chunk=10)
        plans = [stream.next(GEOMETRIES[7]) for _ in range(25 * (epoch + 1))][-25:]
        assert {plan.epoch for plan in plans} == {epoch}
        return [d for plan in plans for d in plan.segments[:, DOCUMENT].tolist()]

    orders = [order(1, 0), order(1, 1), order(2, 0)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert order(1, 1) == orders[1]


def test_without_shuffling_documents_keep_their_order() -> None:
    lengths = np.full(20, 16, dtype=np.int32)
    plans = epoch_of_plans(RowStream(lengths, seed=1, chunk=8, shuffle=False), GEOMETRIES[7])
    assert [d for plan in plans for d in plan.segments[:, DOCUMENT].tolist()] == list(range(20))


@pytest.mark.parametrize("seed", range(8))
def test_saving_anywhere_and_changing_geometry_anywhere_loses_and_repeats_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = random_lengths(80, seed)
    unbroken, broken = (RowStream(lengths, seed, chunk=25) for _ in range(2))
    geometry, plans = GEOMETRIES[0], []
    while True:
        if rng.random() < 0.15:
            geometry = GEOMETRIES[rng.integers(len(GEOMETRIES))]
        expected_plan = unbroken.next(geometry)
        if rng.random() < 0.3:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = RowStream(lengths, seed, chunk=25)
            broken.load_state_dict(state)
        plan = broken.next(geometry)
        np.testing.assert_array_equal(plan.segments, expected_plan.segments)
        assert plan.epoch == expected_plan.epoch
        if plan.epoch == 2:
            break
        plans.append(plan)
    expected_tokens = [(d, i) for d, n in enumerate(lengths.tolist()) for i in range(n)]
    for epoch in range(2):
        assert covered_tokens([p for p in plans if p.epoch == epoch], 80) == expected_tokens


def test_looking_at_another_geometry_without_taking_a_row_changes_nothing() -> None:
    lengths = random_lengths(40)
    expected_stream, stream = (RowStream(lengths, 0, chunk=40) for _ in range(2))
    for _ in range(30):
        expected_plan = expected_stream.next(GEOMETRIES[0])
        stream._rows_left(GEOMETRIES[3])
        np.testing.assert_array_equal(stream.next(GEOMETRIES[0]).segments, expected_plan.segments)


@pytest.mark.parametrize("context_length", [8, 10, 24])
def test_context_length_may_change_in_mid_chunk(context_length: int) -> None:
    lengths = random_lengths(60)
    stream = RowStream(lengths, 0, chunk=30)
    plans = [stream.next(GEOMETRIES[0]) for _ in range(9)]
    plans += epoch_of_plans(stream, replace(GEOMETRIES[0], context_length=context_length))
    assert max(plan.segments[:, LENGTH].max() for plan in plans[9:]) <= context_length
    assert covered_tokens(plans, 60) == [(d, i) for d, n in enumerate(lengths.tolist()) for i in range(n)]


def test_state_is_small_and_does_not_grow() -> None:
    lengths = random_lengths(5000)
    stream = RowStream(lengths, 0, chunk=64)
    sizes = []
    for _ in range(2000):
        stream.next(GEOMETRIES[0])
        sizes.append(len(json.dumps(stream.state_dict())))
    assert max(sizes) < 500


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 2}, r"seed \(2\) differs from the saved data position's \(1\)"),
        ({"chunk": 9}, r"chunk \(9\) differs"),
        ({"shuffle": False}, r"shuffle \(False\) differs"),
        ({"document_lengths": np.ones(7, np.int32)}, r"num_documents \(7\) differs from .*\(8\)"),
    ],
)
def test_a_position_of_another_sequence_is_refused(other: dict[str, object], message: str) -> None:
    settings = {"document_lengths": np.ones(8, np.int32), "seed": 1, "chunk": 4}
    state = RowStream(**settings).state_dict()
    with pytest.raises(ValueError, match=message):
        RowStream(**(settings | other)).load_state_dict(state)


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]])
def test_a_corpus_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="document_lengths"):
        RowStream(np.array(lengths, dtype=np.int32), 0, chunk=2).next(GEOMETRIES[0])


def test_copy_goes_its_own_way() -> None:
    stream = RowStream(random_lengths(40), 0, chunk=10)
    stream.next(GEOMETRIES[0])
    expected_state = stream.state_dict()
    other = stream.copy()
    expected_plan = other.next(GEOMETRIES[0])
    assert stream.state_dict() == expected_state
    np.testing.assert_array_equal(stream.next(GEOMETRIES[0]).segments, expected_plan.segments)


def test_fill_by_hand() -> None:
    # Every document of 16 costs 16 + 12, so a row of 60 holds two: 32 of the corpus, 56 seen, 4 empty.
    fill = estimate_fill(np.full(64, 16), RowGeometry("block_diffusion", 4, 16, 60, 1), seed=0, chunk=16)
    assert (fill.document_tokens, fill.forward_tokens, fill.padding_tokens) == (32.0, 56.0, 4.0)
    # MDLM has no clean copy: three documents of 16 in 60.
    fill = estimate_fill(np.full(12, 16), RowGeometry("block_diffusion", 16, 16, 60, 1), seed=0, chunk=12)
    assert (fill.document_tokens, fill.forward_tokens, fill.padding_tokens) == (48.0, 48.0, 12.0)


def test_long_tailed_documents_fill_rows_well() -> None:
    lengths = np.random.default_rng(0).lognormal(6.0, 1.2, 4096).astype(np.int32)
    geometry = RowGeometry("block_diffusion", 32, 4096, 8192, 1)
    assert estimate_fill(lengths, geometry, seed=0, chunk=1024).padding_tokens < 0.03 * geometry.row_length


# --- spans ------------------------------------------------------------------------------------------------------


def expected_tokens_with_loss(lengths: np.ndarray, spans: Spans) -> list[tuple[int, int]]:
    """Every (document, token) that may carry a loss."""
    kinds = [expected_kinds(spans, document, length) for document, length in enumerate(lengths.tolist())]
    return [(d, i) for d, of_tokens in enumerate(kinds) for i, kind in enumerate(of_tokens) if kind == MASKABLE]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_token_with_a_loss_is_in_one_row(geometry: RowGeometry) -> None:
    lengths = random_lengths(100)
    spans = random_spans(lengths.tolist())
    plans = epoch_of_plans(RowStream(lengths, 3, 17, spans=spans), geometry)
    covered = covered_tokens(plans, 100)
    expected = expected_tokens_with_loss(lengths, spans)
    assert len(set(covered)) == len(covered) and set(expected) <= set(covered)
    for plan in plans:
        of_segments = segment_spans(spans, plan.segments)
        assert of_segments is not None and (np.diff(of_segments.maskable().bounds) > 0).all()
        assert row_forward_tokens(geometry, plan.segments[:, LENGTH], of_segments) <= geometry.row_length


def test_pruned_segments_fill_fewer_rows() -> None:
    lengths = np.full(64, 16)
    answers = Spans.of_lists([[(12, 16, MASKABLE)]] * 64)
    geometry = RowGeometry("block_diffusion", 4, 16, 64, 1)
    # 4 noisy + 12 clean tokens a document instead of 16 + 12: four in a row of 64 instead of two.
    assert len(epoch_of_plans(RowStream(lengths, 0, 16, spans=answers), geometry)) == 16
    assert len(epoch_of_plans(RowStream(lengths, 0, 16), geometry)) == 32
    fill = estimate_fill(lengths, geometry, seed=0, chunk=16, spans=answers)
    assert (fill.document_tokens, fill.forward_tokens, fill.padding_tokens) == (64.0, 64.0, 0.0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_spans_over_everything_give_the_rows_of_plain_text(geometry: RowGeometry) -> None:
    lengths = np.maximum(random_lengths(60), 1)
    spans = Spans.of_lists([[(0, n, MASKABLE)] for n in lengths.tolist()])
    plain, same = (RowStream(lengths, 3, 17, spans=given) for given in (None, spans))
    for plan, expected_plan in zip(epoch_of_plans(same, geometry), epoch_of_plans(plain, geometry), strict=True):
        np.testing.assert_array_equal(plan.segments, expected_plan.segments)


@pytest.mark.parametrize("seed", range(4))
def test_with_spans_saving_and_changing_geometry_anywhere_loses_and_repeats_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = random_lengths(80, seed)
    spans = random_spans(lengths.tolist(), seed)
    unbroken, broken = (RowStream(lengths, seed, 25, spans=spans) for _ in range(2))
    geometry, plans = GEOMETRIES[0], []
    while True:
        if rng.random() < 0.15:
            geometry = GEOMETRIES[rng.integers(len(GEOMETRIES))]
        expected_plan = unbroken.next(geometry)
        if rng.random() < 0.3:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = RowStream(lengths, seed, 25, spans=spans)
            broken.load_state_dict(state)
        plan = broken.next(geometry)
        np.testing.assert_array_equal(plan.segments, expected_plan.segments)
        if plan.epoch == 1:
            break
        plans.append(plan)
    covered = covered_tokens(plans, 80)
    assert len(set(covered)) == len(covered)
    assert set(expected_tokens_with_loss(lengths, spans)) <= set(covered)


def test_a_position_in_text_is_none_in_text_with_spans() -> None:
    lengths = np.full(8, 4)
    spans = Spans.of_lists([[(0, 1, MASKABLE)]] * 8)
    plain, other = RowStream(lengths, 1, 4), RowStream(lengths, 1, 4, spans=spans)
    with pytest.raises(ValueError, match=r"num_spans \(8\) differs from the saved data position's \(None\)"):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"num_spans \(None\) differs from the saved data position's \(8\)"):
        plain.load_state_dict(other.state_dict())


def test_spans_outside_their_document_are_refused_when_packed() -> None:
    spans = Spans.of_lists([[(0, 4, MASKABLE)], [(0, 5, MASKABLE)]])
    with pytest.raises(ValueError, match=r"span \(0, 5, kind 1\) of document 1 \(4 tokens\)"):
        RowStream(np.full(2, 4), 0, 2, spans=spans).next(GEOMETRIES[0])


def test_spans_without_a_loss_are_refused() -> None:
    spans = Spans.of_lists([[(0, 4, MASKED)], []])
    with pytest.raises(ValueError, match=r"document_lengths \(2 documents\) must hold a token that may carry a loss"):
        RowStream(np.full(2, 4), 0, 1, spans=spans).next(GEOMETRIES[0])


def test_a_position_saved_before_shift_was_a_field_continues() -> None:
    lengths = random_lengths(40)
    stream = RowStream(lengths, 0, chunk=40)
    stream.next(GEOMETRIES[0])
    state = json.loads(json.dumps(stream.state_dict()))
    del state["emitted"][0]["geometry"]["shift"]
    other = RowStream(lengths, 0, chunk=40)
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.next(GEOMETRIES[0]).segments, stream.next(GEOMETRIES[0]).segments)
    assert other.state_dict() == stream.state_dict()


def test_segments_without_a_loss_are_counted() -> None:
    """Documents of three segments whose loss lies in the second: two of three are left out, in every epoch anew."""
    lengths, geometry = np.full(12, 48), GEOMETRIES[0]
    spans = Spans.of_lists([[(20, 24, MASKABLE)]] * 12)
    stream = RowStream(lengths, 0, 4, spans=spans)
    while stream.next(geometry).epoch < 2:
        pass
    state = stream.state_dict()
    assert state["num_dropped"] == 2 * 12 * 2
    other = RowStream(lengths, 0, 4, spans=spans)
    other.load_state_dict(state)
    assert other.state_dict()["num_dropped"] == 48
    del state["num_dropped"]
    other.load_state_dict(state)
    assert other.state_dict()["num_dropped"] == 0, "earlier versions did not count"
    assert estimate_fill(lengths, geometry, seed=0, chunk=4, spans=spans).dropped_share == 2 / 3
    assert estimate_fill(lengths, geometry, seed=0, chunk=4).dropped_share == 0.0
