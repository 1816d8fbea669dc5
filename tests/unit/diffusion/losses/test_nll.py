"""Sums and counts of the loss: what is weighted, what is counted, and that a split into micro-batches is invisible."""

from __future__ import annotations

import pytest
import torch

from megatron_dllm.diffusion.losses.nll import CORRECT, COUNT, NLL, bucket_means, bucket_sums, weighted_nll


def test_weighted_sum_by_hand():
    nll = torch.tensor([1.0, 2.0, 3.0])
    assert weighted_nll(nll, torch.tensor([2.0, 1.0, 0.5])).item() == 5.5


def test_gradient_is_the_weight():
    nll, weights = torch.rand(7, requires_grad=True), torch.rand(7)
    weighted_nll(nll, weights).backward()
    assert torch.equal(nll.grad, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_fp32_whatever_the_nll(dtype):
    # 1024 x 1.5 is lost in bfloat16, whose integers end at 256.
    total = weighted_nll(torch.full((1025,), 1.5, dtype=dtype), torch.ones(1025, dtype=dtype))
    assert total.dtype == torch.float32 and total.shape == () and total.item() == 1537.5


def test_uneven_micro_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    nll, t = torch.rand(100, generator=generator), torch.rand(100, generator=generator)
    is_correct = torch.rand(100, generator=generator) < 0.3
    parts = [slice(0, 3), slice(3, 3), slice(3, 90), slice(90, 100)]
    torch.testing.assert_close(sum(weighted_nll(nll[p], 1 / t[p]) for p in parts), weighted_nll(nll, 1 / t))
    torch.testing.assert_close(
        sum(bucket_sums(nll[p], is_correct[p], t[p], 4) for p in parts), bucket_sums(nll, is_correct, t, 4)
    )


def test_no_targets():
    empty = torch.zeros(0, requires_grad=True)
    loss = weighted_nll(empty, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0 and empty.grad.shape == (0,)
    sums = bucket_sums(empty, torch.zeros(0, dtype=torch.bool), torch.zeros(0), 5)
    assert torch.equal(sums, torch.zeros(5, 3, dtype=torch.float64))
    nll, accuracy = bucket_means(sums)
    assert not nll.any() and not accuracy.any()


def test_buckets_by_hand():
    t = torch.tensor([0.0, 0.24, 0.25, 0.6, 0.99, 1.0])
    nll = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    is_correct = torch.tensor([True, False, True, False, True, True])
    sums = bucket_sums(nll, is_correct, t, 4)
    assert sums[:, NLL].tolist() == [3.0, 4.0, 8.0, 48.0]
    assert sums[:, COUNT].tolist() == [2.0, 1.0, 1.0, 2.0]
    assert sums[:, CORRECT].tolist() == [1.0, 1.0, 0.0, 2.0]
    assert not sums.requires_grad
    mean, accuracy = bucket_means(sums)
    assert mean.tolist() == [1.5, 4.0, 8.0, 24.0] and accuracy.tolist() == [0.5, 1.0, 0.0, 1.0]
    total_mean, total_accuracy = bucket_means(sums.sum(0))
    assert total_mean.item() == 63 / 6 and total_accuracy.item() == pytest.approx(4 / 6)


def test_counts_stay_exact_where_fp32_would_stop():
    sums = bucket_sums(torch.ones(1), torch.ones(1, dtype=torch.bool), torch.ones(1), 1)
    assert (sums + 2**24)[0, COUNT].item() == 2**24 + 1
