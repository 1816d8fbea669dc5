"""Saving and loading through megatron-core's dist_checkpointing: weights, optimizer state, position.

Everything is stored in model space (a tensor per parameter, whatever the layout), so a checkpoint made
on one TP/PP/CP/EP/DP layout loads on any other, optimizer state included. A checkpoint is written under
a temporary name, described by a manifest with checksums, and renamed when all ranks have finished.

What is read: JSON, tensors (`torch.load` with weights_only), and `.metadata`, a pickle by torch's own format, which
is looked through by `check_metadata` before torch reads it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.background import BackgroundWrite, Written, hand_over, use_local_results, write_now
from megatron_dllm.checkpoint.folder import check_identity as check_identity
from megatron_dllm.checkpoint.torch_dist_metadata import check_metadata
from megatron_dllm.parallel.device import local_device
from megatron_dllm.run.files import TEMPORARY_PREFIX, remove, write_json
from megatron_dllm.run.lease import LeaseLost

log = logging.getLogger(__name__)

# Model-space optimizer state with keys that do not depend on how many optimizers are chained.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_POLL_SECONDS = 0.05
_MAKE_ROOM = "make room, or choose another run.root"
# Errors that keep their kind on the ranks where they did not occur.
_KINDS: tuple[type[Exception], ...] = (ValueError, LeaseLost)


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Sharded state dict of all local model chunks, tensors only; their keys are global names.

    Objects (modules' `_extra_state`, empty in this model) are left out: loading them would unpickle.
    """
    states = [unwrap_model(chunk).sharded_state_dict(metadata=dict(_METADATA)) for chunk in chunks]
    tensors = {
        f"chunk{i}": {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}
        for i, state in enumerate(states)
    }
    assert not any(isinstance(value, ShardedObject) for value in nested_values(tensors)), "an object lies deeper"
    return tensors


def _check_space(folder: Path) -> None:
    """Refuse to begin a checkpoint that will not fit, judged by the one before it.

    Raises:
        OSError: naming both sizes.
    """
    before = folders.latest_checkpoint(folder.parent)
    if before is None:
        return
    needed = sum(entry["size"] for entry in folders.read_manifest(before).values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"writing {folder}: it needs about {needed / 2**30:.3g} GiB, as {before.name} does, and "
            f"{free / 2**30:.3g} GiB are free; {_MAKE_ROOM}"
        )


