"""The loss of a pair and its gradient, against the formula and torch's own derivative."""

from __future__ import annotations

import pytest
import torch

from megatron_dllm.diffusion.losses.alignment import AlignmentRule, align
from megatron_dllm.diffusion.losses.step_sums import StepSums


def test_states_pass_unchanged_and_get_the_gradient_of_one_minus_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64).float()
    weights, grad = torch.rand(6, generator=generator), torch.randn(3, 2, 5, generator=generator)
    weights[2] = 0.0
    hidden.requires_grad_()
    teacher = teacher.view(6, 5).clone().requires_grad_()
    aligned, distance = align(hidden, teacher, weights)
    aligned.backward(grad)
    expected_hidden = hidden.detach().clone().requires_grad_()
    expected = 1.0 - torch.cosine_similarity(expected_hidden.view(6, 5), teacher.detach(), dim=-1)
    ((expected * weights).sum() + (expected_hidden * grad).sum()).backward()
    assert torch.equal(aligned, hidden)
    torch.testing.assert_close(distance, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, expected_hidden.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(hidden.grad.view(6, 5)[2], grad.view(6, 5)[2])
    assert teacher.grad is None


def test_a_state_of_0_gives_no_nan() -> None:
    hidden = torch.zeros(2, 4, requires_grad=True)
    aligned, distance = align(hidden, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), torch.ones(2))
    aligned.sum().backward()
    assert distance.tolist() == [1.0, 1.0] and bool(hidden.grad.isfinite().all())


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, [0, 0, 1, 1]), (1.0, [1, 1, 1, 1]), (0.01, [0, 0, 0, 1]), (0.75, [0, 1, 1, 1])]
)
def test_masked_tokens_are_aligned_in_the_upper_layers(share: float, expected: list[int]) -> None:
    rule = AlignmentRule(weight=3.0, masked_layers=share)
    scales = [rule.scales(layer, 4) for layer in (1, 2, 3, 4)]
    assert [visible for visible, _ in scales] == [0.75] * 4
    assert [masked for _, masked in scales] == [3.0 / sum(expected) * is_in for is_in in expected]


def test_what_is_logged_by_hand() -> None:
    """One visible pair with 1 - cosine 0.5, and two masked ones with 0.25, in each of their layers of four."""
    rule, sums = AlignmentRule(weight=3.0), StepSums.zeros(torch.device("cpu"))
    totals = torch.tensor([4 * 0.5, 4.0, 2 * 2 * 0.25, 4.0], dtype=torch.float64)
    found = rule.logged(sums, totals, 4)
    assert float(found.extra["alignment_loss"]) == pytest.approx(3.0 * (0.5 + 2 * 0.25))
    assert {name: float(pair[0] / pair[1]) for name, pair in found.ratios.items()} == {
        "alignment_visible": 0.5,
        "alignment_masked": 0.25,
    }
    only_masked = AlignmentRule(weight=3.0, visible=False).logged(sums, totals, 4)
    assert list(only_masked.ratios) == ["alignment_masked"]
