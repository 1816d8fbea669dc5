"""The head of a model that is distilled: NLL of the targets and their KL from a teacher, two rows of logits a target.

    KL = sum over v of p(v) (log p(v) - log q(v)) = E_p[z_p - z_q] - log Z_p + log Z_q

with p, z_p the teacher's and q, z_q the student's. As in `model.head`, logits exist for one chunk at a time, and of
tensor ranks each adds up its shard of the vocabulary: what they exchange is a few vectors of length T, or [T, k].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_dllm.diffusion.losses.distillation import top_k_divergence
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.model.head import chunk_sizes, chunked_gradients
from megatron_dllm.model.vocabulary_sums import ShardSums


@dataclass(frozen=True)
class Teacher:
    """What teaches a micro-batch's T targets on this rank.

    Attributes:
        states: [T, h] what the teacher's head reads of the token before each target.
        is_known: [T] bool whether there is such a token; the others have no KL.
        weight: [v/tp, h] this rank's rows of the teacher's output embedding.
    """

    states: Tensor
    is_known: Tensor
    weight: Tensor


def distilled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    teacher: Teacher,
    tp_group: ProcessGroup | None,
    top_k: int | None = None,
    chunk_elements: int | None = None,
) -> TargetOutputs:
    """NLL of each target, whether it is the most likely token, and its KL from the teacher.

    Args:
        hidden: [T, h] final hidden states of the targets; T may be 0.
        weight: [v/tp, h] this rank's rows of the output embedding.
        target_ids: [T] int64 tokens to be predicted.
        teacher: of these targets; it gets no gradient.
        tp_group: ranks that share the vocabulary; None: this rank holds all of it.
        top_k: tokens of the teacher that are told apart; None: all.
        chunk_elements: bound on the elements of the logits that exist at a time; None: by device.
    """
    chunk = chunk_sizes(weight, len(target_ids), chunk_elements)
    states = teacher.states.detach().to(hidden.dtype)
    nll, is_correct, kl = _Distilled.apply(
        hidden, weight, target_ids, states, teacher.weight.detach(), teacher.is_known, tp_group, chunk, top_k
    )
    return TargetOutputs(nll, is_correct, kl=kl, has_teacher=teacher.is_known)


class _TeacherSums:
    """What one rank's shard says of each target's teacher, beside the student, filled chunk by chunk.

    Attributes:
        best: [T] fp32 the teacher's largest logit m.
        sums: [2, T] fp32 sum of exp(z_p - m), and of exp(z_p - m) (z_p - z_q).
        likely: [3, T, k] fp64 (so that ids stay exact) of the teacher's k likeliest local tokens their logits, the
            student's logits and their local ids; None where the whole vocabulary counts.
    """

    def __init__(self, num_targets: int, vocab: int, top_k: int | None, device: torch.device) -> None:
        self.best = torch.empty(num_targets, dtype=torch.float32, device=device)
        self.sums = torch.empty(2, num_targets, dtype=torch.float32, device=device)
        self.likely: Tensor | None = None
        if top_k is not None:
            self.likely = torch.empty(3, num_targets, min(top_k, vocab), dtype=torch.float64, device=device)

    def add_chunk(self, part: slice, teacher: Tensor, student: Tensor) -> None:
        """Take in the targets `part`, with logits [t, v/tp] of both, which stay as they are."""
        p, q = teacher.float(), student.float()
        best = p.max(dim=-1).values
        exponentials = torch.exp(p - best.unsqueeze(-1))
        self.best[part] = best
        self.sums[0, part] = exponentials.sum(-1)
        self.sums[1, part] = (exponentials * (p - q)).sum(-1)
        if self.likely is not None:
            values, ids = p.topk(self.likely.shape[-1], dim=-1)
            self.likely[:, part] = torch.stack([values, q.gather(-1, ids), ids]).to(self.likely.dtype)

    def log_partition(self, tp_group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """[T] log Z_p and [T] E_p[z_p - z_q] over the shards of all ranks (a collective)."""
        best = _all_reduce(self.best.clone(), ReduceOp.MAX, tp_group)
        total, moment = _all_reduce(self.sums * torch.exp(self.best - best), ReduceOp.SUM, tp_group)
        return torch.log(total) + best, moment / total

    def likeliest(self, top_k: int, first_id: int, tp_group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, k] fp32 teacher's and student's logits and [T, k] int64 ids of all shards' likeliest (a collective)."""
        assert self.likely is not None, "the likeliest tokens were not collected"
        found = self.likely.clone()
        found[2] += first_id
        if tp_group is not None and tp_group.size() > 1:
            every = found.new_empty(tp_group.size(), *found.shape)
            dist.all_gather_into_tensor(every.view(-1, *found.shape[1:]), found, group=tp_group)
            found = every.permute(1, 2, 0, 3).flatten(2)
        chosen = found[0].topk(min(top_k, found.shape[-1]), dim=-1).indices
        teacher, student, ids = (part.gather(-1, chosen) for part in found)
        return teacher.float(), student.float(), ids.long()


