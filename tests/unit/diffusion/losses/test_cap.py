"""The entropies of right guesses, and what is logged beside them, on a case worked out by hand."""

from __future__ import annotations

import torch

from megatron_dllm.diffusion.losses.cap import CONFIDENT, LEVEL_MEANS, confidence_levels, right_entropy
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.losses.step_sums import NUM_BUCKETS

ENTROPY = torch.tensor([0.5, 2.0, 0.25, 3.0])
IS_CORRECT = torch.tensor([True, False, True, False])
# The third guess stands exactly at the limit, which is not above it.
MAX_PROBABILITY = torch.tensor([0.99, 0.96, CONFIDENT, 0.3])


def test_only_right_guesses_count() -> None:
    assert right_entropy(ENTROPY, IS_CORRECT) == 0.75


def test_a_wrong_guess_has_a_gradient_of_exactly_zero() -> None:
    entropy = ENTROPY.clone().requires_grad_()
    right_entropy(entropy, IS_CORRECT).backward()
    assert entropy.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_levels_by_hand() -> None:
    outputs = TargetOutputs(torch.ones(4), IS_CORRECT, ENTROPY, MAX_PROBABILITY)
    levels = confidence_levels(outputs, torch.tensor([0.31, 0.35, 0.39, 1.0]))
    assert tuple(levels) == LEVEL_MEANS
    expected = {
        "confident_right_t": {3: [1, 3], 9: [0, 1]},
        "confident_wrong_t": {3: [1, 3], 9: [0, 1]},
        "entropy_right_t": {3: [0.75, 2], 9: [0, 0]},
    }
    for name, rows in expected.items():
        assert levels[name].tolist() == [rows.get(level, [0, 0]) for level in range(NUM_BUCKETS)], name


def test_levels_without_targets_are_zero() -> None:
    empty = torch.zeros(0)
    levels = confidence_levels(TargetOutputs(empty, empty.bool(), empty, empty), empty)
    assert all(table.shape == (NUM_BUCKETS, 2) and not table.any() for table in levels.values())
    assert right_entropy(empty, empty.bool()) == 0.0
