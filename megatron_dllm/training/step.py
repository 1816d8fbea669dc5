"""One optimizer step through megatron-core's schedules: forward, backward, gradient norm, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.step_sums import StepSums
from megatron_dllm.model.asked import Taught
from megatron_dllm.model.objective import Objective
from megatron_dllm.model.pipeline import EmbeddingNoise, run_schedule
from megatron_dllm.parallel.optimizer_parts import optimizer_parts
from megatron_dllm.training.engine import Engine
from megatron_dllm.training.gradient_norm import gradient_norm


@dataclass(frozen=True)
class StepResult:
    """What one step did. `sums` are over the global batch, equal on every rank.

    `micro_batches` are as they were trained: where a loss compares documents, their loss weights are not those of the
    rows (`training.weighing`). `must_stop`: some rank was asked to before the backward pass of the step had been given
    to its device.
    """

    sums: StepSums
    grad_norm: float
    is_applied: bool
    reason: str = ""
    micro_batches: Sequence[Batch] = ()
    must_stop: bool = False

    @property
    def loss(self) -> float:
        """Weighted loss in nats per maskable token: the NLL bound with the ELBO weight."""
        return self.sums.mean_loss


def train_step(
    engine: Engine,
    micro_batches: Sequence[Batch],
    device: torch.device,
    objective: Objective,
    noise: EmbeddingNoise,
    observe: Callable[[Batch], None] | None = None,
    spike_limit: float = math.inf,
    taught: Iterable[Taught] | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Forward, backward and update. The update is withheld if loss or gradient norm is not finite or too large.

    The host waits for the device once, for the gradient norm; everything else that it reads has arrived by then.

    Args:
        engine: model and optimizer of this rank.
        micro_batches: this rank's part of the global batch.
        device: where to compute.
        objective: whose loss is taken.
        noise: on the embeddings of masked tokens.
        observe: told each micro-batch before its forward pass.
        spike_limit: largest gradient norm that is applied.
        taught: what a second model says of each micro-batch (`training.teaching`); None: none teaches.
        must_stop: whether this rank was asked to.

    Returns:
        The result; `is_applied` false with a `reason` where the weights were left as they were.
    """
    for chunk in engine.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    biases = _moving_expert_biases(engine)
    biases_before = [bias.clone() for bias in biases]
    totals = run_schedule(
        engine.chunks,
        micro_batches,
        device,
        engine.groups,
        objective,
        noise=noise,
        observe=observe,
        taught=taught,
        must_stop=must_stop,
    )
    engine.optimizer.prepare_grads()
    grad_norm = gradient_norm(engine.optimizer)
    sums, is_asked = totals.read()
    result = StepResult(sums, grad_norm, True, "", micro_batches, is_asked)
    reason = ""
    if not math.isfinite(result.loss) or not math.isfinite(grad_norm):
        reason = f"loss {result.loss}, gradient norm {grad_norm}: not finite"
    elif grad_norm > spike_limit:
        reason = f"gradient norm {grad_norm:.4g} above the limit {spike_limit:.4g}"
    if reason:
        for bias, before in zip(biases, biases_before, strict=True):
            bias.copy_(before)
        return replace(result, is_applied=False, reason=reason)
    clip_gradients(engine, grad_norm)
    engine.optimizer.step_with_ready_grads()
    return result


def _moving_expert_biases(engine: Engine) -> list[Tensor]:
    """The routers' biases where megatron-core moves them: with the gradients, before the step is judged."""
    if not engine.transformer_config.moe_router_bias_update_rate:
        return []
    return [
        module.expert_bias
        for chunk in engine.chunks
        for module in chunk.modules()
        if getattr(module, "expert_bias", None) is not None
    ]


def clip_gradients(engine: Engine, grad_norm: float) -> None:
    """Shorten the gradients of this norm to the longest that is allowed."""
    for part in optimizer_parts(engine.optimizer):
        if part.config.clip_grad <= 0.0:
            continue
        parameters = part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
