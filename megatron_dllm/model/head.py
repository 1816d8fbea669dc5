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
from torch.distributed import ProcessGroup

from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.model.vocabulary_sums import EntropyOf, ShardSums

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
    entropy_temperature: float | None = None,
) -> TargetOutputs:
    """Negative log-likelihood of each target, whether it is the most likely token and, if asked for, the confidence.

    The gradient with respect to `hidden` is this rank's part, from its shard of the vocabulary: sum it over the
    tensor ranks (megatron-core's copy_to or gather_from regions do). Every rank of `tp_group` must call this
    with the same targets.

    Args:
        hidden: [T, h] final hidden states of the targets; T may be 0.
        weight: [v/tp, h] this rank's rows of the output embedding.
        target_ids: [T] int64 tokens to be predicted.
        tp_group: ranks that share the vocabulary; None: this rank holds all of it.
        chunk_elements: bound on the elements of the logits that exist at a time; None: by device.
        entropy_temperature: also compute the entropy of softmax(logits / entropy_temperature), with its gradient, and
            the largest probability. It costs a second tensor of a chunk's size, at temperatures other than 1 a third
            in the backward pass, and leaves the other outputs as they are to the last bit. None: neither.

    Returns:
        The outputs of the T targets.
    """
    if chunk_elements is None:
        rows = max(MIN_CHUNK_TARGETS, CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cuda"]) // weight.shape[0])
    else:
        rows = max(1, chunk_elements // weight.shape[0])
    return TargetOutputs(*_TargetCrossEntropy.apply(hidden, weight, target_ids, tp_group, rows, entropy_temperature))


def _entropy_gradient(log_p: Tensor, p: Tensor, of_entropy: EntropyOf, grad_entropy: Tensor) -> Tensor:
    """Gradient of a chunk's logits: -(1/T) grad_entropy p_T (log p_T + entropy), p_T = softmax(z/T).

    Args:
        log_p: [t, v/tp] fp32 log probabilities of the local tokens at temperature 1; overwritten.
        p: [t, v/tp] fp32 their exponentials.
        of_entropy: of these targets.
        grad_entropy: [t] fp32.

    Returns:
        [t, v/tp] fp32, in the memory of `log_p`.
    """
    if of_entropy.temperature != 1.0:
        log_p.div_(of_entropy.temperature).add_(of_entropy.offset.unsqueeze(-1))
        p = log_p.exp()
    scale = -grad_entropy / of_entropy.temperature
    return log_p.add_(of_entropy.entropy.unsqueeze(-1)).mul_(p).mul_(scale.unsqueeze(-1))


def _logits_gradient(
    log_p: Tensor, local_ids: Tensor, is_local: Tensor, grad_nll: Tensor, of_entropy: tuple[EntropyOf, Tensor] | None
) -> Tensor:
    """Gradient of a chunk's logits: grad_nll (p - onehot), and what the entropy adds.

    Args:
        log_p: [t, v/tp] fp32 log probabilities of the local tokens; overwritten.
        local_ids: [t] int64 local row of the target.
        is_local: [t] bool, whether this rank holds the target.
        grad_nll: [t] fp32.
        of_entropy: the entropy and its gradient [t] fp32; None without entropy.

    Returns:
        [t, v/tp] fp32.
    """
    if of_entropy is None:
        grad, added = log_p.exp_(), None
    else:
        grad = log_p.exp()
        added = _entropy_gradient(log_p, grad, *of_entropy)
    grad.scatter_add_(-1, local_ids.unsqueeze(-1), -is_local.float().unsqueeze(-1))
    grad.mul_(grad_nll.unsqueeze(-1))
    return grad if added is None else grad.add_(added)


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
        entropy_temperature: float | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        vocab = weight.shape[0]
        first_id = vocab * (tp_group.rank() if tp_group is not None else 0)
        local_ids = target_ids - first_id
        is_local = (local_ids >= 0) & (local_ids < vocab)
        local_ids = torch.where(is_local, local_ids, 0)
        shard = ShardSums(len(target_ids), hidden.device, entropy_temperature)
        for start in range(0, len(target_ids), rows):
            part = slice(start, start + rows)
            shard.add_chunk(part, torch.matmul(hidden[part], weight.t()).float(), local_ids[part])
        sums = shard.merge(is_local, first_id, tp_group)
        is_correct = sums.best_id == target_ids
        entropy, offset = (sums.of_entropy.entropy, sums.of_entropy.offset) if sums.of_entropy else (None, None)
        max_probability = sums.max_probability if sums.of_entropy else None
        ctx.save_for_backward(hidden, weight, local_ids, is_local, sums.log_partition, entropy, offset)
        ctx.rows, ctx.entropy_temperature = rows, entropy_temperature
        ctx.mark_non_differentiable(is_correct, *([] if max_probability is None else [max_probability]))
        return sums.log_partition - sums.target, is_correct, entropy, max_probability

    @staticmethod
    def backward(
        ctx: Any, grad_nll: Tensor, _: Any, grad_entropy: Tensor | None, __: Any
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, weight, local_ids, is_local, log_partition, entropy, offset = ctx.saved_tensors
        num_targets, rows = len(local_ids), ctx.rows
        grad_hidden = torch.empty_like(hidden)
        # Several chunks are summed in fp32: a bf16 sum would round away what the later chunks add.
        sum_dtype = torch.float32 if num_targets > rows else weight.dtype
        grad_weight = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device)
        for start in range(0, num_targets, rows):
            part = slice(start, start + rows)
            log_p = torch.matmul(hidden[part], weight.t()).float().sub_(log_partition[part].unsqueeze(-1))
            of_entropy = None
            if entropy is not None and grad_entropy is not None:
                of_entropy = EntropyOf(ctx.entropy_temperature, entropy[part], offset[part]), grad_entropy[part]
            grad = _logits_gradient(log_p, local_ids[part], is_local[part], grad_nll[part], of_entropy).to(weight.dtype)
            grad_hidden[part] = torch.matmul(grad, weight)
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden[part])
            else:
                grad_weight += torch.matmul(grad.t(), hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
