"""Plans of evaluation and decoding as text: memory by rank and part, time, and what it depends on."""

from __future__ import annotations

from dataclasses import fields

from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.planning.decoding import DecodingPlan, cache_bytes
from megatron_dllm.planning.evaluating import EvaluationPlan
from megatron_dllm.planning.forward import ForwardTime
from megatron_dllm.planning.layout_plan import Setting
from megatron_dllm.planning.parameters import pipeline_ranks
from megatron_dllm.planning.screen import GIGA, aligned

_MOST_RANKS = 8
_NAMED_PARTS = 4
_SECONDS_PER_HOUR = 3600.0


def verdict(plan: DecodingPlan | EvaluationPlan, config: PlanConfig, setting: Setting, cluster: str) -> str:
    """The first line: what was planned, and that it fits."""
    nodes = f"{config.nodes} node{'s' if config.nodes > 1 else ''} of {cluster}"
    worst = plan.memory.index(plan.worst) + 1
    return (
        f"{config.run.name}, {config.task}, on {nodes} ({config.num_gpus} GPUs, {setting.capacity / GIGA:g} GB): fits, "
        f"worst rank {plan.worst.total / GIGA:.1f} of {setting.limit / GIGA:.1f} GB (pipeline rank {worst} of "
        f"{len(plan.memory)})"
    )


def memory_lines(plan: DecodingPlan | EvaluationPlan) -> list[str]:
    """Parameters and GB of the pipeline ranks, a line for each part."""
    shown = sorted({*range(min(len(plan.memory), _MOST_RANKS - 1)), len(plan.memory) - 1})
    lines = [["memory", *(f"rank {index + 1}" for index in shown), ""]]
    parameters = [f"{plan.num_parameters[index] / GIGA:.3f}" for index in shown]
    lines.append(["parameters 1e9", *parameters, "formula, exact"])
    for part in (item.name for item in fields(plan.worst)):
        values = [getattr(plan.memory[index], part) / GIGA for index in shown]
        source = "assumed" if part == "reserve" else "formula"
        lines.append([f"{part} GB", *(f"{value:.1f}" for value in values), source])
    lines.append(["total GB", *(f"{plan.memory[index].total / GIGA:.1f}" for index in shown), ""])
    return aligned(lines)


def decoding_lines(plan: DecodingPlan, config: PlanConfig) -> list[str]:
    """Memory, texts and time of a decoding."""
    texts, layers = config.texts, pipeline_ranks(config.model, plan.layout)[0].num_layers
    one = cache_bytes(config.model, plan.layout, layers, texts, 1)
    plural = "s" if plan.replicas > 1 else ""
    asked = "as many as fit" if texts.batch_size is None else f"at most {plan.most_texts} fit"
    return [
        *memory_lines(plan),
        "",
        f"{plan.replicas} replica{plural}, each with {plan.texts} texts at a time ({asked}); a text of "
        f"{texts.length:,} tokens keeps {one / 1e6:.1f} MB of keys and values on the first rank",
        f"a pass over a block of {texts.block_size} of every text: {1000 * plan.pass_time.total:.1f} ms "
        f"({_where(plan.pass_time)}); {plan.num_passes:,.0f} passes a text at {texts.tokens_per_pass:g} tokens a pass",
        f"prompts of {texts.prompt_length:,} tokens: {plan.prefill:.2f} s; {texts.max_new_tokens:,} new tokens: "
        f"{plan.seconds - plan.prefill:.1f} s; {plan.tokens_per_second:,.0f} new tokens a second on all GPUs",
        "",
        *_sources(config, "texts.tokens_per_pass is assumed: generate shows what a model reaches as TPF"),
    ]


def evaluation_lines(plan: EvaluationPlan) -> list[str]:
    """Memory and time of a measurement."""
    lines = [["block size", "micro-batches", "ms each", "minutes", "where the time goes"]]
    for time in plan.times:
        milliseconds, minutes = 1000 * time.micro_batch.total, time.seconds / 60.0
        row = [time.name, f"{time.number:,}", f"{milliseconds:.1f}", f"{minutes:.1f}"]
        lines.append([*row, _where(time.micro_batch)])
    gpu_hours = plan.seconds * plan.num_gpus / _SECONDS_PER_HOUR
    return [
        *memory_lines(plan),
        "",
        *aligned(lines),
        f"together {plan.seconds / 60.0:.1f} minutes, {gpu_hours:.2f} GPU-hours: {plan.num_tokens:,} document tokens",
        f"rows: {plan.times[0].row.source}",
    ]


def _where(time: ForwardTime) -> str:
    """The largest parts of a pass, in percent of it."""
    parts = sorted(time.parts.items(), key=lambda item: -item[1])[:_NAMED_PARTS]
    named = [f"{name} {100 * value / time.total:.0f}%" for name, value in parts if value >= 0.01 * time.total]
    return ", ".join(named)


def _sources(config: PlanConfig, more: str) -> list[str]:
    assumed = config.assumptions
    return [
        f"time: formula; {assumed.product_efficiency:.2f} of rated products, {assumed.memory_efficiency:.2f} of the "
        f"memory's bandwidth, a third of {assumed.host_ms_per_layer:.1f} ms of the host a layer; busiest expert rank "
        f"{assumed.expert_imbalance:g} x the mean",
        more,
    ]
