"""Validation: the ELBO of a held-out corpus at given block sizes, or the exact NLL of an AR model.

The rows and the noise are the same for every checkpoint, so differences between checkpoints are differences between
models. Chats have the rows that they are trained in, with their fill and the boundaries of their turns; a token of the
fill counts as one of an answer does. The mask count of each block is drawn evenly from 1..B, which estimates the ELBO
over all noise levels without bias and with less variance than drawing t (see `diffusion.noise_masks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from megatron_dllm.checkpoint.validation import Validation
from megatron_dllm.config import EvaluationConfig, SftConfig, StageConfig, TrainConfig
from megatron_dllm.data.epoch import check_fits_a_row, measure_epoch
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import RowStream
from megatron_dllm.data.source import Source, check_fills_a_row
from megatron_dllm.diffusion.losses.document_scores import DocumentScores
from megatron_dllm.evaluation.conditions import SEED, conditions_of
from megatron_dllm.evaluation.progress import watched
from megatron_dllm.evaluation.row_loader import row_loader
from megatron_dllm.evaluation.scores import score_documents
from megatron_dllm.model.objective import AR, validation_objective
from megatron_dllm.parallel.groups import Groups


class EvaluationStopped(Exception):
    """Asked to stop between two batches."""


def validation_names(config: TrainConfig, stage: StageConfig) -> list[str]:
    """What a stage is evaluated at: the block sizes, the target first, and "ar" if asked for; or "ar" alone."""
    return [AR] if stage.objective == AR else diffusion_names(config.evaluation)


def diffusion_names(evaluation: EvaluationConfig) -> list[str]:
    """What a diffusion model is evaluated at."""
    return [*(str(size) for size in evaluation.block_sizes), *([AR] if evaluation.with_ar else [])]


def validation_geometry(
    config: TrainConfig, name: str, sft: SftConfig | None = None, shift: bool = False
) -> RowGeometry:
    """Rows of an evaluation.

    Args:
        config: of the run.
        name: of the evaluation: a block size, or "ar".
        sft: how chats are trained; None: as they stand.
        shift: whether the slot before a token predicts it; it does in any case for "ar".
    """
    is_ar = name == AR
    turned = None if is_ar else sft
    return RowGeometry(
        objective="ar" if is_ar else "block_diffusion",
        block_size=1 if is_ar else int(name),
        context_length=config.schedule.context_length,
        row_length=config.schedule.tokens_per_row,
        num_views=0 if is_ar else 1,
        block_origin=config.data.block_origin,
        prune_clean=config.data.prune_clean,
        shift=True if shift else None,
        fill="none" if turned is None else turned.fill,
        turn_boundary="all" if turned is None else turned.turn_boundary,
        clean_block_size=None if is_ar else config.evaluation.clean_block_size,
    )


def check_corpus(
    config: TrainConfig, corpus: Source, names: Iterable[str], sft: SftConfig | None = None, shift: bool = False
) -> None:
    """Refuse held-out documents that an evaluation cannot measure.

    Args:
        config: of the run.
        corpus: held-out documents.
        names: of the evaluations.
        sft: how chats are trained; None: as they stand.
        shift: whether the slot before a token predicts it.

    Raises:
        ValueError: they are too few for its rows, or one of them does not fit into a row; naming the evaluation.
    """
    for name in names:
        try:
            geometry = validation_geometry(config, name, sft, shift)
            check_fills_a_row(corpus, geometry)
            if sft is not None and corpus.spans is not None:
                check_fits_a_row(corpus, geometry, measure_epoch(corpus, geometry), f"validation ({name})")
        except ValueError as error:
            raise ValueError(f"validation ({name}) cannot run: {error}") from None


def evaluate(
    chunks: list[nn.Module],
    config: TrainConfig,
    groups: Groups,
    corpus: Source,
    names: list[str],
    device: torch.device,
    must_stop: Callable[[], bool] = lambda: False,
    sft: SftConfig | None = None,
    shift: bool = False,
    is_watched: bool = False,
) -> Validation:
    """Measure the NLL bound of the local model on `evaluation.num_tokens` tokens of the corpus (a collective).

    Args:
        chunks: the local model.
        config: of the run.
        groups: of this rank.
        corpus: held-out documents; the same ones are measured under every name.
        names: block sizes as text, or "ar". The first one is reported as the target.
        device: where to compute.
        must_stop: asked on all ranks between batches.
        sft: how chats are trained; None: as they stand.
        shift: whether the slot before a token predicts it.
        is_watched: show a bar.

    Raises:
        EvaluationStopped: `must_stop` said so.
    """
    lengths = validation_lengths(corpus, config.evaluation.num_tokens)
    nats: dict[str, float] = {}
    for name in names:
        elbo, count = 0.0, 0
        label = f"scoring ({name})" if is_watched else None
        where = (config, groups, corpus, lengths, name, device)
        for scores in score_corpus(chunks, *where, must_stop, sft, shift, label):
            elbo, count = elbo + float(scores.means.sum()), count + int(scores.num_maskable.sum())
        nats[name] = -elbo / max(count, 1)
    target = 0 if names == [AR] else config.evaluation.block_sizes[0]
    conditions = conditions_of(config, corpus, int(lengths.sum()), sft, shift and names != [AR])
    return Validation(nats, _bits_per_byte(nats, corpus), target, conditions)


def _bits_per_byte(nats: dict[str, float], corpus: Source) -> dict[str, float]:
    if not corpus.num_bytes:
        return {}
    tokens_per_byte = corpus.num_tokens / corpus.num_bytes
    return {name: value * tokens_per_byte / math.log(2.0) for name, value in nats.items()}


def validation_lengths(corpus: Source, num_tokens: int) -> NDArray[np.int64]:
    """[d] how much of each document is measured, from its beginning; 0 for those that are left out.

    Documents in an order drawn once from a fixed seed, until they hold `num_tokens` tokens (or all do). The last one is
    measured as far as tokens are left, which a single long document could exceed many times over; documents with spans,
    such as chats, are always measured whole.
    """
    lengths = np.asarray(corpus.document_lengths, dtype=np.int64)
    order = np.random.default_rng(SEED).permutation(len(lengths))
    before = np.cumsum(lengths[order]) - lengths[order]
    wanted = np.clip(num_tokens - before, 0, lengths[order])
    if corpus.spans is not None:
        wanted = np.where(wanted > 0, lengths[order], 0)
    measured = np.zeros_like(lengths)
    measured[order] = wanted
    return measured


def score_corpus(
    chunks: list[nn.Module],
    config: TrainConfig,
    groups: Groups,
    corpus: Source,
    lengths: NDArray[np.int64],
    name: str,
    device: torch.device,
    must_stop: Callable[[], bool] = lambda: False,
    sft: SftConfig | None = None,
    shift: bool = False,
    label: str | None = None,
) -> Iterator[DocumentScores]:
    """The scores of every document, step by step (a collective).

    Args:
        chunks: the local model.
        config: of the measurement.
        groups: of this rank.
        corpus: the documents.
        lengths: [d] tokens of the documents, 0 for those that are left out.
        name: block size as text, or "ar".
        device: where to compute.
        must_stop: asked on all ranks between batches.
        sft: how chats are trained; None: as they stand.
        shift: whether the slot before a token predicts it.
        label: of a bar; None: there is none.

    Raises:
        EvaluationStopped: `must_stop` said so.
    """
    geometry, model = validation_geometry(config, name, sft, shift), config.model
    noise = validation_objective(name, shift).noise
    dataset = RowDataset(corpus, geometry, noise, SEED, model.mask_token_id, model.pad_token_id, model.eos_token_id)
    stream = RowStream(lengths, SEED, config.data.packing_chunk, shuffle=False, spans=corpus.spans)
    for step in watched(row_loader(config, groups, dataset, stream), label):
        if must_stop():
            raise EvaluationStopped
        yield score_documents(chunks, step.micro_batches, device, groups, num_views=1)
