"""Process groups and seeds on real ranks."""

from __future__ import annotations

import torch

from benchmarks.ranks import run_ranks
from megatron_dllm.config import ParallelConfig, RunConfig

LAYOUTS = [
    ParallelConfig(pipeline_model_parallel_size=2),
    ParallelConfig(tensor_model_parallel_size=2),
    ParallelConfig(),
]


def _draws() -> list[tuple[list[float], list[float]]]:
    """Per layout, what this rank draws for replicated and for divided weights; groups come and go in between."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_dllm.parallel import groups

    result = []
    for layout in LAYOUTS:
        groups.initialize(layout, RunConfig(name="test", seed=3, distributed_timeout_minutes=1.0))
        layout_sizes = (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_data_parallel_world_size(),
        )
        assert layout_sizes == (
            layout.pipeline_model_parallel_size,
            layout.tensor_model_parallel_size,
            layout.data_parallel_size(2),
        )
        replicated = torch.rand(3).tolist()
        with tensor_parallel.get_cuda_rng_tracker().fork():
            result.append((replicated, torch.rand(3).tolist()))
        parallel_state.destroy_model_parallel()
    groups.destroy()
    assert not torch.distributed.is_initialized()
    groups.destroy()
    return result


def test_ranks_draw_alike_where_weights_are_replicated_and_apart_where_they_are_divided() -> None:
    first, second = run_ranks(_draws, 2)
    for (replicated, divided), (other_replicated, other_divided), layout in zip(first, second, LAYOUTS, strict=True):
        assert replicated != divided
        assert (replicated == other_replicated) == (layout.pipeline_model_parallel_size == 1)
        assert (divided == other_divided) == (layout.data_parallel_size(2) == 2)
