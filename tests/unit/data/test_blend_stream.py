"""Rows of a blend: the shares are kept, positions continue exactly, and one corpus alone is what it always was."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest

from megatron_dllm.data.ar_rows import ArRows
from megatron_dllm.data.blend_stream import BlendStream
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import DOCUMENT, LENGTH, RowPlan, RowStream
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from tests.unit.data.made_sources import MadeSource

GEOMETRY = RowGeometry("block_diffusion", 4, 16, 48, 1)
AR = RowGeometry("ar", 1, 16, 32, 0)
NOISE = NoiseSpec("block", True, True, "elbo", 0.1, 0.9, 1)
WEB, CODE, CHAT = (
    MadeSource("data/web", 10, 400),
    MadeSource("data/code", 11, 90, mean=10),
    MadeSource("data/chat", 12, 60, answers=True),
)
SHARES = {"of data/web": 0.5, "of data/code": 0.2, "of data/chat": 0.3}


def new_stream(*sources: MadeSource, weights: Mapping[str, float] = SHARES, chunk: int = 16) -> BlendStream:
    stream = BlendStream(list(sources), 5, chunk)
    stream.use({source.fingerprint: weights[source.fingerprint] for source in sources})
    return stream


def number_of(plan: RowPlan) -> int:
    return int(plan.segments[0, DOCUMENT]) >> 40


def tokens_by_corpus(plans: list[RowPlan]) -> list[int]:
    counts = [0, 0, 0]
    for plan in plans:
        counts[number_of(plan)] += int(plan.segments[:, LENGTH].sum())
    return counts


def assert_same(plans: list[RowPlan], expected: list[RowPlan]) -> None:
    for plan, expected_plan in zip(plans, expected, strict=True):
        np.testing.assert_array_equal(plan.segments, expected_plan.segments)
        assert plan.epoch == expected_plan.epoch


def test_ar_rows_are_a_corpus_of_their_own_with_a_share_of_the_tokens() -> None:
    rows = ArRows(WEB)
    weights = {WEB.fingerprint: 0.75, rows.fingerprint: 0.25}

    def stream() -> BlendStream:
        made = BlendStream([WEB, rows], 5, 16)
        made.use(weights)
        return made

    expected = [stream().next(GEOMETRY)]  # a stream begins as the other does
    original = stream()
    plans = [original.next(GEOMETRY) for _ in range(300)]
    assert_same(plans[:1], expected)
    assert [plan.is_ar for plan in plans] == [number_of(plan) == 1 for plan in plans]
    noisy, ar, _ = tokens_by_corpus(plans)
    assert abs(ar - 0.25 * (noisy + ar)) <= 2 * GEOMETRY.row_length
    own = RowStream(WEB.document_lengths, 5, 16)
    assert_same([plan for plan in plans if not plan.is_ar][:50], [own.next(GEOMETRY) for _ in range(50)])
    assert max(int(plan.segments[:, LENGTH].sum()) for plan in plans if plan.is_ar) > 2 / 3 * GEOMETRY.row_length
    resumed = stream()
    halfway = stream()
    for _ in range(150):
        halfway.next(GEOMETRY)
    resumed.load_state_dict(json.loads(json.dumps(halfway.state_dict())))
    following = [resumed.next(GEOMETRY) for _ in range(150)]
    assert_same(following, plans[150:])
    assert [plan.is_ar for plan in following] == [plan.is_ar for plan in plans[150:]]


def test_an_ar_row_counts_its_targets_for_the_ar_loss_alone() -> None:
    stream = BlendStream([WEB, ArRows(WEB)], 5, 16)
    stream.use({WEB.fingerprint: 0.5, ArRows(WEB).fingerprint: 0.5})
    dataset = RowDataset(stream.documents, GEOMETRY, NOISE, 7, 99, 98)
    plans = [stream.next(GEOMETRY) for _ in range(20)]
    for plan, row in zip(plans, (dataset[plan] for plan in plans), strict=True):
        assert len(row.input_ids) == GEOMETRY.row_length
        if not plan.is_ar:
            assert (row.num_maskable, row.num_ar_maskable) == (int(plan.segments[:, LENGTH].sum()), 0)
            continue
        assert (row.num_maskable, row.num_ar_maskable) == (0, len(row.target_ids))
        assert row.is_ar_target.all() and not row.is_masked.any() and (row.roles[row.target_positions, 2] == 0).all()
        assert (row.target_ids == row.input_ids[row.target_positions + 1]).all()
        assert row.num_forward_tokens == row.num_document_tokens == int(plan.segments[:, LENGTH].sum())


def test_one_corpus_alone_gives_its_own_rows() -> None:
    stream, expected = new_stream(WEB, weights={WEB.fingerprint: 1.0}), RowStream(WEB.document_lengths, 5, 16)
    assert_same([stream.next(GEOMETRY) for _ in range(300)], [expected.next(GEOMETRY) for _ in range(300)])


def test_shares_are_within_a_row_of_the_weights_at_any_time() -> None:
    stream, plans = new_stream(WEB, CODE, CHAT), []
    for _ in range(600):
        plans.append(stream.next(GEOMETRY))
        counts = tokens_by_corpus(plans)
        for share, count in zip((0.5, 0.2, 0.3), counts, strict=True):
            assert abs(count - share * sum(counts)) <= 2 * GEOMETRY.row_length
    assert stream.state_dict()["blends"] == [{"weights": [0.5, 0.2, 0.3], "tokens": counts}]
    assert {plan.epoch for plan in plans if number_of(plan) == 1} >= {0, 1, 2}, "the small one is read again"


def test_every_corpus_is_read_whole_in_each_epoch_of_its_own() -> None:
    stream = new_stream(WEB, CODE, CHAT)
    first = [plan for plan in (stream.next(GEOMETRY) for _ in range(700)) if plan.epoch == 0]
    for number, source in enumerate((WEB, CODE)):
        documents = np.concatenate([plan.segments for plan in first if number_of(plan) == number])
        expected_tokens = [source.num_tokens] if number else [documents[:, LENGTH].sum()]
        assert documents[:, LENGTH].sum() == expected_tokens[0]
        assert (documents[:, DOCUMENT] - (number << 40) < source.num_documents).all()


@pytest.mark.parametrize("seed", range(4))
def test_saving_anywhere_continues_exactly_also_where_weights_and_geometry_change(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = (WEB, CODE, CHAT)
    unbroken, broken, geometry = new_stream(*sources), new_stream(*sources), GEOMETRY
    for _ in range(150):
        if rng.random() < 0.1:
            geometry = (GEOMETRY, AR)[rng.integers(2)]
        if rng.random() < 0.05:
            weights = dict(zip(SHARES, rng.random(3), strict=True))
            unbroken.use(weights)
            broken.use(weights)
        if rng.random() < 0.3:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = BlendStream(list(sources), 5, 16)
            broken.load_state_dict(state)
        assert_same([broken.next(geometry)], [unbroken.next(geometry)])
    assert broken.state_dict() == unbroken.state_dict() == broken.copy().state_dict()


def test_rows_and_noise_of_two_corpora_do_not_collide() -> None:
    """Two corpora of equal lengths: the sample ids differ, and so do order and masks."""
    same = (MadeSource("one", 10, 60), MadeSource("other", 10, 60))
    stream = new_stream(*same, weights={source.fingerprint: 0.5 for source in same})
    dataset = RowDataset(stream.documents, GEOMETRY, NOISE, 5, 2, 1)
    rows = {0: [], 1: []}
    for _ in range(60):
        plan = stream.next(GEOMETRY)
        rows[number_of(plan)].append((plan, dataset[plan]))
    ids = [{int(i) for _, row in rows[number] for i in row.sample_ids} for number in (0, 1)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    orders = [[d & (2**40 - 1) for plan, _ in rows[n] for d in plan.segments[:, DOCUMENT].tolist()] for n in (0, 1)]
    assert orders[0][:20] != orders[1][:20]
    levels = [np.concatenate([row.target_t for _, row in rows[number]])[:200] for number in (0, 1)]
    assert not np.isin(levels[0], levels[1]).any()


def test_rows_are_read_from_their_corpus_with_its_spans() -> None:
    stream = new_stream(WEB, CODE, CHAT)
    dataset = RowDataset(stream.documents, GEOMETRY, NOISE, 5, 2, 1)
    for _ in range(40):
        plan = stream.next(GEOMETRY)
        row, number = dataset[plan], number_of(plan)
        assert set(row.target_ids.tolist()) == {10 + number}
        is_all = row.num_maskable == plan.segments[:, LENGTH].sum()
        assert is_all == (number < 2), "a text among chats is what it is alone"


def test_a_position_of_one_corpus_alone_goes_on_in_a_blend() -> None:
    earlier = RowStream(WEB.document_lengths, 5, 16)
    for _ in range(9):
        earlier.next(GEOMETRY)
    stream = BlendStream([WEB, CODE], 5, 16)
    stream.load_state_dict(json.loads(json.dumps(earlier.state_dict())))
    stream.use({WEB.fingerprint: 1.0})
    assert_same([stream.next(GEOMETRY)], [earlier.next(GEOMETRY)])
    stream.use({WEB.fingerprint: 0.5, CODE.fingerprint: 0.5})
    plans = [stream.next(GEOMETRY) for _ in range(20)]
    assert_same(
        [plan for plan in plans if number_of(plan) == 0],
        [earlier.next(GEOMETRY) for plan in plans if number_of(plan) == 0],
    )


def test_corpora_come_and_go_and_keep_number_and_place() -> None:
    stream = new_stream(WEB, CODE)
    plans = [stream.next(GEOMETRY) for _ in range(30)]
    state = json.loads(json.dumps(stream.state_dict()))
    other = BlendStream([CHAT, CODE], 5, 16)
    other.load_state_dict(state)
    other.use({CHAT.fingerprint: 0.5, CODE.fingerprint: 0.5})
    mixed = [other.next(GEOMETRY) for _ in range(30)]
    assert {number_of(plan) for plan in mixed} == {1, 2}, "the new one is number 2"
    state = json.loads(json.dumps(other.state_dict()))
    assert [corpus["name"] for corpus in state["corpora"]] == [WEB.name, CODE.name, CHAT.name]
    back = BlendStream([WEB], 5, 16)
    back.load_state_dict(state)
    back.use({WEB.fingerprint: 1.0})
    expected = RowStream(WEB.document_lengths, 5, 16)
    num_web = sum(number_of(plan) == 0 for plan in plans)
    expected_plans = [expected.next(GEOMETRY) for _ in range(num_web + 5)][num_web:]
    assert_same([back.next(GEOMETRY) for _ in range(5)], expected_plans)
    weights = [blend["weights"] for blend in back.state_dict()["blends"]]
    assert weights == [[0.5, 0.2, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]], "what was stays recorded"


def test_a_corpus_that_is_not_to_be_repeated() -> None:
    stream = BlendStream([CODE], 5, 16, is_repeating=False)
    stream.use({CODE.fingerprint: 1.0})
    with pytest.raises(ValueError, match=r"corpus data/code has been read through, and data.on_exhausted \(refuse\)"):
        for _ in range(1000):
            stream.next(GEOMETRY)


def test_one_content_under_two_names() -> None:
    with pytest.raises(ValueError, match=r"two of the corpora \(data/web, data/web\) have the same content"):
        BlendStream([WEB, WEB], 5, 16)


def test_another_seed_is_refused() -> None:
    state = new_stream(WEB, CODE).state_dict()
    with pytest.raises(ValueError, match=r"seed \(6\) differs from the saved data position's \(5\)"):
        BlendStream([WEB, CODE], 6, 16).load_state_dict(state)
