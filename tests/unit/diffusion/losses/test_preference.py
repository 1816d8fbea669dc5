"""The preference loss against its definition, and its gradient against autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from megatron_dllm.diffusion.losses.document_scores import DocumentScores, Weighing
from megatron_dllm.diffusion.losses.preference import PreferenceRule, preference_loss, weigh_pairs
from megatron_dllm.diffusion.losses.step_sums import StepSums

NUM_PAIRS, NUM_VIEWS = 3, 2


def table(*rows: float | list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), -1)


def scores_of(by_view: Tensor, num_tokens: list[int] | None = None) -> DocumentScores:
    """Of pairs [d, k], with sample ids from 10 on."""
    count = len(by_view)
    tokens = torch.full((count,), 5) if num_tokens is None else torch.tensor(num_tokens)
    return DocumentScores(torch.arange(10, 10 + count), torch.zeros(count, dtype=torch.int64), tokens, by_view)


def random_scores(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -20 * torch.rand(2 * NUM_PAIRS, NUM_VIEWS, generator=generator, dtype=torch.float64)


def mean_loss(weighing: Weighing) -> float:
    return float(weighing.loss / weighing.count)


def score_gradient(weighing: Weighing) -> Tensor:
    """[d, k] fp64 the gradient of the mean loss by each score, back from the factors of the weighted NLLs."""
    return -weighing.factors / len(weighing.factors)


def expected_loss(rule: PreferenceRule, by_view: Tensor, reference: Tensor, num_tokens: Tensor) -> Tensor:
    """The definition, with a gradient: Eq. 8 on the means over views, and the chosen answers' NLL for each token."""
    gain = (by_view - reference).mean(1)
    margins = gain[0::2] - gain[1::2]
    loss = -torch.log(1 / (1 + torch.exp(-rule.beta * margins))).mean()
    return loss - rule.sft_coefficient * by_view.mean(1)[0::2].sum() / num_tokens[0::2].sum()


def test_policy_equal_to_reference() -> None:
    """Loss log 2, margin 0, gradient -(beta/2) (grad B(w) - grad B(l)), all exactly."""
    by_view = random_scores(0)
    weighing = weigh_pairs(PreferenceRule(beta=0.1), scores_of(by_view), by_view)
    assert mean_loss(weighing) == pytest.approx(math.log(2.0), rel=1e-15)
    assert weighing.largest_margin == 0.0 and weighing.ratios["margin"][0] == 0.0
    expected = torch.tensor([-0.05, 0.05], dtype=torch.float64).repeat(NUM_PAIRS)[:, None]
    torch.testing.assert_close(
        score_gradient(weighing), expected.expand(-1, NUM_VIEWS) / NUM_PAIRS / NUM_VIEWS, rtol=1e-15, atol=0.0
    )


def test_swapped_sides() -> None:
    """The margin changes its sign, and the gradient's size becomes beta sigmoid(beta m)."""
    own, reference, rule = table(-3.0, -8.0), table(-5.0, -6.0), PreferenceRule(beta=0.3)
    straight = weigh_pairs(rule, scores_of(own), reference)
    swapped = weigh_pairs(rule, scores_of(own.flip(0)), reference.flip(0))
    margin = 4.0
    assert float(straight.ratios["margin"][0]) == margin and float(swapped.ratios["margin"][0]) == -margin
    for weighing, sign in ((straight, -1.0), (swapped, 1.0)):
        size = rule.beta / (1 + math.exp(-sign * rule.beta * margin))
        assert score_gradient(weighing).flatten().tolist() == pytest.approx([-size, size], rel=1e-14)


def test_beta_zero() -> None:
    weighing = weigh_pairs(PreferenceRule(beta=0.0), scores_of(random_scores(0)), random_scores(1))
    assert mean_loss(weighing) == pytest.approx(math.log(2.0), rel=1e-15)
    assert not weighing.factors.any()


def test_equal_sides_with_one_noise_key() -> None:
    """Equal answers under the same masks have equal scores, whatever the models: the margin is 0."""
    own, reference = random_scores(0)[:1], random_scores(1)[:1]
    weighing = weigh_pairs(PreferenceRule(beta=0.1), scores_of(own.repeat(2, 1)), reference.repeat(2, 1))
    assert weighing.largest_margin == 0.0 and mean_loss(weighing) == pytest.approx(math.log(2.0), rel=1e-15)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_jensen_bounds(beta: float) -> None:
    """0 <= E[loss(estimate)] - loss(mean) <= Var(beta * estimate) / 8, by enumeration of counts and subsets."""
    size = 4
    generator = torch.Generator().manual_seed(3)
    nll = 3 * torch.rand(2, 2**size, generator=generator, dtype=torch.float64)
    estimates, probabilities = [], []
    for chosen, rejected in itertools.product(range(1, 2**size), repeat=2):
        counts = [mask.bit_count() for mask in (chosen, rejected)]
        estimates.append(size / counts[1] * nll[1, rejected] - size / counts[0] * nll[0, chosen])
        probabilities.append(1.0 / (math.prod(size * math.comb(size, count) for count in counts)))
    s, p = torch.stack(estimates), torch.tensor(probabilities, dtype=torch.float64)
    assert float(p.sum()) == pytest.approx(1.0, rel=1e-12)
    mean = (p * s).sum()
    excess = (p * preference_loss(s, beta)).sum() - preference_loss(mean, beta)
    bound = beta**2 * (p * (s - mean) ** 2).sum() / 8
    assert 0.0 < float(excess) <= float(bound)


