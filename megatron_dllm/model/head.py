"""The LM head and its cross entropy, on the tokens that carry a loss and on nothing else.

Logits exist for one chunk at a time: of some targets in the forward pass, of some tokens of the vocabulary in the
backward pass, which forms them again from the hidden states. So each part of the weight's gradient is one product
over all targets, written once; what is added up is the gradient of the hidden states, which is small. With a
vocabulary of 157,184 the fp32 logits of one row of 8192 tokens would take 5 GB; a chunk takes 256 MB at the most.

Tensor parallelism: every rank holds v/tp rows of the weight and computes the part of the sum over its shard;
what the ranks have to agree on is a few vectors of length T, exchanged once per call and not once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.model.fused import fused
from megatron_dllm.model.vocabulary_sums import EntropyOf, ShardSums

# Elements of a chunk's logits (targets x local vocabulary): on CPU where it was fastest (larger ones leave the
# caches), elsewhere enough to fill the device.
CHUNK_ELEMENTS = {"cpu": 8 * 1024 * 1024, "cuda": 64 * 1024 * 1024}
# Targets or tokens of a chunk at the least: a matrix product of fewer rows waits for the memory of its other side.
MIN_CHUNK_ROWS = 256


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
    chunk = chunk_sizes(weight, len(target_ids), chunk_elements)
    return TargetOutputs(*_TargetCrossEntropy.apply(hidden, weight, target_ids, tp_group, chunk, entropy_temperature))


def chunk_sizes(weight: Tensor, num_targets: int, chunk_elements: int | None) -> tuple[int, int]:
    """Targets of a chunk in the forward pass, and tokens of the vocabulary of one in the backward pass.

    Args:
        weight: [v/tp, h] this rank's rows of the output embedding.
        num_targets: T.
        chunk_elements: bound on the elements of the logits that exist at a time; None: by device, but never so few
            that a product would wait for memory.
    """
    least = MIN_CHUNK_ROWS if chunk_elements is None else 1
    elements = chunk_elements or CHUNK_ELEMENTS["cuda" if weight.is_cuda else "cpu"]
    return max(least, elements // max(1, len(weight))), max(least, elements // max(1, num_targets))


@fused
def nll_gradient(logits: Tensor, log_partition: Tensor, ids: Tensor, grad_nll: Tensor) -> Tensor:
    """[T, c] in the precision of `logits`: grad_nll (p - onehot) for some columns of the logits.

    Args:
        logits: [T, c].
        log_partition: [T] fp32 log of the sum over the whole vocabulary.
        ids: [T] int64 column of each target; below 0 or from c on: not among these.
        grad_nll: [T] fp32.
    """
    p = torch.exp(logits.float() - log_partition.unsqueeze(-1))
    is_target = ids.unsqueeze(-1) == torch.arange(logits.shape[1], device=logits.device)
    return ((p - is_target.float()) * grad_nll.unsqueeze(-1)).to(logits.dtype)


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
    logits: Tensor, log_partition: Tensor, ids: Tensor, grad_nll: Tensor, of_entropy: tuple[EntropyOf, Tensor] | None
) -> Tensor:
    """Gradient of a chunk's logits: grad_nll (p - onehot), and what the entropy adds.

    Args:
        logits: [T, c] in the model's precision; fp32 ones may be overwritten.
        log_partition: [T] fp32 log of the sum over the whole vocabulary.
        ids: [T] int64 column of each target; below 0 or from c on: not among these.
        grad_nll: [T] fp32.
        of_entropy: the entropy and its gradient [T] fp32; None without entropy.

    Returns:
        [T, c] in the model's precision.
    """
    if logits.is_cuda and of_entropy is None:
        return nll_gradient(logits, log_partition, ids, grad_nll)
    dtype = logits.dtype
    log_p = logits.float().sub_(log_partition.unsqueeze(-1))
    if of_entropy is None:
        grad, added = log_p.exp_(), None
    else:
        grad = log_p.exp()
        added = _entropy_gradient(log_p, grad, *of_entropy)
    is_here = (ids >= 0) & (ids < logits.shape[1])
    grad.scatter_add_(-1, torch.where(is_here, ids, 0).unsqueeze(-1), -is_here.float().unsqueeze(-1))
    grad.mul_(grad_nll.unsqueeze(-1))
    return (grad if added is None else grad.add_(added)).to(dtype)


def chunked_gradients(
    hidden: Tensor, weight: Tensor, columns: int, of_logits: Callable[[slice, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients [T, h] of hidden states and [v/tp, h] of the weight, whose logits are formed some columns at a time.

    Args:
        hidden: [T, h] final hidden states of the targets.
        weight: [v/tp, h] this rank's rows of the output embedding.
        columns: of a chunk.
        of_logits: from the columns of a chunk and its logits [T, c], which may be overwritten, to their gradient [T, c]
            in the precision of `hidden`.
    """
    # Several chunks are summed in fp32: a bf16 sum would round away what the later chunks add.
    is_divided = columns < len(weight)
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32 if is_divided else hidden.dtype)
    grad_weight = torch.empty_like(weight)
    for start in range(0, len(weight), columns):
        part = slice(start, start + columns)
        grad = of_logits(part, torch.matmul(hidden, weight[part].t()))
        torch.matmul(grad.t(), hidden, out=grad_weight[part])
        grad_hidden += torch.matmul(grad, weight[part])
    return grad_hidden.to(hidden.dtype), grad_weight


