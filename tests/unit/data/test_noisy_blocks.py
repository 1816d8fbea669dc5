"""What noisy blocks show of chats: by hand, and against a plain reading of the rules, document by document."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.noisy_blocks import NoisyBlocks, Turns, find_noisy_blocks
from megatron_dllm.data.spans import FIXED, MASKABLE, MASKED, Spans
from tests.unit.data.random_spans import random_spans

BOUNDARIES = ("split_views", "mask_later", "last", "all")


def geometry(**changes: object) -> RowGeometry:
    settings = {
        "objective": "block_diffusion",
        "block_size": 8,
        "context_length": 64,
        "row_length": 512,
        "num_views": 1,
        "fill": "eos",
        "turn_boundary": "split_views",
    } | changes
    return RowGeometry(**settings)


def blocks_of(length: int, spans: list[tuple[int, int, int]], **changes: object) -> NoisyBlocks:
    lengths = np.array([length])
    return find_noisy_blocks(geometry(**changes), lengths, np.zeros(1, np.int64), Spans.of_lists([spans]))


def columns(blocks: NoisyBlocks) -> list[tuple[int, ...]]:
    """(block, copy, start, stop, fill) of each noisy block."""
    names = ("block", "copy", "start", "stop", "num_fill")
    return list(zip(*(getattr(blocks, name).tolist() for name in names), strict=True))


# Answer a: tokens 0..2, a question, answer b: tokens 7..11, which is the end: the picture of the module.
TWO_TURNS = [(0, 3, MASKABLE), (7, 12, MASKABLE)]


@pytest.mark.parametrize(
    ("boundary", "fill", "expected"),
    [
        ("split_views", "eos", [(0, 0, 0, 3, 5), (0, 1, 0, 8, 0), (1, 0, 8, 12, 4)]),
        ("split_views", "none", [(0, 0, 0, 3, 0), (0, 1, 0, 8, 0), (1, 0, 8, 12, 0)]),
        ("mask_later", "eos", [(0, 0, 0, 8, 0), (1, 0, 8, 12, 4)]),
        ("last", "eos", [(0, 0, 0, 8, 0), (1, 0, 8, 12, 4)]),
        ("all", "eos", [(0, 0, 0, 8, 0), (1, 0, 8, 12, 4)]),
        ("all", "none", [(0, 0, 0, 8, 0), (1, 0, 8, 12, 0)]),
    ],
)
def test_two_turns_that_share_a_block(boundary: str, fill: str, expected: list[tuple[int, ...]]) -> None:
    assert columns(blocks_of(12, TWO_TURNS, turn_boundary=boundary, fill=fill)) == expected


def test_what_follows_a_turn_is_trained_where_it_is_shown_in_the_naive_mode_alone() -> None:
    later = blocks_of(12, TWO_TURNS, turn_boundary="mask_later")
    assert (later.loss_start[0], later.loss_stop[0]) == (0, 3)
    everything = blocks_of(12, TWO_TURNS, turn_boundary="all")
    assert (everything.loss_start[0], everything.loss_stop[0]) == (0, 12)


def test_a_turn_that_was_cut_off_is_not_filled_and_shows_its_masked_end() -> None:
    """The corpus marks the last token of a truncated chat."""
    for boundary in BOUNDARIES:
        assert columns(blocks_of(6, [(2, 5, MASKABLE), (5, 6, MASKED)], turn_boundary=boundary)) == [(0, 0, 0, 6, 0)]
    # Cut off inside the next question: the answer itself had ended.
    spans = [(2, 4, MASKABLE), (5, 6, MASKED)]
    assert columns(blocks_of(6, spans)) == [(0, 0, 0, 4, 4)]
    assert columns(blocks_of(6, spans, turn_boundary="all")) == [(0, 0, 0, 6, 0)]


def test_an_answer_of_several_parts_is_one_turn() -> None:
    """Nothing is filled in between, and the parts of one block are not told apart."""
    spans = [(1, 3, MASKABLE), (3, 5, FIXED), (5, 7, MASKABLE), (7, 17, FIXED), (17, 18, MASKABLE)]
    assert columns(blocks_of(18, spans)) == [(0, 0, 0, 8, 0), (2, 0, 16, 18, 6)]
    turns = Turns.of(Spans.of_lists([[(0, 2, MASKABLE)], spans, [(1, 3, MASKABLE), (4, 5, MASKABLE)]]))
    assert turns.segment.tolist() == [0, 1, 2, 2] and turns.of_span.tolist() == [0, 1, 1, 1, 1, 1, 2, 3]
    assert turns.start.tolist() == [0, 1, 1, 4] and turns.stop.tolist() == [2, 18, 3, 5]


def test_no_chat_has_no_block() -> None:
    nothing = np.zeros(0, np.int64)
    found = find_noisy_blocks(geometry(), nothing, nothing, Spans.of_lists([]))
    assert columns(found) == columns(NoisyBlocks.none()) == []


def expected_turns(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Touching spans together, where any of them carries a loss."""
    turns: list[list[tuple[int, int, int]]] = []
    for span in spans:
        if turns and turns[-1][-1][1] == span[0]:
            turns[-1].append(span)
        else:
            turns.append([span])
    return [turn for turn in turns if any(kind == MASKABLE for _, _, kind in turn)]


