"""The loss of the last pipeline stage: a weighted sum, and the sums that are logged beside it.

Nothing here divides. The gradient of a global batch is that of

    sum over all its tokens of loss_weight * nll  /  num_maskable of the global batch

and neither part is known to a single micro-batch or rank: they hold unequal numbers of masked tokens, and a
mean of their means would give a token in a small micro-batch more weight. So every rank returns its sum, the sums and
the counts are added over micro-batches, data and context ranks, and one division follows. With weights 1/t
the quotient is a bound on the NLL in nats per token. Every function is right, and finite, for T = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of `bucket_sums`.
NLL, COUNT, CORRECT = 0, 1, 2


def weighted_nll(nll: Tensor, loss_weights: Tensor) -> Tensor:
    """Sum of the weighted NLLs, to be divided once by num_maskable of the global batch.

    Args:
        nll: [T] negative log likelihood of the targets, nats.
        loss_weights: [T] their weights, e.g. 1/t.

    Returns:
        [] fp32 sum; 0, with a gradient of 0, where T = 0.
    """
    return (nll.float() * loss_weights.float()).sum()


@torch.no_grad()
def bucket_sums(
    nll: Tensor, is_correct: Tensor, t: Tensor, num_buckets: int, is_counted: Tensor | None = None
) -> Tensor:
    """What is logged per noise level, as one small tensor that a single all-reduce adds up over ranks.

    Bucket i holds t in [i, i + 1) / num_buckets, the last one t = 1 too; AR targets have t = 0. Sums are
    not weighted: they tell how well masked tokens are predicted, and a ratio of columns is their mean.

    Args:
        nll: [T] negative log likelihood of the targets, nats.
        is_correct: [T] bool, whether the most probable token is the target.
        t: [T] noise level of the target's block.
        num_buckets: buckets of [0, 1].
        is_counted: [T] bool, the targets that count; None: all. The others' NLL is 0, and they are not correct.

    Returns:
        [num_buckets, 3] float64 (counts stay exact beyond 2^24): columns NLL, COUNT, CORRECT.
    """
    counted = torch.ones_like(nll) if is_counted is None else is_counted
    values = torch.stack([nll.double(), counted.double(), is_correct.double()], dim=-1)
    return level_sums(values, t, num_buckets)


def level_sums(values: Tensor, t: Tensor, num_buckets: int) -> Tensor:
    """Sums over the targets of each noise level, in the buckets of `bucket_sums`.

    Args:
        values: [T, c] fp64.
        t: [T] noise level of the target's block.
        num_buckets: buckets of [0, 1].

    Returns:
        [num_buckets, c] fp64.
    """
    bucket = (t.double() * num_buckets).long().clamp(0, num_buckets - 1)
    is_member = bucket == torch.arange(num_buckets, device=t.device).unsqueeze(-1)
    return is_member.double() @ values


def bucket_means(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean NLL and masked accuracy of summed buckets.

    Args:
        sums: [..., 3] what `bucket_sums` returned, added over ranks and micro-batches; `sums.sum(0)` gives
            the means over all noise levels.

    Returns:
        [...] NLL in nats per masked token and [...] share of masked tokens predicted right; 0 where there are none.
    """
    count = sums[..., COUNT].clamp(min=1.0)
    return sums[..., NLL] / count, sums[..., CORRECT] / count
