"""What methods cost beside the NLL: by hand, and as the engine runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config import AlignmentConfig, CapConfig, DistillConfig, PreferenceConfig, StageConfig
from megatron_dllm.planning.engine import measure
from megatron_dllm.planning.layout_plan import Candidate, plan_stage
from megatron_dllm.planning.methods import MethodCost, method_cost
from megatron_dllm.planning.work import assumed_work
from tests.planning_case import LAYOUTS, config
from tests.unit.config.configs import stage_config
from tests.unit.planning.setting import setting_for

OWN, OTHER = DistillConfig(1.0), DistillConfig(1.0, "teacher", top_k=8)


@pytest.mark.parametrize(
    ("stage", "num_models", "expected"),
    [
        (stage_config(), 1, MethodCost()),
        (stage_config(), 2, MethodCost()),
        # Scores of the answers: by the model, and by a frozen reference where one lies in memory.
        (stage_config(preference=PreferenceConfig()), 1, MethodCost(forward_passes=1, head_operations=2.0)),
        (stage_config(preference=PreferenceConfig()), 2, MethodCost(forward_passes=2, head_operations=4.0)),
        (stage_config(distill=OWN), 1, MethodCost(head_operations=4.0, has_teacher=True)),
        (stage_config(distill=OTHER, num_views=3), 2, MethodCost(1, 0.25, True, 2.0, True, True)),
        (stage_config(alignment=AlignmentConfig(0.5)), 1, MethodCost(aligned_share=1.0)),
        (stage_config(cap=CapConfig(0.5)), 1, MethodCost(entropy_tensors=1)),
        (stage_config(cap=CapConfig(0.5, temperature=2.0)), 1, MethodCost(entropy_tensors=2)),
        (
            stage_config(alignment=AlignmentConfig(0.5, "teacher", visible=False, masked_layers=0.25)),
            2,
            MethodCost(1, 0.5, True, aligned_share=0.25, is_aligned_before=True),
        ),
    ],
)
def test_what_a_stage_asks_for(stage: StageConfig, num_models: int, expected: MethodCost) -> None:
    assert method_cost(stage, num_models) == expected


def _both(stage: StageConfig) -> tuple[tuple[float, int], tuple[float, int]]:
    """Operations of a step, and bytes of activations and head: of the formula, and of the engine."""
    run, layout = config(), replace(LAYOUTS["one"], precision="bf16")
    run.teacher.checkpoint = "base"
    run.parallel, run.schedule.stages = layout, {"one": stage}
    rates = dict(product_efficiency=1.0, attention_efficiency=1.0, host_ms_per_layer=0.0, expert_imbalance=1.0)
    setting = replace(setting_for(run, **rates), num_models=1 + run.has_second_model)
    (work,) = assumed_work(run, setting.machine.assumptions)
    plan = plan_stage(setting, work, Candidate(layout, 1))
    operations = (plan.time.products + plan.time.attention) * setting.machine.product_rate
    found = measure(run, layout, 1, 0, "one").worst
    assert plan.worst.weights == found.memory.weights
    sizes = [memory.activations + memory.head for memory in (plan.worst, found.memory)]
    return (operations, sizes[0]), (float(found.flops), sizes[1])


@pytest.mark.ranks
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_head_holds_the_entropy_of_confidence_aware_training(temperature: float) -> None:
    """Of a vocabulary so large that a chunk of its logits is the peak: half as much again, or twice as much."""
    run, layout = config(), replace(LAYOUTS["one"], precision="bf16")
    run.model = replace(run.model, vocab_size=32768)
    stage = replace(run.schedule.stages["mdlm"], cap=CapConfig(0.5, temperature=temperature))
    run.parallel, run.schedule.stages = layout, {"one": stage}
    setting = setting_for(run)
    (work,) = assumed_work(run, setting.machine.assumptions)
    planned = plan_stage(setting, work, Candidate(layout, 1)).worst.head
    expected = measure(run, layout, 1, 0, "one").worst.memory.head
    assert planned == pytest.approx(expected, rel=0.1) and planned > 1.3 * 10 * work.row.targets * 32768


@pytest.mark.ranks
@pytest.mark.parametrize(
    "methods",
    [
        dict(distill=DistillConfig(1.0), clean_block_size=1),
        dict(distill=OTHER),
        dict(alignment=AlignmentConfig(1.0, "teacher")),
    ],
    ids=["own teacher", "second teacher", "aligned with a second model"],
)
def test_a_method_costs_what_the_engine_does_for_it(methods: dict[str, object]) -> None:
    """Of 8 micro-batches the engine runs two; a second model's states of one of them lie in memory."""
    plain = replace(config().schedule.stages["block"], global_batch_size=8)
    (operations, size), (expected_operations, expected_size) = _both(plain)
    (more, larger), (expected_more, expected_larger) = _both(replace(plain, **methods))
    assert more / operations == pytest.approx(expected_more / expected_operations, rel=0.1)
    assert expected_larger > 1.2 * expected_size
    assert larger == pytest.approx(expected_larger, rel=0.15) and size == pytest.approx(expected_size, rel=0.15)
