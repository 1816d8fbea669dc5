"""One global batch through megatron-core's pipeline schedule: forward, and backward where a step trains.

The same run serves a training step, a validation, and a pass that gives one score to every document: they differ in
what is computed from the outputs of the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dllm.data.batch import Batch
from megatron_dllm.data.context_shard import take_context_shard
from megatron_dllm.diffusion.losses.alignment import AlignmentRule
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.losses.step_sums import StepSums
from megatron_dllm.model.alignment import Alignment
from megatron_dllm.model.asked import NOTHING, Asked, Taught
from megatron_dllm.model.attention.annealing import Opening
from megatron_dllm.model.objective import LossFunction, Objective
from megatron_dllm.parallel.groups import Groups


@dataclass(frozen=True)
class EmbeddingNoise:
    """Noise on masked embeddings in one step: relative standard deviation and the key of its draws."""

    sigma: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class StepTotals:
    """What a global batch came to, on the device: the host waits for it where it reads it, and not before.

    Attributes:
        flat: [n] fp64 the sums of the batch, of its alignment, and of the ranks that were asked to stop.
        like: names and sizes of the sums of the batch.
        alignment: of the objective.
        num_layers: of the whole model.
    """

    flat: Tensor
    like: StepSums
    alignment: AlignmentRule | None
    num_layers: int

    def read(self) -> tuple[StepSums, bool]:
        """The sums on the host, and whether any rank was asked to stop."""
        flat = self.flat.cpu()
        num_own = self.like.flatten().numel()
        own, aligned, num_asked = flat.split([num_own, len(flat) - num_own - 1, 1])
        sums = self.like.rebuild(own)
        if self.alignment is not None:
            sums = self.alignment.logged(sums, aligned, self.num_layers)
        return sums, bool(num_asked > 0)


def _local_loss(
    loss: LossFunction, is_counting: bool, batch: Batch, outputs: TargetOutputs
) -> tuple[Tensor, Tensor, StepSums]:
    """(loss sum, denominator, sums) as megatron-core wants them: it divides the gradient by the global denominator.

    Under context parallelism every rank of the group holds a part of the same rows: the first one alone counts.
    """
    found = loss(batch, outputs)
    owner, sums = int(is_counting), found.sums
    sums = replace(sums, count=sums.count * owner, num_maskable=sums.num_maskable * owner)
    return found.total, (found.count * owner).int(), sums


def _forward_step(
    finish: Callable[[Batch, TargetOutputs], Any],
    noise: EmbeddingNoise,
    observe: Callable[[Batch], None] | None,
    entropy_temperature: float | None,
    opening: Opening | None,
    batches: Iterator[tuple[Batch, Asked]],
    model: nn.Module,
) -> tuple[Any, Callable[..., Any]]:
    batch, asked = next(batches)
    if observe is not None:
        observe(batch)
    output = model(
        batch,
        mask_noise_sigma=noise.sigma,
        noise_seed=noise.seed,
        entropy_temperature=entropy_temperature,
        asked=asked,
        opening=opening,
    )
    return output, partial(finish, batch)


def local_batches(
    micro_batches: Sequence[Batch], context: ProcessGroup, device: torch.device, dealt_as: Sequence[Batch] | None = None
) -> list[Batch]:
    """This context rank's part of every micro-batch, on its device.

    Args:
        micro_batches: of whole rows.
        context: ranks that share them.
        device: of this rank.
        dealt_as: other rows whose tokens lie in the same slots, by which to deal; None: these rows themselves.
    """
    others: Sequence[Batch | None] = dealt_as or [None] * len(micro_batches)
    shards = [
        take_context_shard(batch, context.rank(), context.size(), other)
        for batch, other in zip(micro_batches, others, strict=True)
    ]
    if context.size() > 1 and device.type == "cuda":
        # The loader's batches are page-locked, a shard is not: its copy would wait for the device.
        shards = [shard.pin_memory() for shard in shards]
    return [shard.to(device) for shard in shards]


def run_batches(
    chunks: list[nn.Module],
    micro_batches: Sequence[Batch],
    device: torch.device,
    groups: Groups,
    finish: Callable[[Batch, TargetOutputs], Any],
    *,
    forward_only: bool,
    noise: EmbeddingNoise | None = None,
    observe: Callable[[Batch], None] | None = None,
    entropy_temperature: float | None = None,
    asked: Iterable[Asked] | None = None,
    students: Sequence[Batch] | None = None,
    opening: Opening | None = None,
) -> list[Any]:
    """Run micro-batches through the schedule (a collective).

    Args:
        chunks: the local model.
        micro_batches: this data-parallel rank's, of whole rows.
        device: where to compute.
        groups: of this rank.
        finish: what to compute from a micro-batch, or this context rank's part of it, and its outputs: a loss, what it
            adds to the denominator, and what is returned.
        forward_only: leave out the backward pass.
        noise: on the embeddings of masked tokens.
        observe: told each micro-batch before its forward pass.
        entropy_temperature: what the head is asked for, see `model.head`.
        asked: of each micro-batch beside the NLL, taken when the micro-batch is due; None: nothing.
        students: whole rows that each micro-batch teaches, in its slots; None: none.
        opening: how far the attention mask is open; None: all of it.

    Returns:
        What `finish` said last of each micro-batch, in order; nothing except on the last pipeline stage.
    """
    rows, row_length = micro_batches[0].input_ids.shape
    asked = asked or [NOTHING] * len(micro_batches)
    local = local_batches(micro_batches, groups.context, device, students)
    if students is not None:
        taught = local_batches(students, groups.context, device)
        asked = [replace(item, students=batch) for item, batch in zip(asked, taught, strict=True)]
    if len(chunks) > 1:
        asked = list(asked)
    iterators = [zip(local, asked, strict=True) for _ in chunks]
    forward_backward = get_forward_backward_func()
    found: list[Any] = forward_backward(
        forward_step_func=partial(
            _forward_step, finish, noise or EmbeddingNoise(), observe, entropy_temperature, opening
        ),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(local),
        seq_length=row_length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return found


def run_schedule(
    chunks: list[nn.Module],
    micro_batches: Sequence[Batch],
    device: torch.device,
    groups: Groups,
    objective: Objective,
    *,
    noise: EmbeddingNoise | None = None,
    observe: Callable[[Batch], None] | None = None,
    taught: Iterable[Taught] | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> StepTotals:
    """The sums of one global batch, and its gradients in the buffers of the chunks (a collective).

    Args:
        chunks: the local model.
        micro_batches: this data-parallel rank's, of whole rows.
        device: where to compute.
        groups: of this rank.
        objective: whose loss is taken.
        noise: on the embeddings of masked tokens.
        observe: told each micro-batch before its forward pass.
        taught: what a second model says of each micro-batch, taken when the micro-batch is due; None: none teaches.
        must_stop: whether this rank was asked to, behind its last backward pass.

    Returns:
        The sums over the global batch, the same on every rank.
    """
    finish = partial(_local_loss, objective.loss, groups.context.rank() == 0)
    transformer: Any = chunks[0].config
    num_layers = int(transformer.num_layers)
    assert objective.has_second_teacher == (taught is not None), "a second model teaches where the rules say so"
    asked = [asked_by(objective, num_layers, device) for _ in micro_batches]
    parts: list[StepSums] = run_batches(
        chunks,
        micro_batches,
        device,
        groups,
        finish,
        forward_only=False,
        noise=noise,
        observe=observe,
        entropy_temperature=objective.entropy_temperature,
        opening=objective.opening,
        asked=asked if taught is None else map(_beside, asked, taught),
    )
    like = StepSums.zeros(device, objective.extra_sums, objective.level_means, objective.ratios)
    own = torch.zeros_like(like.flatten())
    if parts and groups.tensor.rank() == 0:
        own += torch.stack([part.flatten() for part in parts]).sum(0)
    # Of the layers of every pipeline stage.
    alignments = [item.alignment.sums for item in asked if item.alignment is not None]
    aligned = [torch.stack(alignments).sum((0, 1))] if alignments else []
    flat = torch.cat([own, *aligned, own.new_full((1,), float(must_stop()))])
    dist.all_reduce(flat, group=groups.world)
    return StepTotals(flat, like, objective.alignment, num_layers)


def asked_by(objective: Objective, num_layers: int, device: torch.device) -> Asked:
    """What a step asks of a micro-batch beside the NLL, before a second model has said anything.

    Args:
        objective: of the step.
        num_layers: of the whole model.
        device: of this rank.
    """
    rule = objective.alignment
    return Asked(None if rule is None else Alignment.empty(rule, num_layers, device), objective.distill)


def _beside(asked: Asked, said: Taught) -> Asked:
    """What is asked, with what a second model says of it; the sums of the layers stay the same tensor."""
    alignment = None if asked.alignment is None else replace(asked.alignment, taught=said.states)
    return replace(asked, alignment=alignment, teacher=said.teacher)
