"""The LM head and its cross entropy, on the tokens that carry a loss and on nothing else.

Logits exist for one chunk of targets at a time, forward and backward: the backward pass forms them again
from the hidden states. With a vocabulary of 157,184 the fp32 logits of one row of 8192 tokens would take
5 GB; a chunk takes 256 MB, however long the row.

Tensor parallelism: every rank holds v/tp rows of the weight and computes the part of the sum over its shard;
what the ranks have to agree on is a few vectors of length T, exchanged once per call and not once per chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_dllm.diffusion.losses.outputs import TargetOutputs

# Elements of a chunk's logits (targets x local vocabulary): on CPU where it was fastest (larger ones leave the
# caches), elsewhere enough to fill the device.
CHUNK_ELEMENTS = {"cpu": 8 * 1024 * 1024, "cuda": 64 * 1024 * 1024}
# Targets of a chunk at the least: a matrix product of fewer rows waits for the weight's memory.
MIN_CHUNK_TARGETS = 256


def target_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    tp_group: ProcessGroup | None,
    chunk_elements: int | None = None,
    *,
    with_entropy: bool = False,
) -> TargetOutputs:
    """Negative log-likelihood of each target, whether it is the most likely token and, if asked for, the entropy.

    The gradient with respect to `hidden` is this rank's part, from its shard of the vocabulary: sum it over the
    tensor ranks (megatron-core's copy_to or gather_from regions do). Every rank of `tp_group` must call this
    with the same targets.

    Args:
        hidden: [T, h] final hidden states of the targets; T may be 0.
        weight: [v/tp, h] this rank's rows of the output embedding.
        target_ids: [T] int64 tokens to be predicted.
        tp_group: ranks that share the vocabulary; None: this rank holds all of it.
        chunk_elements: bound on the elements of the logits that exist at a time; None: by device.
        with_entropy: also compute the entropy of each prediction, with its gradient. It costs a second tensor of a
            chunk's size, and leaves the other two outputs as they are to the last bit.

    Returns:
        The outputs of the T targets.
    """
    if chunk_elements is None:
        rows = max(MIN_CHUNK_TARGETS, CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cuda"]) // weight.shape[0])
    else:
        rows = max(1, chunk_elements // weight.shape[0])
    nll, is_correct, entropy = _TargetCrossEntropy.apply(hidden, weight, target_ids, tp_group, rows, with_entropy)
    return TargetOutputs(nll, is_correct, entropy)


def _all_reduce(value: Tensor, operation: Any, tp_group: ProcessGroup | None) -> Tensor:
    if tp_group is not None and tp_group.size() > 1:
        torch.distributed.all_reduce(value, op=operation, group=tp_group)
    return value


class _ShardSums:
    """What one rank's shard of the vocabulary says about each target, filled chunk by chunk.

    Attributes:
        best: [T] fp32 largest logit m.
        best_id: [T] int64 the lowest local id that has it.
        target: [T] fp32 logit of the target, meaningless where another rank holds it.
        log_sum: [T] fp32 log S + m with S = sum of exp(z - m).
        entropy_sums: [2, T] fp32 U = sum of (z - m) exp(z - m), and S itself: log S + m has lost digits where m is
            large, and the entropy would lose them too; None without entropy.
    """

    def __init__(self, num_targets: int, device: torch.device, with_entropy: bool) -> None:
        self.best, self.target, self.log_sum = torch.empty(3, num_targets, dtype=torch.float32, device=device)
        self.best_id = torch.empty(num_targets, dtype=torch.int64, device=device)
        self.entropy_sums = torch.empty(2, num_targets, dtype=torch.float32, device=device) if with_entropy else None

    def add_chunk(self, part: slice, logits: Tensor, local_ids: Tensor) -> None:
        """Take in the targets `part` of all.

        Args:
            part: which targets.
            logits: [t, v/tp] fp32 of these targets; overwritten.
            local_ids: [t] int64 rows of the local weight that belong to their targets.
        """
        best, self.best_id[part] = logits.max(dim=-1)
        self.target[part] = logits.gather(-1, local_ids.unsqueeze(-1)).squeeze(-1)
        logits.sub_(best.unsqueeze(-1))
        exponentials = logits.exp_() if self.entropy_sums is None else logits.exp()
        sums = exponentials.sum(dim=-1)
        if self.entropy_sums is not None:
            self.entropy_sums[0, part] = logits.mul_(exponentials).sum(dim=-1)
            self.entropy_sums[1, part] = sums
        self.log_sum[part] = sums.log_().add_(best)
        self.best[part] = best


def _logits_gradient(
    log_p: Tensor, local_ids: Tensor, is_local: Tensor, grad_nll: Tensor, of_entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient of a chunk's logits: grad_nll (p - onehot) - grad_entropy p (log p + entropy).

    Args:
        log_p: [t, v/tp] fp32 log probabilities of the local tokens; overwritten.
        local_ids: [t] int64 local row of the target.
        is_local: [t] bool, whether this rank holds the target.
        grad_nll: [t] fp32.
        of_entropy: the entropy [t] fp32 and its gradient [t] fp32; None without entropy.

    Returns:
        [t, v/tp] fp32.
    """
    if of_entropy is None:
        grad = log_p.exp_()
    else:
        grad = log_p.exp()
        entropy, grad_entropy = of_entropy
        log_p.add_(entropy.unsqueeze(-1)).mul_(grad).mul_(-grad_entropy.unsqueeze(-1))
    grad.scatter_add_(-1, local_ids.unsqueeze(-1), -is_local.float().unsqueeze(-1))
    grad.mul_(grad_nll.unsqueeze(-1))
    return grad if of_entropy is None else grad.add_(log_p)


class _TargetCrossEntropy(torch.autograd.Function):
    """Chunked vocabulary-parallel cross entropy; saves hidden states, the log of the partition sum, the entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        tp_group: ProcessGroup | None,
        rows: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        vocab = weight.shape[0]
        first_id = vocab * (tp_group.rank() if tp_group is not None else 0)
        local_ids = target_ids - first_id
        is_local = (local_ids >= 0) & (local_ids < vocab)
        local_ids = torch.where(is_local, local_ids, 0)
        shard = _ShardSums(len(target_ids), hidden.device, with_entropy)
        for start in range(0, len(target_ids), rows):
            part = slice(start, start + rows)
            shard.add_chunk(part, torch.matmul(hidden[part], weight.t()).float(), local_ids[part])
        # 1 agree on the best logit M, 2 add up the sums relative to it, 3 find the lowest id that reaches it.
        global_best = _all_reduce(shard.best.clone(), ReduceOp.MAX, tp_group)
        sums = [torch.exp(shard.log_sum - global_best), torch.where(is_local, shard.target, 0.0)]
        if shard.entropy_sums is not None:
            # exp(z - M) = exp(z - m) exp(m - M), so S becomes S exp(m - M) and U (U + (m - M) S) exp(m - M).
            below = shard.best - global_best
            moment, total = shard.entropy_sums
            sums += [(moment + below * total) * below.exp(), total * below.exp()]
        partition, target, *entropy_sums = _all_reduce(torch.stack(sums), ReduceOp.SUM, tp_group)
        log_partition = torch.log(partition) + global_best
        entropy = torch.log(entropy_sums[1]) - entropy_sums[0] / entropy_sums[1] if with_entropy else None
        none = torch.iinfo(torch.int64).max
        candidates = torch.where(shard.best == global_best, shard.best_id + first_id, none)
        is_correct = _all_reduce(candidates, ReduceOp.MIN, tp_group) == target_ids
        ctx.save_for_backward(hidden, weight, local_ids, is_local, log_partition, entropy)
        ctx.rows = rows
        ctx.mark_non_differentiable(is_correct)
        return log_partition - target, is_correct, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_nll: Tensor, _: Any, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, weight, local_ids, is_local, log_partition, entropy = ctx.saved_tensors
        num_targets, rows = len(local_ids), ctx.rows
        grad_hidden = torch.empty_like(hidden)
        # Several chunks are summed in fp32: a bf16 sum would round away what the later chunks add.
        sum_dtype = torch.float32 if num_targets > rows else weight.dtype
        grad_weight = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device)
        for start in range(0, num_targets, rows):
            part = slice(start, start + rows)
            log_p = torch.matmul(hidden[part], weight.t()).float().sub_(log_partition[part].unsqueeze(-1))
            of_entropy = None if entropy is None or grad_entropy is None else (entropy[part], grad_entropy[part])
            grad = _logits_gradient(log_p, local_ids[part], is_local[part], grad_nll[part], of_entropy).to(weight.dtype)
            grad_hidden[part] = torch.matmul(grad, weight)
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden[part])
            else:
                grad_weight += torch.matmul(grad.t(), hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