def _altered_file(folder: Path, parts: Sequence[dict[str, Any]]) -> Exception | None:
    """Read the files of a rank far from this one, so of another node; an error where they are not what it wrote."""
    part = parts[(dist.get_rank() + max(1, len(parts) // 2)) % len(parts)]
    problems = folders.damaged_files(folder, part, part)
    return OSError(f"{problems[0]}; the storage does not keep what is written to it") if problems else None


def _optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers behind a chain, without the stubs of ranks that own no parameter."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o for o in chained if not getattr(o, "is_stub_optimizer", False)]


def _optimizer_state(optimizer: MegatronOptimizer, model_sharded_state: dict[str, Any], is_loading: bool) -> dict:
    """Sharded moments and main weights. Their keys are global names; the place in the chain is this rank's affair."""
    return {
        i: part.sharded_param_state_fully_reshardable(model_sharded_state, is_loading, dict(_METADATA))
        for i, part in enumerate(_optimizers(optimizer))
    }


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what went wrong on any, naming the rank: no rank is left waiting for another.

    ValueError and LeaseLost stay what they are, anything else becomes a RuntimeError.
    """
    mine = None if error is None else (type(error).__name__, str(error))
    errors: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    failed = [(rank, *entry) for rank, entry in enumerate(errors) if entry is not None]
    if not failed:
        return
    rank, kind, text = failed[0]
    for known in _KINDS:
        if known.__name__ == kind:
            raise known(text) from error
    raise RuntimeError(f"checkpoint: rank {rank} of {len(errors)} failed: {kind}: {text}") from error


class _Deadline:
    """Ends the process when a block of code does not finish in time: a dead writer must not hang the job."""

    def __init__(self, minutes: float, what: str) -> None:
        self._timer = threading.Timer(60.0 * minutes, self._expire)
        self._timer.daemon = True
        self._message = (
            f"{what} did not finish within checkpoint.timeout_minutes ({minutes:g}); a rank or its "
            "storage is taken for dead."
        )

    def _expire(self) -> None:
        log.critical(self._message)
        logging.shutdown()
        os._exit(1)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


@dataclass(frozen=True)
class _Save:
    """A checkpoint on its way: megatron-core's request and what will be written beside the tensors."""

    temporary: Path
    final: Path
    request: AsyncRequest
    contract: dict[str, Any]
    state: dict[str, Any]


class CheckpointWriter:
    """Writes checkpoints of one run, one after the other, synchronously or behind training."""

    def __init__(
        self,
        checkpoints: Path,
        is_async: bool = False,
        timeout_minutes: float = 30.0,
        before_publish: Callable[[], None] | None = None,
        reads_back: bool = True,
    ) -> None:
        """Args: folder of the run's checkpoints; `before_publish` may refuse (raise) before the final rename.

        `reads_back`: before that, every rank compares another rank's files with their checksums (not in asynchronous
        saves, where training would stand still meanwhile).
        """
        self._checkpoints = checkpoints
        self._is_async = is_async
        self._timeout = timeout_minutes
        self._before_publish = before_publish
        self._reads_back = reads_back and not is_async
        self._background: tuple[_Save, BackgroundWrite] | None = None
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        if group.size() > 1:
            self._strategy = FullyParallelSaveStrategyWrapper(self._strategy, group, True)
        use_local_results()

    def save(
        self,
        step: int,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None,
        contract: dict[str, Any],
        state: dict[str, Any],
    ) -> Path:
        """Save after `step` optimizer steps; returns the folder (complete on return unless asynchronous)."""
        self.finish()
        final = folders.step_folder(self._checkpoints, step)
        temporary = final.with_name(TEMPORARY_PREFIX + final.name)
        with _Deadline(self._timeout, f"Saving {final}"):
            self._prepare_folder(temporary)
            model = model_state(chunks)
            sharded: dict[str, Any] = dict(model)
            if optimizer is not None:
                sharded["optimizer"] = _optimizer_state(optimizer, model, is_loading=False)
            try:
                request = dist_checkpointing.save(sharded, str(temporary), self._strategy, async_sharded_save=True)
            except (OSError, RuntimeError) as error:  # torch hides what the operating system said
                raise RuntimeError(f"writing {temporary}: {error}; if the disk is full, {_MAKE_ROOM}") from error
            assert request is not None, "an asynchronous save must return a request"
            save = _Save(temporary, final, request, contract, state)
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
        """
        if self._background is None:
            return
        save, process = self._background
        written: Written | None = None
        error: Exception | None = None
        try:
            written = process.poll()
        except (RuntimeError, TimeoutError) as caught:
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
            with _Deadline(self._timeout, f"Completing {save.final}"):
                self._complete(save, written)

    def finish(self) -> None:
        """Wait for an asynchronous checkpoint in flight."""
        # Later than the writer's own limit, which names the rank.
        with _Deadline(self._timeout + 1.0, "The checkpoint written in the background"):
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
            except Exception as caught:
                error = caught
        raise_together(error)

    def _complete(self, save: _Save, written: Written) -> None:
        """Describe, verify and rename a folder whose tensor files all ranks have written."""
        hand_over(save.request, written)
        try:
            for finalize in save.request.finalize_fns:
                finalize()
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"writing {save.temporary}: {error}; if the disk is full, {_MAKE_ROOM}") from error
        parts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, written.checksums)
        if self._reads_back:
            raise_together(_altered_file(save.temporary, parts))
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                self._publish(save, {name: entry for part in parts for name, entry in part.items()})
            except Exception as caught:
                error = caught
        raise_together(error)

    def _publish(self, save: _Save, manifest: dict[str, Any]) -> None:
        """On rank 0: write the descriptions beside the tensors, look everything over, rename."""
        write_json(save.temporary / folders.CONTRACT, save.contract, sort_keys=True)
        write_json(save.temporary / folders.STATE, save.state, sort_keys=True)
        for name in folders.payload_files(save.temporary):
            if name not in manifest:
                manifest[name] = folders.checksum(save.temporary / name)
        write_json(save.temporary / folders.MANIFEST, manifest, sort_keys=True)
        problems = folders.damaged_files(save.temporary, manifest, manifest, hash_content=False)
        if problems:
            raise OSError(f"what was written is not there: {problems[0]}")
        if self._before_publish is not None:
            self._before_publish()
        folders.publish(save.temporary, save.final)


# ---- loading -------------------------------------------------------------------------------------


def verify(folder: Path, hash_content: bool = True) -> None:
    """Compare every file with the manifest, the ranks sharing the work, and look through the pickled metadata.

    Raises:
        ValueError: on all ranks, naming the file that is missing, truncated or altered.
    """
    error: Exception | None = None
    try:
        manifest = folders.read_manifest(folder)
        names = sorted(manifest)[dist.get_rank() :: dist.get_world_size()]
        problems = folders.damaged_files(folder, manifest, names, hash_content)
        if problems:
            error = ValueError(f"checkpoint {folder} is damaged: {'; '.join(problems)}; choose another checkpoint.")
        elif dist.get_rank() == 0:
            check_metadata(folder)
    except (ValueError, OSError) as caught:
        error = ValueError(str(caught))
    raise_together(error)


def load_weights(folder: Path, chunks: Sequence[nn.Module], hash_content: bool = True) -> None:
    """Load model weights of any layout into this one; every tensor of the model must be there."""
    verify(folder, hash_content)
    loaded = dist_checkpointing.load(model_state(chunks), str(folder), strict="raise_unexpected")
    for i, chunk in enumerate(chunks):
        _load_chunk(chunk, loaded[f"chunk{i}"])


def _load_chunk(chunk: nn.Module, state: dict[str, Any]) -> None:
    missing, unexpected = unwrap_model(chunk).load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, f"missing {missing[:3]}, unexpected {unexpected[:3]}"


def load_run(folder: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Load weights and optimizer state of any layout from a verified folder; returns the run's state.json."""
    state = folders.read_json(folder / folders.STATE)
    for part in _optimizers(optimizer):
        part._init_optimizer_states_with_dummy_values()
    model = model_state(chunks)
    sharded = {**model, "optimizer": _optimizer_state(optimizer, model, is_loading=True)}
    loaded = dist_checkpointing.load(sharded, str(folder))
    for i, chunk in enumerate(chunks):
        _load_chunk(chunk, loaded[f"chunk{i}"])
    for i, part in enumerate(_optimizers(optimizer)):
        _load_optimizer_part(part, loaded["optimizer"][i], state["optimizer_step"])
    return state


def _load_optimizer_part(part: Any, param_state: dict[int, Any], optimizer_step: int) -> None:
    """Put moments and main weights into one distributed optimizer.

    torch's AdamW keeps `step` per parameter, which megatron-core neither stores nor expects in this format
    (it would fail on the key), so it is taken out for the load and put back; fused optimizers keep it in
    their param groups.
    """
    inner = part.optimizer
    steps = [entry for entry in inner.state.values() if "step" in entry]
    for entry in steps:
        del entry["step"]
    part.load_parameter_state_from_fully_reshardable(param_state)
    for entry in steps:
        entry["step"] = torch.tensor(float(optimizer_step))
    if not steps:
        for group in inner.param_groups:
            group["step"] = optimizer_step