def _all_reduce(value: Tensor, operation: Any, tp_group: ProcessGroup | None) -> Tensor:
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(value, op=operation, group=tp_group)
    return value


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        is_known: Tensor,
        tp_group: ProcessGroup | None,
        chunk: tuple[int, int],
        top_k: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        vocab = weight.shape[0]
        first_id = vocab * (tp_group.rank() if tp_group is not None else 0)
        local_ids = target_ids - first_id
        is_local = (local_ids >= 0) & (local_ids < vocab)
        local_ids = torch.where(is_local, local_ids, 0)
        shard = ShardSums(len(target_ids), hidden.device, None)
        taught = _TeacherSums(len(target_ids), vocab, top_k, hidden.device)
        for start in range(0, len(target_ids), chunk[0]):
            part = slice(start, start + chunk[0])
            logits = torch.matmul(hidden[part], weight.t())
            # Before the student's sums, which may overwrite its logits.
            taught.add_chunk(part, torch.matmul(teacher[part], teacher_weight.t()), logits)
            shard.add_chunk(part, logits, local_ids[part])
        sums = shard.merge(is_local, first_id, tp_group)
        log_partition, moment = taught.log_partition(tp_group)
        is_correct = sums.best_id == target_ids
        saved: tuple[Tensor | None, ...]
        if top_k is None:
            kl, saved = moment - log_partition + sums.log_partition, (teacher, teacher_weight, None, None, None)
        else:
            p, q, ids = taught.likeliest(top_k, first_id, tp_group)
            log_p, log_q = p - log_partition.unsqueeze(-1), q - sums.log_partition.unsqueeze(-1)
            kl, ratio = top_k_divergence(log_p, log_q)
            saved = (None, None, ids - first_id, log_p.exp() - ratio.unsqueeze(-1) * log_q.exp(), ratio)
        ctx.save_for_backward(
            hidden, weight, torch.where(is_local, local_ids, -1), is_known, sums.log_partition, log_partition, *saved
        )
        ctx.columns = chunk[1]
        ctx.mark_non_differentiable(is_correct)
        return sums.log_partition - sums.target, is_correct, torch.where(is_known, kl, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, _: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, is_known, log_partition, *taught = ctx.saved_tensors
        grad_kl = torch.where(is_known, grad_kl, 0.0)

        def of_logits(part: slice, logits: Tensor) -> Tensor:
            q = torch.exp(logits.float() - log_partition.unsqueeze(-1))
            grad = _teacher_gradient(q, grad_kl, part, taught) + q * grad_nll.unsqueeze(-1)
            return _add_at(grad, ids.unsqueeze(-1) - part.start, -grad_nll.unsqueeze(-1)).to(hidden.dtype)

        return *chunked_gradients(hidden, weight, ctx.columns, of_logits), *[None] * 7


def _teacher_gradient(q: Tensor, grad_kl: Tensor, part: slice, taught: list[Tensor]) -> Tensor:
    """[T, c] fp32 gradient of the student's logits by the KL: grad_kl (q - p).

    Args:
        q: [T, c] fp32 the student's probabilities of some columns.
        grad_kl: [T] fp32.
        part: these columns.
        taught: what the forward pass saved of the teacher.
    """
    log_partition, teacher, teacher_weight, likely_ids, excess, ratio = taught
    scale = grad_kl.unsqueeze(-1)
    if likely_ids is None:
        p = torch.exp(torch.matmul(teacher, teacher_weight[part].t()).float() - log_partition.unsqueeze(-1))
        return (q - p) * scale
    # q (1 - r) everywhere, and on the tokens told apart r q - p more.
    grad = q * (1.0 - ratio.unsqueeze(-1)) * scale
    return _add_at(grad, likely_ids - part.start, -excess * scale)


def _add_at(grad: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Add values [T, k] to the columns [T, k] int64 of grad [T, c]; columns outside of it have none."""
    is_here = (columns >= 0) & (columns < grad.shape[1])
    return grad.scatter_add_(-1, torch.where(is_here, columns, 0), torch.where(is_here, values, 0.0))
