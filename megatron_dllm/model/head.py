"""The LM head and its cross entropy, on the tokens that carry a loss and on nothing else.

Logits exist for one chunk of targets at a time, forward and backward: the backward pass forms them again
from the hidden states. With a vocabulary of 157,184 the fp32 logits of one row of 8192 tokens would take
5 GB; a chunk takes 256 MB, however long the row.

Tensor parallelism: every rank holds v/tp rows of the weight and computes the part of the sum over its shard;
what the ranks have to agree on is three vectors of length T, exchanged once per call and not once per chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

# Elements of a chunk's logits (targets x local vocabulary): on CPU where it was fastest (larger ones leave the
# caches), elsewhere enough to fill the device.
CHUNK_ELEMENTS = {"cpu": 8 * 1024 * 1024, "cuda": 64 * 1024 * 1024}
# Targets of a chunk at the least: a matrix product of fewer rows waits for the weight's memory.
MIN_CHUNK_TARGETS = 256


def target_cross_entropy(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, tp_group: ProcessGroup | None, chunk_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, and whether it is the most likely token.

    The gradient with respect to `hidden` is this rank's part, from its shard of the vocabulary: sum it over the
    tensor ranks (megatron-core's copy_to or gather_from regions do). Every rank of `tp_group` must call this
    with the same targets.

    Args:
        hidden: [T, h] final hidden states of the targets; T may be 0.
        weight: [v/tp, h] this rank's rows of the output embedding.
        target_ids: [T] int64 tokens to be predicted.
        tp_group: ranks that share the vocabulary; None: this rank holds all of it.
        chunk_elements: bound on the elements of the logits that exist at a time; None: by device.

    Returns:
        nll: [T] fp32, in nats.
        is_correct: [T] bool. Of equal logits the lowest id counts as the prediction.
    """
    if chunk_elements is None:
        rows = max(MIN_CHUNK_TARGETS, CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cuda"]) // weight.shape[0])
    else:
        rows = max(1, chunk_elements // weight.shape[0])
    return _TargetCrossEntropy.apply(hidden, weight, target_ids, tp_group, rows)


def _all_reduce(value: Tensor, operation: Any, tp_group: ProcessGroup | None) -> Tensor:
    if tp_group is not None and tp_group.size() > 1:
        torch.distributed.all_reduce(value, op=operation, group=tp_group)
    return value


class _TargetCrossEntropy(torch.autograd.Function):
    """Chunked vocabulary-parallel cross entropy; saves hidden states and the log of the partition sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,  # type: ignore[override]
        tp_group: ProcessGroup | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        vocab = weight.shape[0]
        first_id = vocab * (tp_group.rank() if tp_group is not None else 0)
        local_ids = target_ids - first_id
        is_local = (local_ids >= 0) & (local_ids < vocab)
        local_ids = torch.where(is_local, local_ids, 0)
        shape, device = target_ids.shape, hidden.device
        best, log_sum, target = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
        best_id = torch.empty(shape, dtype=torch.int64, device=device)
        for start in range(0, len(target_ids), rows):
            part = slice(start, start + rows)
            logits = torch.matmul(hidden[part], weight.t()).float()
            best[part], best_id[part] = logits.max(dim=-1)
            target[part] = logits.gather(-1, local_ids[part].unsqueeze(-1)).squeeze(-1)
            log_sum[part] = logits.sub_(best[part].unsqueeze(-1)).exp_().sum(dim=-1).log_().add_(best[part])
        # Across shards: the best logit, then the sums relative to it, and the lowest id that reaches it.
        global_best = _all_reduce(best.clone(), ReduceOp.MAX, tp_group)
        sums = torch.stack([torch.exp(log_sum - global_best), torch.where(is_local, target, 0.0)])
        partition, target = _all_reduce(sums, ReduceOp.SUM, tp_group)
        log_partition = torch.log(partition) + global_best
        none = torch.iinfo(torch.int64).max
        candidates = torch.where(best == global_best, best_id + first_id, none)
        predicted = _all_reduce(candidates, ReduceOp.MIN, tp_group)
        ctx.save_for_backward(hidden, weight, local_ids, is_local, log_partition)
        ctx.rows = rows
        is_correct = predicted == target_ids
        ctx.mark_non_differentiable(is_correct)
        return log_partition - target, is_correct

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        hidden, weight, local_ids, is_local, log_partition = ctx.saved_tensors
        num_targets, rows = len(local_ids), ctx.rows
        grad_hidden = torch.empty_like(hidden)
        # Several chunks are summed in fp32: a bf16 sum would round away what the later chunks add.
        sum_dtype = torch.float32 if num_targets > rows else weight.dtype
        grad_weight = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device)
        for start in range(0, num_targets, rows):
            part = slice(start, start + rows)
            logits = torch.matmul(hidden[part], weight.t()).float()
            grad = logits.sub_(log_partition[part].unsqueeze(-1)).exp_()
            grad.scatter_add_(-1, local_ids[part].unsqueeze(-1), -is_local[part].float().unsqueeze(-1))
            grad = grad.mul_(grad_nll[part].unsqueeze(-1)).to(weight.dtype)
            grad_hidden[part] = torch.matmul(grad, weight)
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden[part])
            else:
                grad_weight += torch.matmul(grad.t(), hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None
