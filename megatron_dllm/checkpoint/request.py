"""megatron-core's part of a save, taken apart so that what fails on one rank ends all of them.

`dist_checkpointing.save` writes common.pt, `.metadata` and metadata.json on rank 0 while the others wait for it in a
collective. An error there would leave them to a broken connection. Here each of these files is followed by an exchange
of what went wrong.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_dllm.parallel.agreement import raise_together
from megatron_dllm.run.disk_full import failed_write

_FORMAT = CheckpointingConfig("torch_dist", 1)


class _Strategy(TorchDistSaveShardedStrategy):
    """The torch_dist format, completed by `_complete`."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, planned)
        return request._replace(finalize_fns=[partial(_complete, *planned)])


def save_strategy(group: dist.ProcessGroup) -> TorchDistSaveShardedStrategy | FullyParallelSaveStrategyWrapper:
    """How tensors are shared out and written.

    Args:
        group: the ranks that hold the same weights and share the writing.
    """
    strategy = _Strategy(_FORMAT.sharded_backend, _FORMAT.sharded_backend_version, thread_count=1)
    return FullyParallelSaveStrategyWrapper(strategy, group, True) if group.size() > 1 else strategy


def request_save(state: dict[str, Any], folder: Path, strategy: Any) -> AsyncRequest:
    """Write common.pt and plan the files of tensors (a collective).

    Args:
        state: megatron-core's sharded state dict.
        folder: is there and empty.
        strategy: as `save_strategy` made it.

    Returns:
        What is to be written, and how it is completed.

    Raises:
        OSError: on every rank, when rank 0 had no room or may not write there.
        RuntimeError: on every rank, when it could not write for another reason.
    """
    sharded, common = save_preprocess(state, True)
    error: Exception | None = None
    try:
        TorchCommonSaveStrategy(_FORMAT.sharded_backend, 1).save_common(common, str(folder))
    except (OSError, RuntimeError) as failed:  # torch hides what the operating system said
        error = failed_write(folder, failed)
    raise_together(error)
    request: AsyncRequest = strategy.async_save(sharded, str(folder))
    return request


def _complete(writer: Any, metadata: Any, _wrapper: Any) -> None:
    """Write .metadata and metadata.json on rank 0 from what all ranks have written (a collective).

    Args:
        writer: megatron-core's, of this rank.
        metadata: of the planned files, on rank 0.
    """
    mine = writer.retrieve_write_results()
    assert isinstance(mine, list), f"what this rank has written was handed over: {mine}"
    results: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, results)
    error: Exception | None = None
    if results is not None:
        folder = Path(writer.path)
        try:
            writer.finish(metadata, results)
            save_config(_FORMAT, str(folder))
        except (OSError, RuntimeError) as failed:
            error = failed_write(folder, failed)
    raise_together(error)