def expected_blocks(
    length: int, spans: list[tuple[int, int, int]], boundary: str, fill: str, size: int
) -> list[tuple[int, ...]]:
    """The rules of the module read token by token."""
    turns, is_alone = expected_turns(spans), boundary in ("split_views", "last")
    found, seen = [], {}
    for turn in turns[-1:] if boundary == "last" else turns:
        stop, ends = turn[-1][1], turn[-1][2] == MASKABLE
        trained = {place for start, end, kind in turn if kind == MASKABLE for place in range(start, end)}
        for block in sorted({place // size for place in trained}):
            copy = seen[block] = seen.get(block, -1) + 1
            end = (block + 1) * size
            shown = min(end, stop if is_alone else length)
            is_end = ends and shown == stop and fill == "eos"
            found.append((block, copy, block * size, shown, end - shown if is_end else 0))
    return found if is_alone else merged_blocks(found, boundary)


def merged_blocks(found: list[tuple[int, ...]], boundary: str) -> list[tuple[int, ...]]:
    """One noisy block for each: with mask_later the first turn's; otherwise the last turn decides about the fill."""
    kept: dict[int, tuple[int, ...]] = {}
    for entry in found:
        if entry[0] not in kept:
            kept[entry[0]] = entry
        elif boundary == "all":
            kept[entry[0]] = (*kept[entry[0]][:4], entry[4])
    return [kept[block] for block in sorted(kept)]


@pytest.mark.parametrize("fill", ["eos", "none"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_random_chats_follow_the_rules(boundary: str, fill: str) -> None:
    lengths = np.random.default_rng(5).integers(1, 64, 60)
    spans = random_spans(lengths.tolist(), 5)
    for size in (1, 4, 16):
        rules = geometry(turn_boundary=boundary, fill=fill, block_size=size)
        found = find_noisy_blocks(rules, lengths, np.zeros_like(lengths), spans)
        for document, length in enumerate(lengths.tolist()):
            own = spans.table[spans.bounds[document] : spans.bounds[document + 1]].tolist()
            is_mine = found.segment == document
            mine = NoisyBlocks(**{n: getattr(found, n)[is_mine] for n in NoisyBlocks.__dataclass_fields__})
            assert columns(mine) == expected_blocks(length, own, boundary, fill, size), (document, own)


def test_without_pruning_every_block_is_there_once_more() -> None:
    found = blocks_of(20, [(9, 11, MASKABLE)], prune_clean=False)
    assert columns(found) == [(0, 0, 0, 8, 0), (1, 0, 8, 11, 5), (2, 0, 16, 20, 0)]
    assert (found.loss_start >= found.loss_stop).tolist() == [True, False, True]
