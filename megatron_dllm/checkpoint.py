"""Saving and loading through megatron-core's dist_checkpointing: weights, optimizer state, position.

Everything is stored in model space (a tensor per parameter, whatever the layout), so a checkpoint made
on one TP/PP/CP/EP/DP layout loads on any other, optimizer state included. A checkpoint is written under
a temporary name, described by a manifest with checksums, and renamed when all ranks have finished.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_dllm import checkpoint_folder as folders
from megatron_dllm.checkpoint_folder import check_identity as check_identity

log = logging.getLogger(__name__)

# Model-space optimizer state with keys that do not depend on how many optimizers are chained.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Sharded state dict of all local model chunks; the tensors' keys are global names."""
    return {f"chunk{i}": unwrap_model(chunk).sharded_state_dict(metadata=dict(_METADATA))
            for i, chunk in enumerate(chunks)}


def _optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers behind a chain, without the stubs of ranks that own no parameter."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o for o in chained if not getattr(o, "is_stub_optimizer", False)]


def _optimizer_state(optimizer: MegatronOptimizer, model_sharded_state: dict[str, Any], is_loading: bool) -> dict:
    return {i: part.sharded_param_state_fully_reshardable(model_sharded_state, is_loading, dict(_METADATA))
            for i, part in enumerate(_optimizers(optimizer))}


def _raise_together(error: Exception | None) -> None:
    """Raise on every rank what went wrong on any, naming the rank: no rank is left waiting for another."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    failed = [(rank, text) for rank, text in enumerate(errors) if text is not None]
    if failed:
        rank, text = failed[0]
        raise RuntimeError(f"checkpoint: rank {rank} of {len(errors)} failed: {text}") from error


class _Deadline:
    """Ends the process when a block of code does not finish in time: a dead writer must not hang the job."""

    def __init__(self, minutes: float, what: str) -> None:
        self._timer = threading.Timer(60.0 * minutes, self._expire)
        self._timer.daemon = True
        self._message = f"{what} did not finish within {minutes:g} minutes; the writer is taken for dead."

    def _expire(self) -> None:
        log.critical(self._message)
        logging.shutdown()
        os._exit(1)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


class CheckpointWriter:
    """Writes checkpoints of one run, one after the other, synchronously or behind training."""

    def __init__(self, checkpoints: Path, is_async: bool = False, timeout_minutes: float = 30.0,
                 before_publish: Callable[[], None] | None = None) -> None:
        """Args: folder of the run's checkpoints; `before_publish` may refuse (raise) before the final rename."""
        self._checkpoints = checkpoints
        self._is_async = is_async
        self._timeout = timeout_minutes
        self._before_publish = before_publish
        self._queue = AsyncCallsQueue() if is_async else None
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        if group.size() > 1:
            self._strategy = FullyParallelSaveStrategyWrapper(self._strategy, group, True)

    def save(self, step: int, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None,
             contract: dict[str, Any], state: dict[str, Any]) -> Path:
        """Save after `step` optimizer steps; returns the folder (complete on return unless asynchronous)."""
        self.finish()
        final = folders.step_folder(self._checkpoints, step)
        temporary = final.with_name(folders.TEMPORARY_PREFIX + final.name)
        with _Deadline(self._timeout, f"Saving {final}"):
            self._prepare_folder(temporary)
            model = model_state(chunks)
            sharded: dict[str, Any] = dict(model)
            if optimizer is not None:
                sharded["optimizer"] = _optimizer_state(optimizer, model, is_loading=False)
            request = dist_checkpointing.save(sharded, str(temporary), self._strategy,
                                              async_sharded_save=self._is_async)
            if self._queue is None:
                self._publish(temporary, final, contract, state)
                return final
        assert request is not None, "an asynchronous save must return a request"
        request.add_finalize_fn(lambda: self._publish(temporary, final, contract, state))
        self._queue.schedule_async_request(request)
        return final

    def poll(self) -> None:
        """Publish an asynchronous checkpoint whose writers have finished."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for an asynchronous checkpoint in flight."""
        if self._queue is not None:
            with _Deadline(self._timeout, "The checkpoint written in the background"):
                self._queue.maybe_finalize_async_calls(blocking=True)

    def _prepare_folder(self, temporary: Path) -> None:
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                if self._before_publish is not None:
                    self._before_publish()
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir(parents=True)
            except Exception as caught:
                error = caught
        _raise_together(error)

    def _publish(self, temporary: Path, final: Path, contract: dict[str, Any], state: dict[str, Any]) -> None:
        """Describe, verify and rename a folder whose tensor files all ranks have written."""
        rank = dist.get_rank()
        error: Exception | None = None
        mine: dict[str, Any] = {}
        try:
            if rank == 0:
                folders.write_json(temporary / folders.CONTRACT, contract)
                folders.write_json(temporary / folders.STATE, state)
            own = f"__{rank}_"
            for path in sorted(temporary.iterdir()):
                if path.name.startswith(own) or (rank == 0 and not path.name.startswith("__")):
                    mine[path.name] = folders.checksum(path)
        except Exception as caught:
            error = caught
        _raise_together(error)
        parts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, mine)
        if rank == 0:
            try:
                manifest = {name: entry for part in parts for name, entry in part.items()}
                folders.write_json(temporary / folders.MANIFEST, manifest)
                if not folders.is_complete(temporary):
                    raise OSError(f"{temporary} is not what was written to it")
                if self._before_publish is not None:
                    self._before_publish()
                if final.exists():
                    shutil.rmtree(final)
                os.replace(temporary, final)
                folders.write_text(self._checkpoints / folders.LATEST, final.name + "\n")
            except Exception as caught:
                error = caught
        _raise_together(error)


def verify(folder: Path, hash_content: bool) -> None:
    """Compare every file with the manifest, the ranks sharing the work.

    Raises:
        RuntimeError: on all ranks, naming the file that is missing, truncated or altered.
    """
    error: Exception | None = None
    try:
        manifest = folders.read_json(folder / folders.MANIFEST)
        names = sorted(manifest)[dist.get_rank()::dist.get_world_size()]
        problems = folders.damaged_files(folder, manifest, names, hash_content)
        if problems:
            error = ValueError("; ".join(problems))
    except ValueError as caught:
        error = caught
    _raise_together(error)


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


def load_run(folder: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer,
             hash_content: bool = True) -> dict[str, Any]:
    """Load weights and optimizer state of any layout into this one; returns the run's state.json."""
    verify(folder, hash_content)
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
