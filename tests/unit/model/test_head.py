"""The chunked head against F.cross_entropy; over tensor ranks in tests/distributed/test_model_layouts.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dllm.model.head import target_cross_entropy

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
    nll, is_correct = target_cross_entropy(hidden, weight, targets, None, chunk_elements=chunk_targets * VOCAB)
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
    nll, _ = target_cross_entropy(hidden * 1e4, weight, targets, None)
    expected_nll = F.cross_entropy(hidden * 1e4 @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-2)


def test_of_equal_logits_the_lowest_id_is_predicted() -> None:
    _, is_correct = target_cross_entropy(
        torch.zeros(3, HIDDEN), torch.ones(VOCAB, HIDDEN), torch.tensor([0, 1, 0]), None
    )
    assert is_correct.tolist() == [True, False, True]


def test_chunks_of_a_bf16_model_are_summed_in_fp32() -> None:
    hidden, weight, targets = _inputs(400, torch.bfloat16)
    nll, _ = target_cross_entropy(hidden, weight, targets, None, chunk_elements=VOCAB)
    (gradient,) = torch.autograd.grad(nll.sum(), weight)
    assert nll.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    wide = weight.detach().float().requires_grad_()
    expected_nll = F.cross_entropy(hidden.detach().float() @ wide.t(), targets, reduction="none")
    (expected,) = torch.autograd.grad(expected_nll.sum(), wide)
    assert (gradient.float() - expected).norm() < 0.01 * expected.norm()


def test_the_logits_of_all_targets_never_exist_together() -> None:
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
        nll, _ = target_cross_entropy(hidden, weight, targets, None, chunk_elements=4 * VOCAB)
        nll.sum().backward()
    assert max(sizes) <= max(weight.numel(), hidden.numel()) < 64 * VOCAB
