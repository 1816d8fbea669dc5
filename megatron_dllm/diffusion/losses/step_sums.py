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
        count: [] what the loss is divided by, once, over the global batch: the maskable tokens, or the answers.
        num_maskable: [] tokens that could have carried a loss.
        buckets: [NUM_BUCKETS, 3] sums per noise level, see `bucket_sums`.
        extra: what an objective adds up beside these, each [] under its own name.
        level_means: its means per noise level, each [NUM_BUCKETS, 2] under its own name: a sum, and the number that it
            is divided by once it has been added up.
        ratios: its other means, each [2] under its own name: a sum, and the number that it is divided by likewise.
    """

    loss: Tensor
    nll: Tensor
    num_correct: Tensor
    num_targets: Tensor
    count: Tensor
    num_maskable: Tensor
    buckets: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    level_means: Mapping[str, Tensor] = field(default_factory=dict)
    ratios: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(
        cls,
        device: torch.device,
        extra: Sequence[str] = (),
        level_means: Sequence[str] = (),
        ratios: Sequence[str] = (),
    ) -> StepSums:
        """Zeros, for a rank that computes no loss; `extra`, `level_means`, `ratios` name the objective's own sums."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        buckets = torch.zeros(NUM_BUCKETS, 3, dtype=torch.float64, device=device)
        means = {name: torch.zeros(NUM_BUCKETS, 2, dtype=torch.float64, device=device) for name in level_means}
        pairs = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in ratios}
        return cls(zero, zero, zero, zero, zero, zero, buckets, {name: zero for name in extra}, means, pairs)

    @property
    def mean_loss(self) -> float:
        """Loss divided by the count; 0 where nothing was counted."""
        return float(self.loss / self.count.clamp(min=1))

    def flatten(self) -> Tensor:
        """[n] fp64: every sum, in the order of the fields, and of the names in the mappings."""
        totals = (self.loss, self.nll, self.num_correct, self.num_targets, self.count, self.num_maskable)
        own = [*self.extra.values(), *self.level_means.values(), *self.ratios.values()]
        return torch.cat([torch.stack(totals), self.buckets.flatten(), *(value.flatten() for value in own)])

    def rebuild(self, flat: Tensor) -> StepSums:
        """The inverse of `flatten`.

        Args:
            flat: [n] fp64, flattened sums with the names that this one's mappings have.
        """
        sizes = [6, 3 * NUM_BUCKETS, len(self.extra), 2 * NUM_BUCKETS * len(self.level_means), 2 * len(self.ratios)]
        scalars, buckets, extra, tables, pairs = torch.split(flat, sizes)
        names = dict(zip(self.extra, extra.unbind(), strict=True))
        means = dict(zip(self.level_means, tables.view(-1, NUM_BUCKETS, 2).unbind(), strict=True))
        ratios = dict(zip(self.ratios, pairs.view(-1, 2).unbind(), strict=True))
        loss, nll, num_correct, num_targets, count, num_maskable = scalars.unbind()
        table = buckets.view(NUM_BUCKETS, 3)
        return StepSums(loss, nll, num_correct, num_targets, count, num_maskable, table, names, means, ratios)

    def with_loss(self, loss: Tensor, count: Tensor) -> StepSums:
        """These with another loss [] and what it is divided by []."""
        return replace(self, loss=loss.detach().double(), count=count.double())

    def with_extra(self, **sums: Tensor) -> StepSums:
        """These and further named sums, each []."""
        return replace(self, extra={**self.extra, **{name: value.detach().double() for name, value in sums.items()}})

    def with_level_means(self, means: Mapping[str, Tensor]) -> StepSums:
        """These and further means per noise level, each [NUM_BUCKETS, 2] fp64."""
        return replace(self, level_means={**self.level_means, **means})

    def with_ratios(self, **ratios: tuple[Tensor, Tensor]) -> StepSums:
        """These and further ratios, each a sum [] and what to divide it by []."""
        pairs = {name: torch.stack([part.detach().double() for part in pair]) for name, pair in ratios.items()}
        return replace(self, ratios={**self.ratios, **pairs})


@torch.no_grad()
def token_sums(
    loss: Tensor, count: Tensor, nll: Tensor, is_correct: Tensor, t: Tensor, is_counted: Tensor | None = None
) -> StepSums:
    """The sums of one micro-batch.

    Args:
        loss: [] weighted loss of its targets.
        count: [] what it adds to the denominator: its maskable tokens.
        nll: [T] negative log-likelihood of the targets, nats.
        is_correct: [T] bool, whether the most likely token is the target.
        t: [T] noise level of the target's block.
        is_counted: [T] bool, the targets that the sums beside the loss are of; None: all.
    """
    counted = torch.ones_like(nll, dtype=torch.bool) if is_counted is None else is_counted
    nll, is_correct = torch.where(counted, nll, 0.0), is_correct & counted
    return StepSums(
        # In fp32 first, as they are computed: counts of one micro-batch stay far below 2^24.
        loss=loss.float().double(),
        nll=nll.sum().float().double(),
        num_correct=is_correct.sum().float().double(),
        num_targets=counted.sum().float().double(),
        count=count.float().double(),
        num_maskable=count.float().double(),
        buckets=bucket_sums(nll, is_correct, t, NUM_BUCKETS, counted),
    )
