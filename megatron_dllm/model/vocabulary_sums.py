"""What the logits of a target come to over the vocabulary: sums over one rank's shard, then those of all tensor ranks.

With m the largest logit of the shard, M that of all and T the temperature of the entropy, a shard holds

    S   = sum of exp(z - m)                             the partition sum, relative to m
    S_T = sum of exp((z - m) / T)                       the same at temperature T
    U_T = sum of (z - m) / T exp((z - m) / T)           so that the entropy is log S_T - U_T / S_T

and what is relative to m becomes relative to M by the factor exp(m - M), or exp((m - M) / T).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_dllm.model.fused import fused


@dataclass(frozen=True)
class EntropyOf:
    """What is known of the entropy of each target's prediction.

    Attributes:
        temperature: T: the prediction is softmax(z / T).
        entropy: [T] fp32, nats.
        offset: [T] fp32 log p at temperature T, of any token, minus its log p at temperature 1 divided by T.
    """

    temperature: float
    entropy: Tensor
    offset: Tensor


@dataclass(frozen=True)
class VocabularySums:
    """What each target's logits come to over the whole vocabulary, the same on every tensor rank.

    Attributes:
        log_partition: [T] fp32 log of the sum of exp(z).
        target: [T] fp32 logit of the target.
        best_id: [T] int64 the most likely token; of equal logits the lowest id.
        max_probability: [T] fp32 the probability of that token.
        of_entropy: None unless it was asked for.
    """

    log_partition: Tensor
    target: Tensor
    best_id: Tensor
    max_probability: Tensor
    of_entropy: EntropyOf | None


@fused
def chunk_sums(logits: Tensor, local_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[t] fp32 largest logit, [t] int64 its id, [t] fp32 the target's logit and [t] fp32 S, of logits [t, v/tp].

    Args:
        logits: [t, v/tp] in any precision.
        local_ids: [t] int64.
    """
    logits = logits.float()
    best, best_id = logits.max(dim=-1)
    target = logits.gather(-1, local_ids.unsqueeze(-1)).squeeze(-1)
    return best, best_id, target, torch.exp(logits - best.unsqueeze(-1)).sum(dim=-1)


class ShardSums:
    """What one rank's shard of the vocabulary says about each target, filled chunk by chunk.

    Attributes:
        best: [T] fp32 largest logit m.
        best_id: [T] int64 the lowest local id that has it.
        target: [T] fp32 logit of the target, meaningless where another rank holds it.
        log_sum: [T] fp32 log S + m.
        temperature: of the entropy; None: no entropy.
        entropy_sums: [2, T] fp32 U_T and S_T (at temperature 1 too: log S + m has lost digits where m is large, and
            the entropy would lose them as well); None without entropy.
    """

    def __init__(self, num_targets: int, device: torch.device, temperature: float | None) -> None:
        self.best, self.target, self.log_sum = torch.empty(3, num_targets, dtype=torch.float32, device=device)
        self.best_id = torch.empty(num_targets, dtype=torch.int64, device=device)
        self.temperature = temperature
        self.entropy_sums = (
            None if temperature is None else torch.empty(2, num_targets, dtype=torch.float32, device=device)
        )

    def add_chunk(self, part: slice, logits: Tensor, local_ids: Tensor) -> None:
        """Take in the targets `part` of all.

        Args:
            part: which targets.
            logits: [t, v/tp] of these targets, in the model's precision; fp32 ones may be overwritten.
            local_ids: [t] int64 rows of the local weight that belong to their targets.
        """
        if logits.is_cuda and self.temperature is None:
            best, self.best_id[part], self.target[part], sums = chunk_sums(logits, local_ids)
            self.log_sum[part] = sums.log_().add_(best)
            self.best[part] = best
            return
        logits = logits.float()
        best, self.best_id[part] = logits.max(dim=-1)
        self.target[part] = logits.gather(-1, local_ids.unsqueeze(-1)).squeeze(-1)
        logits.sub_(best.unsqueeze(-1))
        exponentials = logits.exp_() if self.temperature is None else logits.exp()
        sums = exponentials.sum(dim=-1)
        if self.entropy_sums is not None and self.temperature is not None:
            if self.temperature != 1.0:
                exponentials = torch.exp(logits.div_(self.temperature), out=exponentials)
            self.entropy_sums[0, part] = logits.mul_(exponentials).sum(dim=-1)
            self.entropy_sums[1, part] = exponentials.sum(dim=-1) if self.temperature != 1.0 else sums
        self.log_sum[part] = sums.log_().add_(best)
        self.best[part] = best

    def merge(self, is_local: Tensor, first_id: int, tp_group: ProcessGroup | None) -> VocabularySums:
        """The sums over the shards of all ranks (a collective of a few vectors).

        Args:
            is_local: [T] bool, whether this rank holds the target.
            first_id: the token of this shard's first row.
            tp_group: ranks that share the vocabulary; None: this rank holds all of it.
        """
        # 1 agree on the best logit M, 2 add up the sums relative to it, 3 find the lowest id that reaches it.
        global_best = _all_reduce(self.best.clone(), ReduceOp.MAX, tp_group)
        sums = [torch.exp(self.log_sum - global_best), torch.where(is_local, self.target, 0.0)]
        if self.entropy_sums is not None and self.temperature is not None:
            # (z - M) / T is (z - m) / T plus `below`, so S_T becomes S_T e^below and U_T (U_T + below S_T) e^below.
            below = (self.best - global_best) / self.temperature
            moment, total = self.entropy_sums
            sums += [(moment + below * total) * below.exp(), total * below.exp()]
        partition, target, *entropy_sums = _all_reduce(torch.stack(sums), ReduceOp.SUM, tp_group)
        none = torch.iinfo(torch.int64).max
        candidates = torch.where(self.best == global_best, self.best_id + first_id, none)
        best_id = _all_reduce(candidates, ReduceOp.MIN, tp_group)
        of_entropy = None if self.temperature is None else _entropy_of(self.temperature, partition, *entropy_sums)
        return VocabularySums(torch.log(partition) + global_best, target, best_id, 1.0 / partition, of_entropy)


def _entropy_of(temperature: float, partition: Tensor, moment: Tensor, total: Tensor) -> EntropyOf:
    """The entropy from the sums over the whole vocabulary.

    Args:
        temperature: T.
        partition: [T] S.
        moment: [T] U_T.
        total: [T] S_T.
    """
    log_total = torch.log(total)
    return EntropyOf(temperature, log_total - moment / total, torch.log(partition) / temperature - log_total)


def _all_reduce(value: Tensor, operation: Any, tp_group: ProcessGroup | None) -> Tensor:
    if tp_group is not None and tp_group.size() > 1:
        torch.distributed.all_reduce(value, op=operation, group=tp_group)
    return value
