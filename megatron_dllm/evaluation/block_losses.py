"""The loss of every noisy block of a corpus, with the noise level it was drawn at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_dllm.config import SftConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import RowStream
from megatron_dllm.data.source import Source
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.evaluation.band import T_LEAST
from megatron_dllm.evaluation.elbo import validation_geometry, validation_lengths
from megatron_dllm.evaluation.local_model import LocalModel
from megatron_dllm.evaluation.progress import watched
from megatron_dllm.evaluation.row_loader import row_loader
from megatron_dllm.model.pipeline import run_batches

FloatArray = NDArray[np.float64]

# As a stage draws it by default: levels even over the range, one for each block, which has a masked token.
LEVELS = NoiseSpec(
    t_unit="block", is_stratified=True, at_least_one=True, loss_weight="elbo", t_min=T_LEAST, t_max=1.0, num_views=1
)


def corpus_block_losses(
    model: LocalModel, corpus: Source, block_size: int, seed: int, sft: SftConfig | None, label: str | None
) -> tuple[FloatArray, FloatArray]:
    """Level and loss of every block of the held-out documents, drawn once (a collective).

    Args:
        model: that is measured.
        corpus: the documents.
        block_size: tokens denoised together.
        seed: of the noise.
        sft: how chats are trained; None: as they stand.
        label: of a bar; None: there is none.

    Returns:
        [n] levels and [n] losses in nats, the same on every rank.
    """
    config, ids = model.config, model.config.model
    lengths = validation_lengths(corpus, config.evaluation.num_tokens)
    geometry = validation_geometry(config, str(block_size), sft, model.shift)
    dataset = RowDataset(corpus, geometry, LEVELS, seed, ids.mask_token_id, ids.pad_token_id, ids.eos_token_id)
    stream = RowStream(lengths, seed, config.data.packing_chunk, shuffle=False, spans=corpus.spans)
    loader = watched(row_loader(config, model.groups, dataset, stream), label)
    return _joined([_target_losses(model, step.micro_batches) for step in loader])


@torch.no_grad()
def _target_losses(model: LocalModel, micro_batches: Sequence[Batch]) -> Tensor:
    """[T, 3] fp64 sample id, level and loss of this rank's targets; none where another rank has the same ones."""
    parts = run_batches(model.chunks, micro_batches, model.device, model.groups, _of_targets, forward_only=True)
    mine = [part.cpu() for part in parts] if model.groups.tensor.rank() == 0 else []
    return torch.cat([torch.zeros(0, 3, dtype=torch.float64), *mine])


def _of_targets(batch: Batch, outputs: TargetOutputs) -> tuple[Tensor, Tensor, Tensor]:
    """What megatron-core wants of a loss function, and [T, 3] fp64 sample id, level and loss."""
    losses = outputs.nll.double() * batch.loss_weights.double()
    columns = [batch.sample_ids[batch.target_segments].double(), batch.target_t.double(), losses]
    nothing = losses.new_zeros((), dtype=torch.float32)
    return nothing, nothing.int(), torch.stack(columns, dim=1)


def _joined(steps: Sequence[Tensor]) -> tuple[FloatArray, FloatArray]:
    """Levels and summed losses of the blocks of all ranks' targets [T, 3] (a collective).

    The levels of a segment's blocks are laid out evenly, so no two are equal: sample and level tell blocks apart.
    """
    everyone: list[NDArray[np.float64]] = [np.zeros((0, 3))] * dist.get_world_size()
    dist.all_gather_object(everyone, torch.cat(list(steps)).numpy())
    table = np.concatenate(everyone)
    blocks, of_target = np.unique(table[:, :2], axis=0, return_inverse=True)
    losses = np.bincount(of_target.ravel(), table[:, 2], len(blocks)).astype(np.float64)
    return blocks[:, 1], losses
