"""Weights and optimizer state of a start: the checkpoint it decided on, or an older one where that is damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.loading import load_run, load_weights, verify
from megatron_dllm.parallel.agreement import raise_together
from megatron_dllm.run.files import write_text
from megatron_dllm.run.names import LATEST
from megatron_dllm.training.engine import Engine
from megatron_dllm.training.start import Start

log = logging.getLogger(__name__)
Decide = Callable[[Mapping[Path, str]], Start]


def load_start(start: Start, engine: Engine, decide: Decide, hash_content: bool) -> Start:
    """Load what the start decided on (a collective); what was really loaded.

    The content of files is compared with the checksums here, each rank reading its share. Where it differs the
    start is decided again without that checkpoint, and the damaged ones are set aside once a whole one is loaded.

    Args:
        start: as rank 0 decided it.
        engine: to load into.
        decide: decides again on rank 0, given the checkpoints to pass over and why.
        hash_content: compare checksums of every file.

    Raises:
        ValueError: every checkpoint is damaged, or the one that is left is of another model or contract.
    """
    start = _first_whole(start, decide, hash_content)
    if start.resume is not None:
        for folder, reason in start.passed_over.items():
            _say(f"passed over {folder.name}: {reason}")
        _set_aside(start)
        load_run(start.resume.folder, engine.chunks, engine.optimizer)
        state = start.resume.state
        _say(f"resumed {start.resume.folder}: step {state.step}, {state.consumed_tokens} tokens consumed")
    elif start.weights is not None:
        load_weights(start.weights.folder, engine.chunks, hash_content)
        engine.optimizer.reload_model_params()
        _say(f"started from the weights of {start.weights.folder}")
    return start


def _first_whole(start: Start, decide: Decide, hash_content: bool) -> Start:
    while start.resume is not None:
        try:
            verify(start.resume.folder, hash_content)
            return start
        except ValueError as error:
            start = _decide_again(decide, {**start.passed_over, start.resume.folder: str(error)})
    return start


def _decide_again(decide: Decide, passed_over: Mapping[Path, str]) -> Start:
    """Decide on rank 0 and broadcast, as the first time, but over the group that exists by now."""
    decided: list[Start | None] = [None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            decided = [decide(passed_over)]
        except ValueError as caught:
            error = caught
    raise_together(error)
    dist.broadcast_object_list(decided)
    assert decided[0] is not None, "rank 0 has decided"
    return decided[0]


def _set_aside(start: Start) -> None:
    """Rename damaged checkpoints on rank 0, so that they count no more."""
    assert start.resume is not None, "there is a whole checkpoint"
    good, error = start.resume.folder, None
    if dist.get_rank() == 0 and start.passed_over:
        try:
            for folder in start.passed_over:
                aside = folders.set_aside(folder).name
                _say(f"{folder.name} is damaged and was renamed to {aside}; the run continues from {good.name}")
            write_text(good.parent / LATEST, good.name + "\n")
        except OSError as caught:
            error = caught
    raise_together(error)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        log.warning("%s", text)
