"""AR and block diffusion are two values of the same type, with the loss of the note's formula."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_dllm.config import NoiseConfig, StageConfig
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.noise import NoiseSpec
from megatron_dllm.model.objective import Objective, objective_of, token_loss, validation_objective
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch

STAGE = StageConfig(block_size=4, num_tokens=100, global_batch_size=1, learning_rate=1.0, t_max=0.9)


def test_a_stage_names_its_noise_and_its_targets() -> None:
    noise = NoiseConfig(t_unit="document")
    assert objective_of(STAGE, noise) == Objective(NoiseSpec.for_stage(noise, STAGE), shift=False, loss=token_loss)
    assert objective_of(replace(STAGE, objective="ar"), noise) == Objective(None, shift=True, loss=token_loss)


def test_validation_measures_by_counts_and_ar_exactly() -> None:
    assert validation_objective("32") == Objective(NoiseSpec.for_validation(), shift=False, loss=token_loss)
    assert validation_objective("ar") == Objective(None, shift=True, loss=token_loss)


def test_the_loss_of_tokens_by_hand() -> None:
    batch = tiny_batch(tiny_model(), [[17, 9], [24]], row_length=56, block_size=4)
    batch = replace(batch, num_maskable=torch.tensor(50))
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(len(batch.target_ids), generator=generator).requires_grad_()
    is_correct = nll.detach() < 0.5
    found = token_loss(batch, TargetOutputs(nll, is_correct))
    expected = sum(float(n) * float(w) for n, w in zip(nll.detach(), batch.loss_weights, strict=True))
    torch.testing.assert_close(float(found.total), expected, rtol=1e-6, atol=0.0)
    assert found.count == 50 and found.sums.count == 50
    assert found.sums.num_correct == int(is_correct.sum()) and found.sums.num_targets == len(nll)
    found.total.backward()
    assert torch.equal(nll.grad, batch.loss_weights)
