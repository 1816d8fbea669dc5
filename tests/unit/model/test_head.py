"""The chunked head against torch's dense formulas; over tensor ranks in tests/distributed/test_head.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dllm.model.head import _logits_gradient, nll_gradient, target_cross_entropy
from megatron_dllm.model.vocabulary_sums import chunk_sums

HIDDEN, VOCAB = 12, 50


def _inputs(num_targets: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_targets)
    hidden = torch.randn(num_targets, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (num_targets,), generator=generator)


@pytest.mark.parametrize("num_targets", [0, 1, 7, 64])
@pytest.mark.parametrize("chunk_targets", [1, 5, 1000])
def test_equals_cross_entropy(num_targets: int, chunk_targets: int) -> None:
    hidden, weight, targets = _inputs(num_targets)
    scale = torch.linspace(0.1, 2.0, num_targets)
    outputs = target_cross_entropy(hidden, weight, targets, None, chunk_elements=chunk_targets * VOCAB)
    nll, is_correct = outputs.nll, outputs.is_correct
    gradients = torch.autograd.grad((nll * scale).sum(), (hidden, weight))

    logits = hidden @ weight.t()
    expected_nll = F.cross_entropy(logits, targets, reduction="none")
    expected_gradients = torch.autograd.grad((expected_nll * scale).sum(), (hidden, weight))
    torch.testing.assert_close(nll, expected_nll, rtol=1e-6, atol=1e-6)
    assert torch.equal(is_correct, logits.argmax(-1) == targets)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = _inputs(9)
    nll = target_cross_entropy(hidden * 1e4, weight, targets, None).nll
    expected_nll = F.cross_entropy(hidden * 1e4 @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-2)


def test_of_equal_logits_the_lowest_id_is_predicted() -> None:
    outputs = target_cross_entropy(torch.zeros(3, HIDDEN), torch.ones(VOCAB, HIDDEN), torch.tensor([0, 1, 0]), None)
    assert outputs.is_correct.tolist() == [True, False, True]


def test_chunks_of_a_bf16_model_are_summed_in_fp32() -> None:
    hidden, weight, targets = _inputs(400, torch.bfloat16)
    nll = target_cross_entropy(hidden, weight, targets, None, chunk_elements=VOCAB).nll
    gradients = torch.autograd.grad(nll.sum(), (hidden, weight))
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected_nll = F.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="none")
    assert nll.dtype == torch.float32
    for gradient, expected in zip(gradients, torch.autograd.grad(expected_nll.sum(), wide), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("temperature", [None, 1.0, 0.5])
def test_the_logits_of_all_targets_never_exist_together(temperature: float | None) -> None:
    """The largest tensor made on the way is a chunk's, not that of all targets."""
    hidden, weight, targets = _inputs(64)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            output = function(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)
            )
            return output

    with Watch():
        outputs = target_cross_entropy(
            hidden, weight, targets, None, chunk_elements=4 * VOCAB, entropy_temperature=temperature
        )
        (outputs.nll.sum() + (0.0 if temperature is None else outputs.entropy.sum())).backward()
    assert max(sizes) <= max(weight.numel(), hidden.numel()) < 64 * VOCAB


def test_what_is_one_kernel_on_cuda_says_the_same() -> None:
    """Written as a whole, as CUDA compiles them: the sums of a chunk, and the gradient of some columns of it."""
    hidden, weight, targets = _inputs(20)
    logits = (hidden @ weight.t()).detach()
    best, best_id, target, total = chunk_sums(logits, targets)
    expected = torch.logsumexp(logits, dim=-1)
    torch.testing.assert_close(total.log() + best, expected)
    assert torch.equal(best_id, logits.argmax(-1)) and torch.equal(target, logits[range(20), targets])
    grad_nll = torch.rand(20)
    for columns in (slice(0, 7), slice(7, VOCAB)):
        arguments = (expected, targets - columns.start, grad_nll)
        got = nll_gradient(logits[:, columns].contiguous(), *arguments)
        torch.testing.assert_close(got, _logits_gradient(logits[:, columns].clone(), *arguments, None))


