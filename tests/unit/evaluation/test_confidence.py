"""How sure a model is of right answers: masks, counts, and the speed that follows."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
    """The predictions are those of the whole text in one pass."""
    model, prompt, answer = ToyModel(2), [3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8, 9]
    found = predict_answers(CachedForward(model), Alone(), [(prompt, answer)], CONTRACT, "cpu")
    other = predict_answers(CachedForward(model), Alone(), [([7, *prompt[1:]], answer)], CONTRACT, "cpu")
    assert [prediction.num_masked for prediction in found] == [prediction.num_masked for prediction in other]
    assert [prediction.confidence for prediction in found] != [prediction.confidence for prediction in other]
    again = predict_answers(CachedForward(model), Alone(), [(prompt, answer)], CONTRACT, "cpu")
    assert again == found


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