@pytest.mark.parametrize("sft_coefficient", [0.0, 0.05])
def test_the_gradient_is_that_of_the_definition(sft_coefficient: float) -> None:
    rule = PreferenceRule(beta=0.2, sft_coefficient=sft_coefficient)
    by_view, reference = random_scores(0).requires_grad_(), random_scores(1)
    tokens = [3, 8, 2, 2, 9, 1]
    expected = expected_loss(rule, by_view, reference, torch.tensor(tokens))
    expected.backward()
    for given in (reference, reference.mean(1, keepdim=True)):
        weighing = weigh_pairs(rule, scores_of(by_view.detach(), tokens), given)
        assert mean_loss(weighing) == pytest.approx(float(expected), rel=1e-13)
        torch.testing.assert_close(score_gradient(weighing), by_view.grad, rtol=1e-12, atol=0.0)


def test_two_passes_are_one_pass_and_autograd_through_the_sums() -> None:
    """Targets of each pair in other micro-batches: the second pass needs its own weighted NLLs alone."""
    rule, num_targets = PreferenceRule(beta=0.5, sft_coefficient=0.1), 60
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(num_targets, 7, generator=generator, dtype=torch.float64)
    weights = 1 + torch.rand(num_targets, generator=generator, dtype=torch.float64)
    place = torch.randint(2 * NUM_PAIRS * NUM_VIEWS, (num_targets,), generator=generator)
    parameters = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    reference, tokens = random_scores(1), torch.tensor([3, 8, 2, 2, 9, 1])

    def nll(part: slice) -> Tensor:
        return softplus(features[part] @ parameters)

    def scores() -> Tensor:
        sums = torch.zeros(2 * NUM_PAIRS * NUM_VIEWS, dtype=torch.float64)
        return -sums.index_add(0, place, weights * nll(slice(None))).view(-1, NUM_VIEWS)

    (expected,) = torch.autograd.grad(expected_loss(rule, scores(), reference, tokens), parameters)
    weighing = weigh_pairs(rule, scores_of(scores().detach(), tokens.tolist()), reference)
    one_pass = (score_gradient(weighing) * scores()).sum()
    torch.testing.assert_close(torch.autograd.grad(one_pass, parameters)[0], expected, rtol=1e-12, atol=0.0)
    two_passes = torch.zeros_like(parameters)
    for start in range(0, num_targets, 7):
        part = slice(start, start + 7)
        total = (weights[part] * weighing.factors.flatten()[place[part]] * nll(part)).sum() / (2 * NUM_PAIRS)
        two_passes += torch.autograd.grad(total, parameters)[0]
    torch.testing.assert_close(two_passes, expected, rtol=1e-12, atol=0.0)


def test_views_apart_from_the_references() -> None:
    """The model has the first half of the views, and trains no other; the reference the second."""
    own, other = random_scores(0), random_scores(1)
    rule = PreferenceRule(beta=0.1, share_noise=False)
    found = weigh_pairs(rule, scores_of(own), other)
    expected = weigh_pairs(PreferenceRule(beta=0.1), scores_of(own[:, :1]), other[:, 1:])
    assert mean_loss(found) == mean_loss(expected)
    assert torch.equal(found.factors[:, :1], expected.factors) and not found.factors[:, 1:].any()


def test_what_is_logged_by_hand() -> None:
    own, reference = table([-2.0, -4.0], [-6.0, -8.0], [-9.0, -9.0], [-1.0, -1.0]), table(-4.0, -5.0, -8.0, -3.0)
    weighing = weigh_pairs(PreferenceRule(beta=2.0), scores_of(own, [2, 4, 3, 5]), reference)
    # Gains 1 and -2, -1 and 2: margins 3 and -3.
    means = {name: (float(total), float(count)) for name, (total, count) in weighing.ratios.items()}
    assert means == {
        "preference_accuracy": (1.0, 2.0),
        "margin": (0.0, 2.0),
        "margin_per_token": (0.0, 7.0),
        "saturated_share": (1.0, 2.0),
        "reward_chosen": (0.0, 2.0),
        "reward_rejected": (0.0, 2.0),
        "elbo_chosen": (12.0, 5.0),
        "elbo_rejected": (8.0, 9.0),
        "length_chosen": (5.0, 2.0),
        "length_rejected": (9.0, 2.0),
        "score_variance": (4.0, 4.0),
    }
    assert weighing.largest_margin == 3.0
    sums = weighing.logged(StepSums.zeros(torch.device("cpu")))
    assert sums.mean_loss == pytest.approx((math.log(1 + math.exp(-6)) + math.log(1 + math.exp(6))) / 2, rel=1e-12)
    assert sums.ratios["elbo_chosen"].tolist() == [12.0, 5.0]
    one_view = weigh_pairs(PreferenceRule(beta=2.0), scores_of(own[:, :1]), reference)
    assert "score_variance" not in one_view.ratios


def test_factors_are_found_by_epoch_and_sample_id() -> None:
    scores = scores_of(random_scores(0))
    weighing = weigh_pairs(PreferenceRule(beta=0.1), scores, random_scores(1))
    ids = torch.tensor([13, 10, 15])
    assert torch.equal(weighing.of_documents(ids, torch.zeros_like(ids)), weighing.factors[[3, 0, 5]])
    assert weighing.of_documents(ids[:0], ids[:0]).shape == (0, NUM_VIEWS)


@pytest.mark.parametrize(("ids", "epochs"), [([11, 12], [0, 0]), ([10, 12], [0, 0]), ([10, 11], [0, 1])])
def test_half_a_pair_is_a_programming_error(ids: list[int], epochs: list[int]) -> None:
    scores = DocumentScores(torch.tensor(ids), torch.tensor(epochs), torch.tensor([1, 1]), table(-1.0, -2.0))
    with pytest.raises(AssertionError, match="whole pairs"):
        weigh_pairs(PreferenceRule(beta=0.1), scores, table(-1.0, -2.0))
