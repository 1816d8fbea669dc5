"""The head over two tensor ranks against one rank that holds the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.ranks import run_ranks
from megatron_dllm.model.head import target_cross_entropy

NUM_TARGETS, HIDDEN, VOCAB = 40, 12, 50
OF_NLL = torch.linspace(-1.0, 2.0, NUM_TARGETS).clamp(min=0)
OF_ENTROPY = torch.linspace(3.0, -1.0, NUM_TARGETS).clamp(min=0)

Result = dict[str, Tensor]


def _run(
    rank: int, size: int, group: torch.distributed.ProcessGroup | None, chunk_targets: int, temperature: float
) -> Result:
    """Outputs and gradients on this rank's part of the vocabulary, as plain tensors."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TARGETS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).chunk(size)[rank].clone().requires_grad_()
    targets = torch.randint(VOCAB, (NUM_TARGETS,), generator=generator)
    outputs = target_cross_entropy(
        hidden, weight, targets, group, chunk_elements=chunk_targets * len(weight), entropy_temperature=temperature
    )
    of_hidden, of_weight = torch.autograd.grad(
        (outputs.nll * OF_NLL + outputs.entropy * OF_ENTROPY).sum(), (hidden, weight)
    )
    return {
        "nll": outputs.nll.detach(),
        "is_correct": outputs.is_correct,
        "entropy": outputs.entropy.detach(),
        "max_probability": outputs.max_probability,
        "hidden": of_hidden,
        "weight": of_weight,
    }


def _run_rank(chunk_targets: int, temperature: float) -> Result:
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    result = _run(rank, size, torch.distributed.group.WORLD, chunk_targets, temperature)
    torch.distributed.all_reduce(result["hidden"])
    return result


@pytest.mark.parametrize(("chunk_targets", "temperature"), [(1, 1.0), (1000, 1.0), (7, 0.5)])
def test_a_divided_vocabulary_changes_no_output_and_no_gradient(chunk_targets: int, temperature: float) -> None:
    expected = _run(0, 1, None, 1000, temperature)
    # The rounding of a logit is divided by the temperature, like the logit.
    limit = 1e-6 / min(temperature, 1.0)
    results = run_ranks(_run_rank, 2, chunk_targets, temperature)
    for result in results:
        assert torch.equal(result["is_correct"], expected["is_correct"])
        for name in ("nll", "entropy", "max_probability"):
            torch.testing.assert_close(result[name], expected[name], rtol=1e-6, atol=1e-6)
        assert _distance(result["hidden"], expected["hidden"]) < limit
    assert _distance(torch.cat([result["weight"] for result in results]), expected["weight"]) < limit


def _distance(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())
