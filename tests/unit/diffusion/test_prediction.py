"""Which tokens are proposed, and which are kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.prediction import accept, predict

VOCAB, MASK = 23, 22


def test_accept_rules_by_hand() -> None:
    confidence = torch.tensor([0.5, 0.95, 0.7, 0.95])
    assert accept(confidence, 0.6, 1).tolist() == [False, True, True, True]
    assert accept(confidence, 0.95, 1).tolist() == [False, True, False, False]  # not above; the leftmost of equals
    assert accept(confidence, 0.95, 3).tolist() == [False, True, True, True]
    assert accept(confidence, 0.6, 4).tolist() == [True] * 4
    assert accept(confidence, 1.0, 9).tolist() == [True] * 4


def test_mask_token_is_never_generated_and_keeps_its_probability() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, MASK], logits[0, 5] = 10.0, 2.0
    token, confidence = predict(logits, MASK, DecodingConfig(), torch.Generator())
    assert token.item() == 5
    assert confidence.item() == pytest.approx(math.exp(2) / (math.exp(10) + math.exp(2) + VOCAB - 2), rel=1e-5)
    for seed in range(20):
        token, _ = predict(logits, MASK, DecodingConfig(temperature=1.0), torch.Generator().manual_seed(seed))
        assert token.item() != MASK


def test_sampling_follows_the_filtered_distribution() -> None:
    probabilities = torch.full((VOCAB,), 1e-9)
    probabilities[:4] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    logits = probabilities.log().repeat(4000, 1)

    def frequencies(**options: float) -> Tensor:
        config = replace(DecodingConfig(temperature=1.0), **options)
        tokens, confidence = predict(logits, MASK, config, torch.Generator().manual_seed(0))
        torch.testing.assert_close(confidence, (probabilities / probabilities.sum())[tokens])
        return torch.bincount(tokens, minlength=VOCAB)[:4] / 4000

    close = {"atol": 0.03, "rtol": 0.0}
    torch.testing.assert_close(frequencies(), torch.tensor([0.1, 0.4, 0.3, 0.2]), **close)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0.0, 4 / 7, 3 / 7, 0.0]), **close)
    torch.testing.assert_close(frequencies(top_p=0.75), torch.tensor([0.0, 4 / 9, 3 / 9, 2 / 9]), **close)
    torch.testing.assert_close(frequencies(top_p=0.65), torch.tensor([0.0, 4 / 7, 3 / 7, 0.0]), **close)
    torch.testing.assert_close(frequencies(temperature=0.5), torch.tensor([1.0, 16.0, 9.0, 4.0]) / 30, **close)
