"""Layouts that train, layouts that are refused, and what is suggested instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from megatron_dllm.config import ParallelConfig, ScheduleConfig, StageConfig
from tests.unit.config.configs import layout_config, model_config, refusal_of, stage_config, train_config

ACCEPTED_LAYOUTS = [
    (1, layout_config()),
    (8, layout_config(tp=2, sequence_parallel=True, pp=2, cp=2)),
    (2, layout_config(tp=2, sequence_parallel=True, etp=2)),
    (2, layout_config(tp=2, sequence_parallel=True, ep=2, etp=1)),
    (4, layout_config(ep=2, etp=2)),
    (8, layout_config(tp=8, sequence_parallel=True)),
    (2, layout_config(pp=2, first=5, last=7)),
    (3, layout_config(pp=3, first=2, last=2)),
    (2, layout_config(pp=2, vpp=3)),
    (2, layout_config(pp=2, vpp=2, first=4)),
    (8, layout_config(cp=8, context_parallel_method="ulysses")),
    (4, layout_config(tp=2, sequence_parallel=True, cp=2, context_parallel_method="ulysses")),
    (16, layout_config(ep=16)),
    (2, layout_config(ep=2, precision="bf16", moe_token_dispatcher="flex", moe_flex_dispatcher_backend="hybridep")),
]


@pytest.mark.parametrize(("world_size", "layout"), ACCEPTED_LAYOUTS)
def test_layouts_that_train_are_accepted(world_size: int, layout: ParallelConfig) -> None:
    train_config(parallel=layout).validate(world_size)


def test_dense_models_need_no_sequence_parallelism() -> None:
    model = model_config(num_moe_experts=0, num_dense_layers=0, moe_shared_expert_intermediate_size=0)
    train_config(model=model, parallel=layout_config(tp=2)).validate(2)


# World size, layout, changes to the model, and what the message must say: the name with its value, and the remedy.
REFUSED_LAYOUTS = [
    (
        2,
        layout_config(tp=2, sequence_parallel=True, etp=1),
        {},
        ("expert_tensor_parallel_size (1)", "train wrongly", "set it to 2 or use expert parallelism"),
    ),
    (2, layout_config(etp=2), {}, ("expert_tensor_parallel_size (2)", "train wrongly", "set it to 1")),
    (2, layout_config(tp=2), {}, ("sequence_parallel (false)", "mixture of experts", "set it to true")),
    (1, layout_config(sequence_parallel=True), {}, ("sequence_parallel (true)", "above 1", "set it to false")),
    (
        3,
        layout_config(tp=3),
        dict(num_moe_experts=0),
        ("tensor_model_parallel_size (3)", "num_attention_heads (8)", "tensor_model_parallel_size=1"),
    ),
    (
        4,
        layout_config(tp=4, sequence_parallel=True),
        dict(ffn_hidden_size=90),
        ("tensor_model_parallel_size (4)", "ffn_hidden_size (90)", "works: parallel.tensor_model_parallel_size=2"),
    ),
    (
        4,
        layout_config(tp=4, sequence_parallel=True),
        dict(vocab_size=190),
        ("tensor_model_parallel_size (4)", "vocab_size (190)", "works: parallel.tensor_model_parallel_size=2"),
    ),
    (
        4,
        layout_config(tp=4, sequence_parallel=True),
        dict(moe_shared_expert_intermediate_size=30),
        (
            "tensor_model_parallel_size (4)",
            "moe_shared_expert_intermediate_size (30)",
            "works: parallel.tensor_model_parallel_size=2",
        ),
    ),
    (
        4,
        layout_config(tp=4, sequence_parallel=True),
        dict(num_attention_heads=24, num_query_groups=6),
        ("tensor_model_parallel_size (4)", "num_query_groups (6)", "works: parallel.tensor_model_parallel_size=2"),
    ),
    (
        2,
        layout_config(tp=2, sequence_parallel=True, etp=2),
        dict(moe_ffn_hidden_size=33),
        ("expert_tensor_parallel_size (2)", "moe_ffn_hidden_size (33)", "expert_tensor_parallel_size=1"),
    ),
    (
        5,
        layout_config(pp=5),
        {},
        ("pipeline_model_parallel_size (5", "12 of 12", "num_layers_in_first_pipeline_stage=3"),
    ),
    (2, layout_config(pp=2, vpp=4), {}, ("virtual 4", "12 of 12", "virtual_pipeline_model_parallel_size=3")),
    (2, layout_config(pp=2, first=5, last=6), {}, ("(5, 6)", "add up to model.num_layers (12)")),
    (2, layout_config(pp=2, first=0), {}, ("num_layers_in_first_pipeline_stage (0)", "positive", "null")),
    (
        2,
        layout_config(pp=2, vpp=2, last=3),
        {},
        ("num_layers_in_last_pipeline_stage (3)", "virtual stages (2)", "null"),
    ),
    (
        2,
        layout_config(pp=2, vpp=2, first=4, last=8),
        {},
        ("num_layers_in_last_pipeline_stage (8)", "virtual stages (2)", "null", "takes the rest"),
    ),
    (1, layout_config(first=3), {}, ("num_layers_in_first_pipeline_stage (3)", "above 1", "null")),
    (1, layout_config(vpp=2), {}, ("virtual_pipeline_model_parallel_size (2)", "above 1", "null")),
    (2, layout_config(pp=2, vpp=1), {}, ("virtual_pipeline_model_parallel_size (1)", "above 1", "null")),
    (
        3,
        layout_config(ep=3),
        {},
        ("expert_model_parallel_size (3)", "num_moe_experts (16)", "expert_model_parallel_size=1"),
    ),
    (2, layout_config(ep=2), dict(num_moe_experts=0), ("expert_model_parallel_size (2)", "experts", "set it to 1")),
    (2, layout_config(ep=4), {}, ("expert x expert-tensor x pipeline (4 x 1 x 1 = 4)", "ranks (2)", "multiple of 4")),
    (2, layout_config(ep=2, etp=0), {}, ("expert_tensor_parallel_size (0)", "positive")),
    (6, layout_config(cp=4), {}, ("(1 x 1 x 4 = 4)", "ranks (6)", "multiple of 4")),
    (1, layout_config(tp=0), {}, ("tensor_model_parallel_size (0)", "positive")),
    (
        16,
        layout_config(cp=16, context_parallel_method="ulysses"),
        {},
        ("context_parallel_size (16)", "8 attention heads", "or gather", "context_parallel_size=8"),
    ),
    (1, layout_config(context_parallel_method="ring"), {}, ("context_parallel_method (ring)", "gather, ulysses")),
    (1, layout_config(moe_token_dispatcher="ring"), {}, ("moe_token_dispatcher (ring)", "alltoall")),
    (1, layout_config(moe_flex_dispatcher_backend="nvshmem"), {}, ("backend (nvshmem)", "deepep, hybridep")),
    (1, layout_config(precision="fp16"), {}, ("precision (fp16)", "fp32, bf16, fp8")),
    (1, layout_config(recompute="some"), {}, ("recompute (some)", "none, selective, full")),
]


@pytest.mark.parametrize(("world_size", "layout", "model", "parts"), REFUSED_LAYOUTS)
def test_layouts_that_do_not_train_are_refused(
    world_size: int, layout: ParallelConfig, model: dict[str, object], parts: tuple[str, ...]
) -> None:
    message = refusal_of(lambda: train_config(model=model_config(**model), parallel=layout).validate(world_size))
    for part in parts:
        assert part in message
    if "is not known" not in message:  # a choice by name: the message lists them
        train_config(model=model_config(**model), parallel=_suggested(message, layout)).validate(world_size)


def test_what_deepeps_kernels_cannot_do_is_refused() -> None:
    flex = layout_config(ep=2, precision="bf16", moe_token_dispatcher="flex")
    flex.validate_choices()
    exact = refusal_of(lambda: train_config(parallel=replace(flex, precision="fp32")).validate(2))
    assert "precision (fp32) is more; use precision bf16, or the dispatcher auto." in exact
    alone = refusal_of(lambda: train_config(parallel=replace(flex, expert_model_parallel_size=1)).validate(1))
    assert alone.startswith("parallel.moe_token_dispatcher (flex) needs") and alone.endswith(
        "(1 x 1) is one; use auto."
    )


def _suggested(message: str, layout: ParallelConfig) -> ParallelConfig:
    """The layout with what a message says to change."""
    words = message.split(" ranks this works: ")[1].split()
    changes = dict(word.removeprefix("parallel.").split("=") for word in words)
    return replace(layout, **{name: yaml.safe_load(value) for name, value in changes.items()})


def test_a_suggested_layout_suits_every_stage_that_shares_it() -> None:
    stages = {
        "one": stage_config(global_batch_size=8),
        "two": stage_config(global_batch_size=4),
        "own": stage_config(parallel=layout_config()),
    }
    config = train_config(
        model=model_config(ffn_hidden_size=90),
        parallel=layout_config(tp=4, sequence_parallel=True),
        schedule=ScheduleConfig(context_length=256, stages=stages),
    )
    message = refusal_of(lambda: config.validate(8))
    assert message.endswith("On 8 ranks this works: parallel.tensor_model_parallel_size=2"), message
    assert "On 13 ranks no layout works" in refusal_of(lambda: config.validate(13))


def test_row_must_divide_among_tensor_and_context_ranks() -> None:
    schedule = ScheduleConfig(context_length=256, row_length=516, stages={"one": stage_config()})
    layout = layout_config(tp=2, sequence_parallel=True, cp=4)
    message = refusal_of(lambda: train_config(schedule=schedule, parallel=layout).validate(8))
    assert "row_length (516)" in message and "(8)" in message and "use 520" in message
    assert message.endswith("On 8 ranks this works: parallel.context_parallel_size=2")


@pytest.mark.parametrize(
    ("layout", "world_size", "stage", "parts"),
    [
        (layout_config(), 3, stage_config(), ("global_batch_size (16)", "3 x 1 = 3", "use 15 or 18")),
        (layout_config(), 2, stage_config(micro_batch_size=3), ("micro_batch_size (3)", "global_batch_size (16)")),
        (
            layout_config(pp=2, vpp=2),
            2,
            stage_config(global_batch_size=3),
            ("global_batch_size (3)", "gives 3", "use 2 or 4"),
        ),
    ],
)
def test_batches_must_divide_among_ranks(
    layout: ParallelConfig, world_size: int, stage: StageConfig, parts: tuple[str, ...]
) -> None:
    schedule = ScheduleConfig(context_length=256, stages={"one": stage})
    message = refusal_of(lambda: train_config(schedule=schedule, parallel=layout).validate(world_size))
    for part in parts:
        assert part in message


def test_sizes_of_a_layout() -> None:
    layout = layout_config(tp=2, pp=2, cp=2)
    assert layout.model_parallel_size == 8
    assert layout.data_parallel_size(32) == 4
