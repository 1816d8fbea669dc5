"""Saving through megatron-core's dist_checkpointing: weights, optimizer state, position.

Everything is stored in model space (a tensor per parameter, whatever the layout), so a checkpoint made
on one TP/PP/CP/EP/DP layout loads on any other, optimizer state included. A checkpoint is written under
a temporary name, described by a manifest with checksums, and renamed when all ranks have finished.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.background import BackgroundWrite, Written, hand_over, use_local_results, write_now
from megatron_dllm.checkpoint.deadline import Deadline
from megatron_dllm.checkpoint.manifest import read_manifest, write_manifest
from megatron_dllm.checkpoint.meta import CheckpointMeta, write_meta
from megatron_dllm.checkpoint.reading_back import altered_file, gather_checksums
from megatron_dllm.checkpoint.request import request_save, save_strategy
from megatron_dllm.checkpoint.sharded_state import model_state, optimizer_state
from megatron_dllm.parallel.agreement import raise_together
from megatron_dllm.parallel.device import local_device
from megatron_dllm.run.disk_full import MAKE_ROOM, DiskFull, failed_write
from megatron_dllm.run.files import TEMPORARY_PREFIX, remove, write_json
from megatron_dllm.run.names import STATE

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


def _check_space(folder: Path) -> None:
    """Refuse to begin a checkpoint that will not fit, judged by the one before it.

    Raises:
        DiskFull: naming both sizes.
    """
    before = folders.latest_checkpoint(folder.parent)
    if before is None:
        return
    needed = sum(entry["size"] for entry in read_manifest(before).values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(
            f"writing {folder}: it needs about {needed / 2**30:.3g} GiB, as {before.name} does, and "
            f"{free / 2**30:.3g} GiB are free; {MAKE_ROOM}"
        )


@dataclass(frozen=True)
class _Save:
    """A checkpoint on its way: megatron-core's request and what will be written beside the tensors."""

    temporary: Path
    final: Path
    request: AsyncRequest
    meta: CheckpointMeta
    state: dict[str, Any]


class CheckpointWriter:
    """Writes checkpoints of one run, one after the other, synchronously or behind training."""

    def __init__(
        self,
        checkpoints: Path,
        group: dist.ProcessGroup,
        is_async: bool = False,
        timeout_minutes: float = 30.0,
        before_publish: Callable[[], None] | None = None,
        reads_back: bool = True,
    ) -> None:
        """Args: folder of the run's checkpoints; `group`: the ranks that hold the same weights and share the writing.

        `before_publish` may refuse (raise) before the final rename.

        `reads_back`: before that, every rank compares another rank's files with their checksums (not in asynchronous
        saves, where training would stand still meanwhile).
        """
        self._checkpoints = checkpoints
        self._is_async = is_async
        self._timeout = timeout_minutes
        self._before_publish = before_publish
        self._reads_back = reads_back and not is_async
        self._background: tuple[_Save, BackgroundWrite] | None = None
        self._strategy = save_strategy(group)
        use_local_results()

    def save(
        self,
        step: int,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None,
        meta: CheckpointMeta,
        state: dict[str, Any],
    ) -> Path:
        """Save after `step` optimizer steps; returns the folder (complete on return unless asynchronous)."""
        self.finish()
        final = folders.step_folder(self._checkpoints, step)
        temporary = final.with_name(TEMPORARY_PREFIX + final.name)
        with Deadline(self._timeout, f"Saving {final}"):
            self._prepare_folder(temporary)
            model = model_state(chunks)
            sharded: dict[str, Any] = dict(model)
            if optimizer is not None:
                sharded["optimizer"] = optimizer_state(optimizer, model, is_loading=False)
            request = request_save(sharded, temporary, self._strategy)
            save = _Save(temporary, final, request, meta, state)
            if self._is_async:
                self._background = (save, BackgroundWrite(request, self._timeout))
                return final
            error: Exception | None = None
            written = Written()
            try:
                written = write_now(request)
            except Exception as caught:
                error = caught
            raise_together(error)
            self._complete(save, written)
        return final

    def poll(self) -> None:
        """Complete an asynchronous checkpoint when all ranks' writers have finished (a collective while one is due).

        Raises:
            RuntimeError: on every rank, when a rank's writer failed, died, or took too long.
            OSError: on every rank, when there was no room (DiskFull), or no right to write.
        """
        if self._background is None:
            return
        save, process = self._background
        written: Written | None = None
        error: Exception | None = None
        try:
            written = process.poll()
        except (RuntimeError, OSError) as caught:
            error = caught
        # 2: failed, 1: busy, 0: done; the worst of all ranks.
        status = torch.tensor([2 if error is not None else int(written is None)], device=local_device())
        dist.all_reduce(status, op=dist.ReduceOp.MAX)
        if status.item() == 2:
            process.kill()
            self._background = None
            raise_together(error)
        if status.item() == 0:
            assert written is not None, "done on all ranks means done on this one"
            self._background = None
            with Deadline(self._timeout, f"Completing {save.final}"):
                self._complete(save, written)

    def finish(self) -> None:
        """Wait for an asynchronous checkpoint in flight."""
        # Later than the writer's own limit, which names the rank.
        with Deadline(self._timeout + 1.0, "The checkpoint written in the background"):
            while self._background is not None:
                self.poll()
                if self._background is not None:
                    time.sleep(_POLL_SECONDS)

    def _prepare_folder(self, temporary: Path) -> None:
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                if self._before_publish is not None:
                    self._before_publish()
                remove(temporary)
                temporary.mkdir(parents=True)
                _check_space(temporary)
            except DiskFull as caught:
                error = caught
            except OSError as caught:
                error = failed_write(temporary, caught)
            except Exception as caught:
                error = caught
        raise_together(error)

    def _complete(self, save: _Save, written: Written) -> None:
        """Describe, verify and rename a folder whose tensor files all ranks have written."""
        hand_over(save.request, written)
        for finalize in save.request.finalize_fns:
            finalize()
        parts = gather_checksums(written.checksums)
        if self._reads_back:
            raise_together(altered_file(save.temporary, parts))
        error: Exception | None = None
        if parts is not None:
            try:
                self._publish(save, {name: entry for part in parts for name, entry in part.items()})
            except OSError as caught:
                error = failed_write(save.temporary, caught)
            except Exception as caught:
                error = caught
        raise_together(error)

    def _publish(self, save: _Save, manifest: dict[str, Any]) -> None:
        """On rank 0: write the descriptions beside the tensors, look everything over, rename."""
        write_meta(save.temporary, save.meta)
        write_json(save.temporary / STATE, save.state, sort_keys=True)
        write_manifest(save.temporary, manifest)
        if self._before_publish is not None:
            self._before_publish()
        folders.publish(save.temporary, save.final)