class _TargetCrossEntropy(torch.autograd.Function):
    """Chunked vocabulary-parallel cross entropy; saves hidden states, the log of the partition sum, the entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        tp_group: ProcessGroup | None,
        chunk: tuple[int, int],
        entropy_temperature: float | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        vocab = weight.shape[0]
        first_id = vocab * (tp_group.rank() if tp_group is not None else 0)
        local_ids = target_ids - first_id
        is_local = (local_ids >= 0) & (local_ids < vocab)
        local_ids = torch.where(is_local, local_ids, 0)
        shard = ShardSums(len(target_ids), hidden.device, entropy_temperature)
        rows, columns = chunk
        for start in range(0, len(target_ids), rows):
            part = slice(start, start + rows)
            shard.add_chunk(part, torch.matmul(hidden[part], weight.t()), local_ids[part])
        sums = shard.merge(is_local, first_id, tp_group)
        is_correct = sums.best_id == target_ids
        entropy, offset = (sums.of_entropy.entropy, sums.of_entropy.offset) if sums.of_entropy else (None, None)
        max_probability = sums.max_probability if sums.of_entropy else None
        ctx.save_for_backward(hidden, weight, local_ids, is_local, sums.log_partition, entropy, offset)
        ctx.columns, ctx.entropy_temperature = columns, entropy_temperature
        ctx.mark_non_differentiable(is_correct, *([] if max_probability is None else [max_probability]))
        return sums.log_partition - sums.target, is_correct, entropy, max_probability

    @staticmethod
    def backward(
        ctx: Any, grad_nll: Tensor, _: Any, grad_entropy: Tensor | None, __: Any
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, weight, local_ids, is_local, log_partition, entropy, offset = ctx.saved_tensors
        of_entropy = None
        if entropy is not None and grad_entropy is not None:
            of_entropy = EntropyOf(ctx.entropy_temperature, entropy, offset), grad_entropy
        ids = torch.where(is_local, local_ids, -1)

        def of_logits(part: slice, logits: Tensor) -> Tensor:
            return _logits_gradient(logits, log_partition, ids - part.start, grad_nll, of_entropy)

        grad_hidden, grad_weight = chunked_gradients(hidden, weight, ctx.columns, of_logits)
        return grad_hidden, grad_weight, None, None, None, None
