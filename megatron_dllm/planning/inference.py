"""Whether a model can be evaluated, or can decode, on a number of GPUs; and the layout that does it fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from megatron_dllm.config import ParallelConfig
from megatron_dllm.config.nearest_layout import as_overrides
from megatron_dllm.config.placement import PlacementConfig
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.planning.decoding import DecodingPlan, plan_decoding
from megatron_dllm.planning.evaluating import EvaluationPlan, plan_evaluation
from megatron_dllm.planning.inference_screen import decoding_lines, evaluation_lines, verdict
from megatron_dllm.planning.layout_plan import Setting
from megatron_dllm.planning.run_plan import setting_of
from megatron_dllm.planning.search import layouts

_GIGA = 1e9
# A layout is worth a line from this gain on.
_WORTH = 1.03
_Plan = TypeVar("_Plan", DecodingPlan, EvaluationPlan)


def validated_layout(config: PlanConfig) -> ParallelConfig:
    """The layout in which the task runs: for decoding as `generate` makes it of the same sizes.

    Raises:
        ValueError: the model cannot be split so, or not over so many GPUs.
    """
    layout = replace(config.parallel, precision="fp32" if config.parallel.precision == "fp32" else "bf16")
    layout.validate(config.num_gpus, config.model)
    if config.task == "evaluate":
        return layout
    placement = PlacementConfig(
        precision=layout.precision,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
    )
    placement.validate_placement()
    return placement.layout(config.model, config.num_gpus, is_cuda=True)


def plan_inference(config: PlanConfig, cluster: str) -> str:
    """The screen of the task.

    Args:
        config: of task evaluate or generate.
        cluster: name of the cluster's recipe.

    Raises:
        ValueError: a layout that cannot be, or that does not fit.
    """
    setting = setting_of(config)
    layout = validated_layout(config)
    where = (config, setting, cluster)
    if config.task == "generate":
        decoding = plan_decoding(setting, layout, config.num_gpus, config.texts)
        fastest = _best(config, setting, _decoding(config, setting), lambda plan: plan.tokens_per_second)
        return _answer(*where, decoding, fastest, decoding_lines(decoding, config), lambda plan: plan.tokens_per_second)
    evaluation = plan_evaluation(replace(config, parallel=layout), setting)
    quickest = _best(config, setting, _evaluations(config, setting), lambda plan: 1.0 / plan.seconds)
    return _answer(*where, evaluation, quickest, evaluation_lines(evaluation), lambda plan: 1.0 / plan.seconds)


def _answer(
    config: PlanConfig,
    setting: Setting,
    cluster: str,
    plan: _Plan,
    best: _Plan | None,
    lines: list[str],
    speed: Callable[[_Plan], float],
) -> str:
    """The screen, or the sentence of a plan that does not fit."""
    fits = plan.worst.total <= setting.limit
    words = "" if best is None else as_overrides(config.parallel, best.layout, "parallel")
    if not fits:
        remedy = f"on these GPUs this fits: {words}." if words else "no layout fits on these GPUs; give more nodes."
        raise ValueError(
            f"parallel needs {plan.worst.total / _GIGA:.1f} GB on a GPU to {config.task}, of them "
            f"{plan.worst.weights / _GIGA:.1f} GB weights, and the limit is {setting.limit / _GIGA:.1f} GB; {remedy}"
        )
    found = [verdict(plan, config, setting, cluster), "", *lines]
    if words and best is not None and speed(best) > _WORTH * speed(plan):
        found += ["", f"faster: {words} ({speed(best) / speed(plan):.2f} x as fast, {best.worst.total / _GIGA:.1f} GB)"]
    return "\n".join(found)


def _layouts(config: PlanConfig) -> Iterator[ParallelConfig]:
    """What `generate` and `evaluate` can run on the GPUs, without context ranks and pieces of pipeline ranks."""
    wish = replace(config.parallel, recompute="none", context_parallel_size=1)
    for layout in layouts(config.model, wish, config.num_gpus, config.cluster.num_ranks_per_node):
        is_split = layout.virtual_pipeline_model_parallel_size or layout.num_layers_in_last_pipeline_stage
        if layout.context_parallel_size > 1 or is_split:
            continue
        try:
            yield validated_layout(replace(config, parallel=layout))
        except ValueError:
            continue


def _decoding(config: PlanConfig, setting: Setting) -> Iterator[DecodingPlan]:
    for layout in _layouts(config):
        yield plan_decoding(setting, layout, config.num_gpus, config.texts)


def _evaluations(config: PlanConfig, setting: Setting) -> Iterator[EvaluationPlan]:
    for layout in _layouts(config):
        yield plan_evaluation(replace(config, parallel=layout), setting)


def _best(
    config: PlanConfig, setting: Setting, plans: Iterator[_Plan], speed: Callable[[_Plan], float]
) -> _Plan | None:
    """The fastest of those that fit."""
    return max((plan for plan in plans if plan.worst.total <= setting.limit), key=speed, default=None)
