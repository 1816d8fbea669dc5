"""The named sums of a step: what they hold, and that one flat vector carries all of them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megatron_dllm.diffusion.losses.nll import COUNT, bucket_sums
from megatron_dllm.diffusion.losses.step_sums import NUM_BUCKETS, StepSums, token_sums


def sums_of(seed: int, num_targets: int = 20) -> StepSums:
    generator = torch.Generator().manual_seed(seed)
    nll, t = torch.rand(num_targets, generator=generator), torch.rand(num_targets, generator=generator)
    is_correct = torch.rand(num_targets, generator=generator) < 0.3
    sums = token_sums((nll / t).sum(), torch.tensor(3 * num_targets), nll, is_correct, t)
    sums = sums.with_extra(entropy=torch.tensor(seed + 0.5), score=torch.tensor(-2.0))
    sums = sums.with_level_means({"share": torch.rand(NUM_BUCKETS, 2, generator=generator).double()})
    return sums.with_ratios(fill=(torch.tensor(seed), torch.tensor(7)))


def test_sums_by_hand() -> None:
    nll = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    t, is_correct = torch.tensor([0.0, 0.05, 1.0]), torch.tensor([True, False, True])
    sums = token_sums((nll * 2).sum(), torch.tensor(5), nll, is_correct, t)
    assert (sums.loss, sums.nll, sums.num_correct, sums.num_targets, sums.count) == (14, 7, 2, 3, 5)
    assert sums.buckets[:, COUNT].tolist() == [2, *[0] * (NUM_BUCKETS - 2), 1]
    assert torch.equal(sums.buckets, bucket_sums(nll, is_correct, t, NUM_BUCKETS))
    assert sums.mean_loss == pytest.approx(14 / 5)
    assert not sums.loss.requires_grad and sums.loss.dtype == torch.float64


def test_a_flat_vector_holds_every_sum_and_no_other() -> None:
    sums = sums_of(1)
    found = StepSums.zeros(torch.device("cpu"), ["entropy", "score"], ["share"], ["fill"]).rebuild(sums.flatten())
    assert torch.equal(found.flatten(), sums.flatten())
    for name in (item.name for item in fields(StepSums) if item.name not in ("extra", "level_means", "ratios")):
        assert torch.equal(getattr(found, name), getattr(sums, name)), name
    assert found.extra == sums.extra == {"entropy": 1.5, "score": -2.0}
    assert list(found.level_means) == ["share"] and list(found.ratios) == ["fill"]
    assert found.ratios["fill"].tolist() == [1, 7]
    assert torch.equal(found.level_means["share"], sums.level_means["share"])


def test_flat_vectors_add_up_to_the_sums_of_the_whole() -> None:
    one, other = sums_of(1), sums_of(2)
    found = one.rebuild(one.flatten() + other.flatten())
    assert found.extra["entropy"] == 1.5 + 2.5
    assert found.count == 120 and found.num_targets == 40
    assert found.loss == one.loss + other.loss
    assert torch.equal(found.buckets, one.buckets + other.buckets)
    assert torch.equal(found.level_means["share"], one.level_means["share"] + other.level_means["share"])


def test_other_names_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match="split"):
        StepSums.zeros(torch.device("cpu"), ["entropy"]).rebuild(sums_of(1).flatten())


def test_nothing_counted_is_no_loss() -> None:
    empty = torch.zeros(0)
    sums = token_sums(empty.sum(), torch.tensor(0), empty, empty.bool(), empty)
    assert sums.mean_loss == 0.0 and not sums.flatten().any()
    assert not StepSums.zeros(torch.device("cpu")).flatten().any()
