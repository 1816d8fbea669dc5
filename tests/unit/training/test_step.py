"""How often the host waits for the device in a step: on a GPU as the planner imagines it, whose values nobody knows."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dllm.config import ParallelConfig
from megatron_dllm.model.attention.backends import BACKENDS
from megatron_dllm.model.objective import objective_of
from megatron_dllm.model.paths import choose_paths
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.planning.engine_kernels import ShapedFlex
from megatron_dllm.planning.engine_ledger import Ledger
from megatron_dllm.planning.engine_memory import LiveMemory
from megatron_dllm.planning.engine_rows import micro_batches
from megatron_dllm.planning.engine_values import DeviceNames, KnownValues
from tests.planning_case import MODEL, config

CPU = torch.device("cpu")
DENSE = replace(MODEL, num_moe_experts=0)


class WatchNumbers(TorchDispatchMode):
    """Writes down the functions that ask for a number on the device.

    The planner has values for whole numbers, so that those of megatron-core's end of a backward pass count too.
    """

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            place = _caller()
            if args[0].is_meta or place.startswith("finalize_model_grads.py"):
                self._places.append(place)
        return func(*args, **(kwargs or {}))


class WatchCopies(TorchFunctionMode):
    """Writes down the functions that bring a tensor from the device."""

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor or (func in (torch.Tensor.cpu, torch.Tensor.tolist) and args[0].is_meta):
            self._places += [_caller() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """File and name of the function that called torch."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    asked = [frame for frame in frames if not frame.filename.endswith(("test_step.py", "engine_values.py"))]
    return f"{asked[-1].filename.rsplit('/', 1)[1]}:{asked[-1].name}"


def _reads(layout: ParallelConfig, world_size: int, rank: int) -> list[str]:
    """Where one rank's step asks its GPU for values, in order."""
    from megatron_dllm.parallel.fake_world import fake_world
    from megatron_dllm.planning.engine import roles_of_ranks
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.loop import embedding_noise
    from megatron_dllm.training.step import train_step

    layout = replace(layout, precision="bf16")
    run = replace(config(), model=DENSE, parallel=layout)
    stage = run.schedule.stages["block"]
    batches = micro_batches(run, stage, 4)
    paths = choose_paths(DENSE, layout, DeviceFacts.as_cuda(has_transformer_engine=False), is_training=True)
    ledger, memory, places = Ledger({}), LiveMemory(), list[str]()
    with fake_world(layout, rank, world_size) as groups:
        known = KnownValues(ledger, 1.0, roles_of_ranks(batches, groups))
        with DeviceNames(True, memory), known, memory:
            backends: dict[str, Any] = {**BACKENDS, "flex": ShapedFlex(ledger)}
            engine = build_engine(run, groups, paths, backends)
            with WatchCopies(places), WatchNumbers(places):
                train_step(engine, batches, CPU, objective_of(stage, run.noise), embedding_noise(run, 0))
    return places


@pytest.mark.parametrize(
    ("layout", "world_size", "rank"),
    [
        pytest.param(ParallelConfig(), 1, 0, id="one rank"),
        pytest.param(
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), 4, 3, id="pipeline"
        ),
    ],
)
def test_a_step_waits_for_the_gradient_norm_and_then_reads_what_has_arrived(
    layout: ParallelConfig, world_size: int, rank: int
) -> None:
    first, *others = _reads(layout, world_size, rank)
    assert first == "gradient_norm.py:gradient_norm"
    # One copy, whose numbers would be on the host by then.
    assert others[0] == "pipeline.py:read" and set(others) == {"pipeline.py:read", "step_sums.py:mean_loss"}
