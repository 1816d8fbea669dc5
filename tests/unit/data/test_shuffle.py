"""The keyed permutation: a bijection, different for every key, without visible order."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dllm.data.shuffle import KeyedPermutation, mix_key


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_is_a_bijection(size: int) -> None:
    order = KeyedPermutation(size, (7, 0))(np.arange(size))
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_any_part_of_the_order_can_be_computed_alone() -> None:
    permutation = KeyedPermutation(1000, (1, 2))
    expected_part = permutation(np.arange(1000))[250:300]
    np.testing.assert_array_equal(permutation(np.arange(250, 300)), expected_part)


def test_keys_give_unrelated_orders() -> None:
    orders = [KeyedPermutation(5000, key)(np.arange(5000)) for key in [(1, 0), (1, 1), (2, 0), (0, 1)]]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert (one == other).sum() < 10  # 1 is expected of two random orders
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.06


def test_every_place_is_equally_likely_over_keys() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), KeyedPermutation(6, (seed, 0))(np.arange(6))] += 1
    # 25 degrees of freedom; 52.6 is the 99.9 % point.
    assert ((counts - 500.0) ** 2 / 500.0).sum() < 52.6


def test_neighbours_are_scattered() -> None:
    steps = np.abs(np.diff(KeyedPermutation(100_000, (3, 3))(np.arange(100_000))))
    # |difference| of two uniform places has mean 1/3 and is small with probability 2e-4 here.
    assert abs(steps.mean() / 100_000 - 1 / 3) < 0.01
    assert (steps < 10).mean() < 1e-3


def test_needs_no_memory_for_a_trillion_documents() -> None:
    permutation = KeyedPermutation(10**12, (5, 0))
    documents = permutation(np.arange(10**11, 10**11 + 1024))
    assert len(np.unique(documents)) == 1024
    assert documents.min() >= 0 and documents.max() < 10**12


def test_order_stays_as_it_is_so_that_old_checkpoints_resume() -> None:
    assert KeyedPermutation(10, (1234, 0))(np.arange(10)).tolist() == [1, 4, 3, 9, 0, 6, 2, 5, 7, 8]
    assert mix_key(1, 2) == 6804074658870690613
    assert mix_key(2, 1) != mix_key(1, 2)
