"""How sure a model is of right answers: masks, counts, and the speed that follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_dllm.diffusion.decoding_pass import Alone
from megatron_dllm.evaluation.confidence import (
    Prediction,
    expected_tokens_per_forward,
    mean_block,
    predict_answers,
    table,
)
from megatron_dllm.evaluation.study_results import Confidence
from tests.unit.diffusion.toy_decoder import CONTRACT, MASK, CachedForward, ScriptedForward, ToyModel


def test_every_view_masks_its_share_of_the_answer_and_nothing_else() -> None:
    # Tokens 6 and 7 end the second block, 8 to 10 are most of the third.
    forward = ScriptedForward({6: (3, 0.9), 7: (5, 0.6)})
    found = predict_answers(forward, Alone(), [([1] * 6, [3, 4, 7, 7, 8])], CONTRACT, "cpu")
    first = [prediction for prediction in found if prediction.confidence < 0.95]
    assert {round(prediction.confidence, 3): prediction.is_right for prediction in first} == {0.9: True, 0.6: False}
    second = [prediction for prediction in found if prediction.confidence > 0.95]
    assert {prediction.is_right for prediction in second} == {True, False}, "7 is right twice, 8 is not"
    assert {prediction.num_masked for prediction in first} == {1, 2}
    # Four views of three tokens: counts from the quarters of 1..3.
    assert sorted({prediction.num_masked for prediction in second})[-1] == 3
    noisy = [row for row in forward.seen if MASK in row]
    assert len(noisy) == 2 and noisy[0][:2] == [1, 1], "the prompt's tail is visible"
    assert noisy[1][3] == MASK, "what lies behind the answer is masked"


def test_a_block_sees_the_clean_blocks_before_it() -> None:
    """The predictions are those of the whole text in one pass, and its clean tokens are computed once."""
    model, prompt, answer = ToyModel(2), [3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8, 9]
    forward = CachedForward(model)
    found = predict_answers(forward, Alone(), [(prompt, answer)], CONTRACT, "cpu")
    expected = [
        prediction
        for is_commit, ids, positions, _ in forward.calls
        if not is_commit
        for prediction in expected_of_whole(model, [*prompt, *answer], ids, positions[0])
    ]
    assert len({start for is_commit, _, (start, *_), _ in forward.calls if not is_commit}) == 3, "three blocks"
    assert [(one.num_masked, one.is_right) for one in found] == [(one.num_masked, one.is_right) for one in expected]
    assert [one.confidence for one in found] == pytest.approx([one.confidence for one in expected], rel=1e-6)
    assert sum(len(ids) for is_commit, ids, *_ in forward.calls if is_commit) == 12


def expected_of_whole(model: ToyModel, text: list[int], ids: list[int], start: int) -> list[Prediction]:
    """Predictions of the masked tokens of `text` in a block with tokens `ids`, all clean tokens computed with it."""
    whole = torch.tensor([*text[:start], *ids])
    places = torch.arange(len(whole))
    roles = torch.stack([torch.zeros_like(places), places // CONTRACT.block_size, (places >= start).long()], 1)
    confidence = model.logits(whole, places, roles).softmax(1)
    confidence[:, MASK] = 0.0
    masked = [place for place in range(start, min(start + len(ids), len(text))) if whole[place] == MASK]
    return [
        Prediction(len(masked), float(confidence[place].max()), int(confidence[place].argmax()) == text[place])
        for place in masked
    ]


def test_an_answer_ends_where_the_context_does() -> None:
    contract, pair = replace(CONTRACT, context_length=10), ([1] * 6, [7] * 12)
    forward = ScriptedForward({})
    found = predict_answers(forward, Alone(), [pair], contract, "cpu")
    assert {len(row) for row in forward.seen if MASK in row} == {4, 2}
    assert {prediction.num_masked for prediction in found} == {1, 2}
    assert mean_block([pair], contract) == 2


def test_counts_by_hand() -> None:
    predictions = [
        Prediction(1, 0.95, True),
        Prediction(2, 0.95, False),
        Prediction(3, 0.5, True),
        Prediction(3, 0.91, True),
        Prediction(4, 0.2, False),
    ]
    assert table(predictions, 32, 0.9) == [
        Confidence(32, 0.9, 1, 1, 1, 1, 1),
        Confidence(32, 0.9, 2, 3, 2, 2, 1),
        Confidence(32, 0.9, 4, 1, 0, 0, 0),
    ]


def test_expected_speed_by_hand() -> None:
    sure = [Confidence(8, 0.9, size, 10, 10, 10, 10) for size in (1, 2, 4, 8)]
    assert expected_tokens_per_forward(sure, 8) == 8.0, "all in one pass"
    never = [replace(row, num_sure=0) for row in sure]
    assert expected_tokens_per_forward(never, 8) == 1.0, "one token a pass"
    half = [replace(row, num_sure=5) for row in sure]
    assert expected_tokens_per_forward(half, 8) == 8 / 4, "8, 4, 2, 1: four passes"
    most = [replace(row, num_sure=9) for row in sure]
    assert expected_tokens_per_forward(most, 8) == pytest.approx(8 / 1.8), "0.8 of a token is left for a second pass"
    assert expected_tokens_per_forward(sure[2:], 2) == 2.0, "without a row below, the first"


def test_mean_block_counts_the_answer_alone() -> None:
    assert mean_block([([1] * 6, [2] * 5), ([1] * 4, [2])], CONTRACT) == pytest.approx((2 + 3 + 1) / 3)
