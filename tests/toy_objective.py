"""An objective of its own: large NLLs weigh more, and their squares are logged."""

from __future__ import annotations

from megatron_dllm.config import NoiseConfig, StageConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.losses.step_sums import token_sums
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.model.objective import MicroLoss, Objective

LAMBDA = 0.1


def toy_loss(batch: Batch, outputs: TargetOutputs) -> MicroLoss:
    """Sum of weight x NLL + LAMBDA x NLL^2 over the targets, divided by the maskable tokens."""
    squares = outputs.nll.square().sum()
    total = (batch.loss_weights * outputs.nll).sum() + LAMBDA * squares
    sums = token_sums(total, batch.num_maskable, outputs.nll, outputs.is_correct, batch.target_t)
    return MicroLoss(total, batch.num_maskable, sums.with_extra(square_nll=squares))


def toy_objective(stage: StageConfig, noise: NoiseConfig) -> Objective:
    """The toy loss on block diffusion's noise."""
    return Objective(NoiseSpec.for_stage(noise, stage), shift=False, loss=toy_loss, extra_sums=("square_nll",))