def _entropy(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    return target_cross_entropy(hidden, weight, targets, None, entropy_temperature=temperature).entropy


@pytest.mark.parametrize("num_targets", [0, 1, 64])
@pytest.mark.parametrize("chunk_targets", [4, 5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_entropy_and_its_gradient_equal_the_dense_formula(
    num_targets: int, chunk_targets: int, temperature: float
) -> None:
    """Some targets weigh only the NLL, some only the entropy, some both."""
    hidden, weight, targets = _inputs(num_targets)
    of_nll = torch.linspace(-1.0, 2.0, num_targets).clamp(min=0)
    of_entropy = torch.linspace(3.0, -1.0, num_targets).clamp(min=0)
    outputs = target_cross_entropy(
        hidden, weight, targets, None, chunk_elements=chunk_targets * VOCAB, entropy_temperature=temperature
    )
    gradients = torch.autograd.grad((outputs.nll * of_nll + outputs.entropy * of_entropy).sum(), (hidden, weight))

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = wide[0] @ wide[1].t()
    log_p, tempered = (torch.log_softmax(logits / value, dim=-1) for value in (1.0, temperature))
    expected_entropy = -(tempered.exp() * tempered).sum(-1)
    expected_nll = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected_gradients = torch.autograd.grad((expected_nll * of_nll + expected_entropy * of_entropy).sum(), wide)
    torch.testing.assert_close(outputs.entropy.double(), expected_entropy, rtol=1e-6, atol=1e-6)
    assert not outputs.max_probability.requires_grad
    expected_max = log_p.detach().exp().amax(-1)
    torch.testing.assert_close(outputs.max_probability.double(), expected_max, rtol=1e-5, atol=0)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_entropy_gradient_equals_finite_differences(temperature: float) -> None:
    hidden, weight, targets = _inputs(7)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    step = 3e-3
    (gradient,) = torch.autograd.grad(_entropy(hidden, weight, targets, temperature).sum(), hidden)
    high, low = (_entropy(hidden + sign * step * direction, weight, targets, temperature).double() for sign in (1, -1))
    expected = (high - low) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(-1).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_uniform_predictions_have_the_entropy_log_v_and_no_gradient(temperature: float) -> None:
    hidden, _, targets = _inputs(5)
    row = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight = row.expand(VOCAB, HIDDEN).clone().requires_grad_()
    entropy = _entropy(hidden, weight, targets, temperature)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(VOCAB)), rtol=1e-6, atol=0)
    for gradient in torch.autograd.grad(entropy.sum(), (hidden, weight)):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_certain_predictions_have_neither_entropy_nor_gradient(temperature: float) -> None:
    weight = torch.eye(VOCAB)
    hidden = (200.0 * torch.eye(VOCAB)[:9]).requires_grad_()
    entropy = _entropy(hidden, weight, torch.arange(9), temperature)
    (gradient,) = torch.autograd.grad(entropy.sum(), hidden)
    assert entropy.abs().max() == 0.0 and gradient.abs().max() == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_of_two_tokens_is_the_binary_entropy(temperature: float) -> None:
    a = torch.linspace(-8.0, 8.0, 33, dtype=torch.float64)
    p = torch.sigmoid(a / temperature)
    expected = -(p * p.log() + (1 - p) * (1 - p).log())
    hidden = torch.stack([a, torch.zeros_like(a)], dim=-1).float()
    entropy = _entropy(hidden, torch.eye(2), torch.zeros(33, dtype=torch.int64), temperature)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropy_of_large_logits_keeps_its_digits(temperature: float) -> None:
    """A common offset of all logits is no information, however much larger than their differences it is."""
    logits = torch.tensor([[4096.0, 4095.0, 4094.5]])
    entropy = _entropy(logits, torch.eye(3), torch.tensor([0]), temperature)
    p = torch.softmax(logits.double() / temperature, -1)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk_targets", [3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_leaves_the_loss_and_its_gradient_as_they_are(chunk_targets: int, temperature: float) -> None:
    """Also where it is computed and weighs 0: what the loss of a target gives does not change in a bit."""
    hidden, weight, targets = _inputs(64)
    results = []
    for asked in (None, temperature):
        outputs = target_cross_entropy(
            hidden, weight, targets, None, chunk_elements=chunk_targets * VOCAB, entropy_temperature=asked
        )
        loss = outputs.nll.sum() + (0.0 if asked is None else 0.0 * outputs.entropy.sum())
        results.append((outputs.nll, outputs.is_correct, *torch.autograd.grad(loss, (hidden, weight))))
        assert (outputs.entropy is None) == (outputs.max_probability is None) == (asked is None)
    assert all(torch.equal(got, expected) for expected, got in zip(*results, strict=True))
