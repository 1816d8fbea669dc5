"""The scorer: one ELBO estimate for every document of a global batch, the same on every rank and in every layout.

Validation, losses that compare documents, and likelihoods all take their numbers from here. The pass computes no
gradient; its sums are fp64 and made on the host, in the order of the targets, so they are the same at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.document_scores import DocumentScores
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.model.pipeline import run_batches
from megatron_dllm.parallel.groups import Groups


@torch.no_grad()
def score_documents(
    chunks: list[nn.Module], micro_batches: Sequence[Batch], device: torch.device, groups: Groups, num_views: int
) -> DocumentScores:
    """The scores of all documents of a global batch (a collective).

    A document's targets may lie on several context ranks, and its row on any data-parallel rank. A document that was
    cut into segments has a score for each of them, under the segment's own sample id.

    Args:
        chunks: the local model.
        micro_batches: this data-parallel rank's, of whole rows.
        device: where to compute.
        groups: of this rank.
        num_views: noisy views of each document; 1 in AR.

    Returns:
        The scores by epoch and sample id, the same on every rank.
    """
    with evaluating(chunks):
        parts = run_batches(chunks, micro_batches, device, groups, _target_scores, forward_only=True)
    num_segments = [len(batch.sample_ids) for batch in micro_batches]
    table = _sums(parts, num_segments, num_views).to(device)
    # Context ranks hold parts of the rows; of the pipeline's ranks only the last has outputs.
    dist.all_reduce(table, group=groups.context)
    dist.all_reduce(table, group=groups.pipeline)
    names = ("sample_ids", "segment_epochs", "segment_maskable")
    columns = [torch.cat([getattr(batch, name) for batch in micro_batches]).to(device) for name in names]
    # As one table of integers, which holds the bits of the sums.
    local = torch.cat([torch.stack(columns, dim=1), table.view(torch.int64)], dim=1)
    everywhere = _gather_rows(local, groups.data).cpu()
    ids, epochs, num_maskable = everywhere[:, : len(names)].unbind(1)
    by_view = everywhere[:, len(names) :].contiguous().view(torch.float64)
    return DocumentScores(ids, epochs, num_maskable, by_view).ordered()


@contextmanager
def evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Have the model in evaluation mode while the block runs."""
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


def _target_scores(batch: Batch, outputs: TargetOutputs) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Of each target its segment, its view and what it adds to their score, as megatron-core wants a loss function."""
    scores = -(outputs.nll.float() * batch.loss_weights.float())
    nothing = scores.new_zeros(())
    return nothing, nothing.int(), (batch.target_segments, batch.target_views, scores)


def _sums(parts: Sequence[tuple[Tensor, Tensor, Tensor]], num_segments: Sequence[int], num_views: int) -> Tensor:
    """[p, k] fp64 sums over the targets of each segment and view, on the host.

    Args:
        parts: of each micro-batch [T] segments, [T] views and [T] fp32 scores of its targets; none of them where this
            rank has no outputs.
        num_segments: of each micro-batch.
        num_views: k; further copies of a block have views beyond it (see `data.noisy_blocks`). What a clean slot
            predicts belongs to all of them alike.
    """
    sums = torch.zeros(sum(num_segments) * num_views, dtype=torch.float64)
    of_all = torch.zeros(sum(num_segments), dtype=torch.float64)
    first = 0
    for (segments, views, scores), count in zip(parts, num_segments, strict=False):
        segments, views, scores = first + segments.cpu(), views.cpu(), scores.cpu().double()
        is_noisy = views > 0
        place = segments[is_noisy] * num_views + (views[is_noisy] - 1) % num_views
        sums.index_add_(0, place, scores[is_noisy])
        of_all.index_add_(0, segments[~is_noisy], scores[~is_noisy])
        first += count
    return sums.view(-1, num_views) + of_all.unsqueeze(1) / num_views


def _gather_rows(local: Tensor, group: ProcessGroup) -> Tensor:
    """[sum of n, c] int64 the rows of all ranks of a group, for [n, c] int64 of each, with another n (a collective)."""
    if group.size() == 1:
        return local
    mine = torch.tensor([len(local)], device=local.device)
    counts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(counts, mine, group=group)
    sizes = [int(count) for count in counts]
    padded = local.new_zeros(max(sizes), local.shape[1])
    padded[: len(local)] = local
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])
