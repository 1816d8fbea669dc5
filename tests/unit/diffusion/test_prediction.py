"""Which tokens are proposed, and which are kept."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.prediction import Proposals, predict

VOCAB, MASK = 23, 22


def _predict(logits: Tensor, config: DecodingConfig, seed: int = 0) -> Proposals:
    return predict(logits.clone(), MASK, config, [torch.Generator().manual_seed(seed)], [len(logits)])


def test_mask_token_is_never_generated_and_keeps_its_probability() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, MASK], logits[0, 5] = 10.0, 2.0
    found = _predict(logits, DecodingConfig())
    assert found.token_ids.item() == 5
    assert found.confidence.item() == pytest.approx(math.exp(2) / (math.exp(10) + math.exp(2) + VOCAB - 2), rel=1e-5)
    for seed in range(20):
        assert _predict(logits, DecodingConfig(temperature=1.0), seed).token_ids.item() != MASK


def test_sampling_follows_the_filtered_distribution() -> None:
    probabilities = torch.full((VOCAB,), 1e-9)
    probabilities[:4] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    logits = probabilities.log().repeat(4000, 1)

    def frequencies(**options: float) -> Tensor:
        config = replace(DecodingConfig(temperature=1.0), **options)
        found = _predict(logits, config)
        torch.testing.assert_close(found.confidence, (probabilities / probabilities.sum())[found.token_ids])
        return torch.bincount(found.token_ids, minlength=VOCAB)[:4] / 4000

    close = {"atol": 0.03, "rtol": 0.0}
    torch.testing.assert_close(frequencies(), torch.tensor([0.1, 0.4, 0.3, 0.2]), **close)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0.0, 4 / 7, 3 / 7, 0.0]), **close)
    torch.testing.assert_close(frequencies(top_p=0.75), torch.tensor([0.0, 4 / 9, 3 / 9, 2 / 9]), **close)
    torch.testing.assert_close(frequencies(top_p=0.65), torch.tensor([0.0, 4 / 7, 3 / 7, 0.0]), **close)
    torch.testing.assert_close(frequencies(temperature=0.5), torch.tensor([1.0, 16.0, 9.0, 4.0]) / 30, **close)


def test_a_text_s_samples_do_not_depend_on_the_texts_beside_it() -> None:
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1))
    config = DecodingConfig(temperature=1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    together = predict(logits.clone(), MASK, config, generators, [4, 0, 5])
    apart = [_predict(logits[:4], config, 3), _predict(logits[4:], config, 5)]
    assert together.token_ids.tolist() == [*apart[0].token_ids.tolist(), *apart[1].token_ids.tolist()]


def test_entropy_is_computed_for_the_rule_that_reads_it() -> None:
    logits = torch.tensor([[0.0] * VOCAB, [9.0] + [-math.inf] * (VOCAB - 1)])
    found = _predict(logits, DecodingConfig(rule="entropy_bound"))
    assert found.entropy.tolist() == pytest.approx([math.log(VOCAB), 0.0], abs=1e-6)
    assert _predict(logits, DecodingConfig()).entropy.tolist() == [0.0, 0.0]


def test_predictions_survive_packing() -> None:
    ids, confidence = torch.tensor([3, 157_000]), torch.tensor([0.1, 1 / 3])
    found = Proposals(ids, confidence, torch.tensor([0.7, 0.0]), ids - 1, confidence / 3)
    is_place = torch.tensor([[False, True], [True, False]])
    spread = Proposals.unpacked(found.packed(), is_place)
    assert spread.token_ids.tolist() == [[0, 3], [157_000, 0]]
    for item in fields(Proposals):
        assert torch.equal(getattr(spread, item.name)[is_place], getattr(found, item.name))
