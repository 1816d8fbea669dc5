"""The scores of pairs by the weights that a run of preferences starts from: that run's forward passes, once.

Rows, batches and masks are those of the run itself, so on its layout the model scores as its reference did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.rules import check
from megatron_dllm.diffusion.block_schedule import BlockSchedule
from megatron_dllm.evaluation.scores import score_documents
from megatron_dllm.evaluation.scores_file import read_begun
from megatron_dllm.evaluation.scores_header import ScoresHeader, check_header
from megatron_dllm.model.objective import objective_of
from megatron_dllm.parallel.agreement import failing_together
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.run.stream import check_writable
from megatron_dllm.training.blends import stage_shares
from megatron_dllm.training.epochs import epoch_tokens
from megatron_dllm.training.scores_needed import needed_headers, preference_stages
from megatron_dllm.training.sources import Sources
from megatron_dllm.training.stage_rows import stage_loader
from megatron_dllm.training.start import check_sources, find_reference, new_stream


@dataclass(frozen=True)
class Scoring:
    """What is to be scored, and where the scores go.

    Attributes:
        target: file to be written.
        weights: folder of the checkpoint.
        stage: whose rows and noise are taken.
        header: what the scores depend on.
        position: of the sequence of rows, where an interrupted scoring goes on; None: from the beginning.
        num_scored: documents that have their scores already, counted once for each epoch.
    """

    target: Path
    weights: Path
    stage: str
    header: ScoresHeader
    position: Mapping[str, Any] | None
    num_scored: int


def decide_scoring(config: TrainConfig, target: Path, is_replacing: bool, sources: Sources) -> Scoring:
    """Decide on rank 0 what will be scored.

    Args:
        config: of the run of preferences, whose own `validate` has passed.
        target: file to be written.
        is_replacing: whether it may exist.
        sources: of the run.

    Raises:
        ValueError: a schedule without preferences, a corpus, checkpoint or place that cannot work, or stages that need
            different scores.
    """
    stages = preference_stages(config)
    check(len(stages) > 0, f"scores ({target}) are for preferences, and no stage has any; take experiment=dpo.")
    check_writable(target)
    check(
        is_replacing or not target.exists(),
        f"scores ({target}) exists, and nothing is overwritten; name another file, or give overwrite=true.",
    )
    tokens = epoch_tokens(config, sources)
    schedule = BlockSchedule.from_config(config.schedule, tokens, sources.prompted_stages())
    check_sources(config, schedule, sources)
    reference = find_reference(config, None)
    assert reference is not None, "stages of preferences have a reference"
    headers = needed_headers(config, sources, reference.fingerprint, schedule, tokens)
    for header in headers.values():
        check_header(target, headers[stages[0]], header)
    begun = read_begun(target, headers[stages[0]])
    position, num_scored = (None, 0) if begun is None else (begun.position, begun.num_scored)
    return Scoring(target, reference.folder, stages[0], headers[stages[0]], position, num_scored)


def score_pairs(
    config: TrainConfig,
    scoring: Scoring,
    chunks: list[nn.Module],
    groups: Groups,
    sources: Sources,
    device: torch.device,
    keep: Callable[[NDArray[np.float32], Mapping[str, Any]], None] | None = None,
) -> NDArray[np.float32]:
    """The scores of all documents in all epochs (a collective).

    Args:
        config: in the layout of this start.
        scoring: what was decided.
        chunks: the local model.
        groups: of this rank.
        sources: of the run.
        device: where to compute.
        keep: told after every global batch, on rank 0, the scores so far, [e, d, k] fp32 with NaN for the others, and
            the position in the sequence of rows.

    Returns:
        [e, d, k] fp32 scores by epoch, document and view; of a scoring that goes on, rank 0 alone has them all.

    Raises:
        OSError: on every rank, where rank 0 cannot keep what there is.
    """
    header, stage = scoring.header, config.schedule.stages[scoring.stage]
    objective, stream = objective_of(stage, config.noise), new_stream(config, sources)
    stream.use(stage_shares(config, sources)[scoring.stage])
    if scoring.position is not None:
        stream.load_state_dict(scoring.position)
    is_first = groups.world.rank() == 0
    by_view = _scores_so_far(scoring, is_first)
    num_epochs, num_documents, num_views = header.shape
    num_left = num_epochs * num_documents - scoring.num_scored
    with _progress(is_first) as progress:
        task = progress.add_task("scoring", total=num_left)
        for step in stage_loader(config, stage, objective, stream, groups):
            scores = score_documents(chunks, step.micro_batches, device, groups, num_views)
            epochs, documents = scores.epochs.numpy(), scores.sample_ids.numpy()
            is_wanted = epochs < num_epochs
            assert is_wanted.any(), f"{num_left} documents have no score: they hold no answer"
            by_view[epochs[is_wanted], documents[is_wanted]] = scores.by_view.numpy()[is_wanted]
            num_left -= int(is_wanted.sum())
            progress.update(task, advance=int(is_wanted.sum()))
            with failing_together():
                if keep is not None and is_first:
                    keep(by_view, step.stream_state)
            if num_left == 0:
                break
    return by_view


def _scores_so_far(scoring: Scoring, is_first: bool) -> NDArray[np.float32]:
    """[e, d, k] fp32; NaN where there is no score, which is everywhere but on rank 0 of a scoring that goes on."""
    begun = read_begun(scoring.target, scoring.header) if is_first and scoring.position is not None else None
    return np.full(scoring.header.shape, np.nan, np.float32) if begun is None else np.array(begun.by_view)


def _progress(is_shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} documents"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not is_shown,
    )
