"""Credit by hand, against a matrix of the whole vocabulary, and in a decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.acceptance import accept
from megatron_dllm.diffusion.credit import MOST_PASSES, Trace, add_credit
from megatron_dllm.diffusion.decode import decode
from megatron_dllm.diffusion.prediction import Proposals, predict
from tests.unit.diffusion.toy_decoder import CONTRACT, MASK, PROMPT, VOCAB, CachedForward, ToyModel

RULE = DecodingConfig(rule="credit", threshold=0.8)


class ExpectedCredit:
    """The published form: a matrix of the whole vocabulary, which fades at every pass."""

    def __init__(self, width: int) -> None:
        self.credit = torch.zeros(width, VOCAB, dtype=torch.float64)

    def logits(self, logits: Tensor, is_masked: Tensor) -> Tensor:
        """[n, v] for [n, v] logits of a block, [n] bool the masked places."""
        chance = logits.double().softmax(1)
        chance[:, MASK] = 0.0
        best, first = chance.max(dim=1)
        self.credit *= RULE.credit_decay
        earned = torch.where(is_masked, best**RULE.credit_exponent, 0.0)
        self.credit.scatter_add_(1, first.unsqueeze(1), earned.unsqueeze(1))
        return logits.double() + RULE.credit_weight * torch.log(self.credit + 1)


def test_two_passes_by_hand() -> None:
    # Token 1 was first in both passes, token 2 in the older one alone.
    trace = Trace(torch.tensor([[1, 1], [2, 1]]), torch.tensor([[0.5, 0.5], [0.25, 0.5]]))
    found = add_credit(torch.zeros(2, 4), trace, RULE)
    now = 0.5**0.2
    before = 0.8 * now
    expected = torch.zeros(2, 4)
    expected[0, 1] = 0.7 * torch.log1p(torch.tensor(now + before))
    expected[1, 1], expected[1, 2] = 0.7 * torch.log1p(torch.tensor([now, 0.8 * 0.25**0.2]))
    torch.testing.assert_close(found, expected)


def test_passes_equal_a_matrix_of_the_whole_vocabulary() -> None:
    width, generator = 6, torch.Generator().manual_seed(2)
    expected, trace = ExpectedCredit(width), Trace.empty(width, 0)
    is_masked = torch.ones(width, dtype=torch.bool)
    drift = torch.randn(width, VOCAB, generator=generator)
    num_passes = 0
    while is_masked.any():
        logits = 2 * drift + torch.randn(width, VOCAB, generator=generator)
        chance = expected.logits(logits, is_masked)
        found = predict(logits[is_masked], MASK, RULE, [generator], [int(is_masked.sum())], trace.take(is_masked))
        partition = chance.logsumexp(1)
        chance[:, MASK] = -torch.inf
        best, first = chance.max(dim=1)
        assert found.token_ids.tolist() == first[is_masked].tolist()
        torch.testing.assert_close(found.confidence.double(), (best - partition).exp()[is_masked], rtol=1e-5, atol=0)
        spread = Proposals.unpacked(found.packed(), is_masked.unsqueeze(0))
        trace = trace.grown(spread.first_ids[0], spread.first_confidence[0])
        is_masked &= ~accept(spread, is_masked.unsqueeze(0), RULE)[0]
        num_passes += 1
    assert 2 < num_passes <= width


def test_a_prediction_that_is_repeated_passes_the_threshold_later() -> None:
    logits = torch.full((1, VOCAB), -20.0)
    logits[0, 4], logits[0, 9] = 0.6, 0.0  # 0.646 and 0.354
    trace, kept = Trace.empty(1, 0), []
    for _ in range(4):
        found = predict(logits.clone(), MASK, RULE, [torch.Generator()], [1], trace)
        kept.append(found.confidence.item())
        trace = trace.grown(found.first_ids, found.first_confidence)
    earned = [sum(0.8**age for age in range(number)) * 0.6457**0.2 for number in (1, 2, 3, 4)]
    expected = [torch.sigmoid(torch.tensor(0.6 + 0.7 * torch.log1p(torch.tensor(value)))).item() for value in earned]
    assert kept == pytest.approx(expected, rel=1e-4)
    assert kept[0] < 0.8 < kept[3] and torch.softmax(logits, 1)[0, 4] < kept[0]


def test_without_weight_it_is_the_threshold() -> None:
    for seed in range(5):
        config = replace(RULE, threshold=0.6, max_new_tokens=18, credit_weight=0.0)
        found = decode(CachedForward(ToyModel(seed, 3.0)), PROMPT, config, CONTRACT)
        assert found == decode(CachedForward(ToyModel(seed, 3.0)), PROMPT, replace(config, rule="threshold"), CONTRACT)


def test_repeated_tokens_come_earlier() -> None:
    config = replace(RULE, max_new_tokens=16, threshold=0.7)
    plain, credited = (
        decode(CachedForward(ToyModel(3, 3.0)), PROMPT[:4], replace(config, rule=rule), CONTRACT)
        for rule in ("threshold", "credit")
    )
    assert credited.num_denoising_forwards < plain.num_denoising_forwards


@pytest.mark.parametrize("seed", range(3))
def test_a_block_begins_without_credit(seed: int) -> None:
    """What follows a block depends on its tokens alone: the rest of a text is that of one which begins there."""
    config = replace(RULE, max_new_tokens=24, threshold=0.95, credit_weight=2.0, credit_decay=0.95)
    contract = replace(CONTRACT, block_size=8)
    prompt = [*PROMPT, 6]
    whole = decode(CachedForward(ToyModel(seed, 3.0)), prompt, config, contract)
    rest = decode(CachedForward(ToyModel(seed, 3.0)), [*prompt, *whole.generated_ids[:8]], config, contract)
    assert rest.generated_ids[:16] == whole.generated_ids[8:]
    assert rest.steps_per_block[:2] == whole.steps_per_block[1:]


def test_a_trace_is_as_long_as_it_has_to_be() -> None:
    trace = Trace.empty(2, 3, 0)
    for number in range(MOST_PASSES + 3):
        seen = torch.zeros(2, 3)
        if number > MOST_PASSES:
            seen[1, 2] = 0.5
        trace = trace.grown(torch.full((2, 3), number), seen)
    assert trace.num_passes == MOST_PASSES
    is_place = torch.zeros(2, 3, dtype=torch.bool)
    is_place[0, 0] = is_place[1, 2] = True
    taken = trace.take(is_place)
    assert taken.probabilities.tolist() == [[0.0, 0.0], [0.5, 0.5]]
    assert taken.token_ids.tolist() == [[MOST_PASSES + 1, MOST_PASSES + 2]] * 2
