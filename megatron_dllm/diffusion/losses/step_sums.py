"""The sums of one global batch: one all-reduce adds them up over all ranks, and readers use them by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_dllm.diffusion.losses.nll import bucket_sums

NUM_BUCKETS = 10


@dataclass(frozen=True)
class StepSums:
    """Sums over the targets of a micro-batch or, once added up, of a global batch. All are fp64.

    Attributes:
        loss: [] weighted loss, not divided yet.
        nll: [] NLL of the targets without weights, nats.
        num_correct: [] targets that were predicted right.
        num_targets: [] tokens with a loss.
        count: [] what the loss is divided by, once, over the global batch: the maskable tokens.
        buckets: [NUM_BUCKETS, 3] sums per noise level, see `bucket_sums`.
        extra: what an objective adds up beside these, each [] under its own name.
    """

    loss: Tensor
    nll: Tensor
    num_correct: Tensor
    num_targets: Tensor
    count: Tensor
    buckets: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, device: torch.device, extra: Sequence[str] = ()) -> StepSums:
        """Zeros, for a rank that computes no loss; `extra` names the objective's own sums."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        buckets = torch.zeros(NUM_BUCKETS, 3, dtype=torch.float64, device=device)
        return cls(zero, zero, zero, zero, zero, buckets, {name: zero for name in extra})

    @property
    def mean_loss(self) -> float:
        """Loss divided by the count; 0 where nothing was counted."""
        return float(self.loss / self.count.clamp(min=1))

    def flatten(self) -> Tensor:
        """[n] fp64: every sum, in the order of the fields and then of `extra`."""
        scalars = torch.stack([self.loss, self.nll, self.num_correct, self.num_targets, self.count])
        return torch.cat([scalars, self.buckets.flatten(), *(value.reshape(1) for value in self.extra.values())])

    def rebuild(self, flat: Tensor) -> StepSums:
        """The inverse of `flatten`.

        Args:
            flat: [n] fp64, flattened sums with the names of this one's `extra`.
        """
        scalars, buckets, extra = torch.split(flat, [5, 3 * NUM_BUCKETS, len(self.extra)])
        loss, nll, num_correct, num_targets, count = scalars.unbind()
        names = dict(zip(self.extra, extra.unbind(), strict=True))
        return StepSums(loss, nll, num_correct, num_targets, count, buckets.view(NUM_BUCKETS, 3), names)

    def with_extra(self, **sums: Tensor) -> StepSums:
        """These and further named sums, each []."""
        return replace(self, extra={**self.extra, **{name: value.detach().double() for name, value in sums.items()}})


@torch.no_grad()
def token_sums(loss: Tensor, count: Tensor, nll: Tensor, is_correct: Tensor, t: Tensor) -> StepSums:
    """The sums of one micro-batch.

    Args:
        loss: [] weighted loss of its targets.
        count: [] what it adds to the denominator.
        nll: [T] negative log-likelihood of the targets, nats.
        is_correct: [T] bool, whether the most likely token is the target.
        t: [T] noise level of the target's block.
    """
    return StepSums(
        # In fp32 first, as they are computed: counts of one micro-batch stay far below 2^24.
        loss=loss.float().double(),
        nll=nll.sum().float().double(),
        num_correct=is_correct.sum().float().double(),
        num_targets=nll.new_full((), nll.numel()).float().double(),
        count=count.float().double(),
        buckets=bucket_sums(nll, is_correct, t, NUM_BUCKETS),
    )
