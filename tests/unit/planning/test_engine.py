"""The engine as any rank of any layout: parameters, state, work and traffic, by formulas for a small model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dllm.config import DistillConfig, ParallelConfig
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.planning.answer import ENGINE, RankAnswer, Traffic
from megatron_dllm.planning.engine import distinct_ranks, measure, num_parameters
from tests.planning_case import LAYOUTS, MODEL, config

# Of 16 ranks: 2 pipeline stages, 2 tensor ranks, 2 expert ranks, so 4 replicas of dense weights and 2 of experts.
WIDE = replace(LAYOUTS["tensor_expert"], pipeline_model_parallel_size=2, expert_model_parallel_size=4, precision="bf16")


@pytest.fixture(scope="module")
def wide() -> RankAnswer:
    """Rank 15 of 16, on a GPU."""
    return measure(config(), WIDE, 16, 15, "block").worst


def test_an_answer_says_what_it_is_of() -> None:
    answer = measure(config(), LAYOUTS["one"], 1, 0, "ar")
    assert (answer.stage, answer.source, answer.worst.memory.rank) == ("ar", ENGINE, 0)
    assert answer.worst.traffic == ()


def test_state_is_two_four_and_twelve_bytes_a_parameter(wide: RankAnswer) -> None:
    dense_share, expert_share = 1 / 4, 1 / 2
    experts = 2 * (MODEL.num_moe_experts // 4) * 3 * MODEL.moe_ffn_hidden_size * MODEL.hidden_size
    dense = wide.num_parameters - experts
    memory = wide.memory
    assert memory.weights == 2 * wide.num_parameters
    assert memory.gradients == pytest.approx(4 * wide.num_parameters, rel=0.01)  # buffers are padded
    assert memory.optimizer == pytest.approx(12 * (dense * dense_share + experts * expert_share), rel=0.01)


def _of(answer: RankAnswer, kind: str, group: str) -> Traffic:
    (found,) = [entry for entry in answer.traffic if (entry.kind, entry.group) == (kind, group)]
    return found


def test_tokens_travel_to_their_experts_and_back(wide: RankAnswer) -> None:
    exchange = _of(wide, "all_to_all", "ep")
    # One micro-batch; of the two layers here the last one computes targets only. Tokens go there and back, their
    # probabilities there, and as much returns as gradients.
    row, copies = 768 // 2, MODEL.moe_router_topk
    whole = 4 * 2 * MODEL.hidden_size * row * copies
    assert exchange.ranks == (12, 13, 14, 15)[:0] or len(exchange.ranks) == 4
    assert exchange.calls == 2 * 6
    assert whole < exchange.num_bytes < 2 * whole


def test_replicas_reduce_each_gradient_once_a_step(wide: RankAnswer) -> None:
    reduced = [_of(wide, "reduce_scatter", group) for group in ("dp", "edp")]
    assert sum(entry.num_bytes for entry in reduced) == wide.memory.gradients
    assert [len(entry.ranks) for entry in reduced] == [4, 2]


def test_work_and_traffic_grow_with_the_batch_and_memory_does_not() -> None:
    def step(batch: int) -> RankAnswer:
        run = config()
        run.schedule.stages["block"] = replace(run.schedule.stages["block"], global_batch_size=batch)
        return measure(run, replace(LAYOUTS["tensor"], precision="bf16"), 2, 0, "block").worst

    some, many = step(4), step(16)
    assert many.memory == some.memory
    assert many.flops == pytest.approx(4 * some.flops)
    assert _of(many, "all_gather", "tp").num_bytes == pytest.approx(4 * _of(some, "all_gather", "tp").num_bytes)


@pytest.mark.parametrize("layout", ["one", "context"])
def test_a_teacher_lies_in_memory_and_runs_in_every_step(layout: str) -> None:
    run, size = config(), 1 if layout == "one" else 2
    plain = measure(run, replace(LAYOUTS[layout], precision="bf16"), size, 0, "block").worst
    run.teacher.checkpoint = "base"
    run.schedule.stages["block"] = replace(run.schedule.stages["block"], distill=DistillConfig(1.0, "teacher"))
    taught = measure(run, replace(LAYOUTS[layout], precision="bf16"), size, 0, "block").worst
    assert taught.memory.weights == 2 * plain.memory.weights
    assert taught.memory.gradients == plain.memory.gradients and taught.memory.optimizer == plain.memory.optimizer
    assert plain.memory.activations < taught.memory.activations + taught.memory.head
    # A forward pass is a third of a step; beside it the head has a second row of logits.
    assert 1.25 * plain.flops < taught.flops < 1.7 * plain.flops


def test_the_engine_updates_as_the_device_that_it_speaks_of() -> None:
    found = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(func)
            return func(*args, **(kwargs or {}))

    for is_cuda in (False, True):
        found.clear()
        facts = DeviceFacts(is_cuda=is_cuda, has_triton=is_cuda, has_transformer_engine=False)
        with Seen():
            measure(config(), LAYOUTS["one"], 1, 0, "ar", facts)
        assert (torch.ops.aten._fused_adamw_.default in found) == is_cuda


def test_parameters_are_counted_without_a_step(wide: RankAnswer) -> None:
    assert num_parameters(config(), WIDE, 16, 15) == wide.num_parameters


@pytest.mark.parametrize(("stages", "expected"), [(1, (0,)), (2, (0, 4)), (8, (0, 1, 7))])
def test_one_rank_of_each_kind_of_stage(stages: int, expected: tuple[int, ...]) -> None:
    assert distinct_ranks(ParallelConfig(pipeline_model_parallel_size=stages), 8) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=2), r"rank \(2\) must lie in \[0, 2\)"),
        (dict(world_size=3), r"must divide the number of ranks \(3\)"),
        (dict(stage="none"), r"stage \(none\) must be one of ar, block, views, mdlm, sft"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(config(), **(dict(layout=LAYOUTS["tensor"], world_size=2, rank=0, stage="block") | arguments))
