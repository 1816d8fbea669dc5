"""A whole training step of a real model's first layers, optimizer included, and where its time goes.

The model has the sizes of Ling-mini-2.0 and as many layers as leave room for weights, gradients and Adam's states; the
batch is block diffusion with two complementary views in blocks of 32. TFLOP/s counts what the loss depends on and
nothing else (see `benchmarks.step_cases.needed_flops`); MFU is its share of the device's dense bf16 rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.attention import document_lengths, synchronize
from benchmarks.gpu.settings import Settings
from benchmarks.step import PEAK_TFLOPS
from benchmarks.step_cases import OURS, build_batch, draw_documents, model_config, needed_flops
from megatron_dllm.config import NoiseConfig, OptimizerConfig, ParallelConfig, RunConfig, StageConfig, TrainConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.host import prepare_host, quiet_libraries

BLOCK, VIEWS = 32, 2
# Layers of the model on a card of 80 GB; dense first layer, then experts.
LAYERS = 4
LENGTHS, SMALL_LENGTHS = (8192, 4096, 16384), (128, 64)
SMALL_MODEL = dict(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    vocab_size=512, num_moe_experts=8, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32,
    moe_router_topk=2, moe_router_num_groups=2, moe_router_group_topk=1, mask_token_id=2, eos_token_id=0,
    pad_token_id=1,
)  # fmt: skip
# Operations that the model is made of; everything else moves or rearranges what they compute.
ESSENTIAL = ("flex_attention", "aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "scaled_dot_product")
NUM_OPERATIONS, NUM_WASTES = 24, 3
# What the profiler itself does.
NOT_OPERATIONS = ("Command Buffer Full", "Activity Buffer Request")


@dataclass(frozen=True)
class Subject:
    """What is measured: one step on one batch.

    Attributes:
        run: a training step.
        update: gradient norm and optimizer alone.
        batch: of the step.
        flops: that its loss depends on.
    """

    run: Callable[[], Any]
    update: Callable[[], Any]
    batch: Batch
    flops: float


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Speed at each length, and the profile of the first."""
    quiet_libraries()
    device = torch.device(settings.device)
    config = train_config(settings)
    subject_of = start(config, device)
    lengths = SMALL_LENGTHS if settings.is_small else LENGTHS
    for length in lengths:
        if settings.is_over():
            yield {"what": f"step of {length} tokens", "status": "skipped"}
            continue
        try:
            subject = subject_of(length)
            yield speed_row(subject, length, device)
        except torch.cuda.OutOfMemoryError as error:
            yield {"what": f"step of {length} tokens", "status": "failed", "why": str(error)[:200]}
            continue
        if length == lengths[0]:
            yield from profile_rows(subject, device)
        del subject
    torch.distributed.destroy_process_group()


def train_config(settings: Settings) -> TrainConfig:
    """The real model's first layers on one rank; in small, a tiny one."""
    changes = SMALL_MODEL if settings.is_small else {"num_layers": LAYERS}
    return TrainConfig(
        model=model_config("llada2_mini", **changes),
        parallel=ParallelConfig(precision="bf16" if settings.device == "cuda" else "fp32"),
        optimizer=OptimizerConfig(),
        run=RunConfig(name="step"),
    )


def start(config: TrainConfig, device: torch.device) -> Callable[[int], Subject]:
    """Build the model and its optimizer: a function from the document tokens of a step to what is measured."""
    prepare_host()
    from megatron_dllm.model.objective import objective_of
    from megatron_dllm.model.pipeline import EmbeddingNoise
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.gradient_norm import gradient_norm
    from megatron_dllm.training.parameter_rates import set_learning_rate
    from megatron_dllm.training.step import train_step

    engine = build_engine(config, groups.initialize(config.parallel, config.run))
    set_learning_rate(engine.optimizer, 1e-5)
    stage = StageConfig(block_size=BLOCK, num_tokens=1, global_batch_size=1, micro_batch_size=1, learning_rate=1e-5)
    objective = objective_of(stage, NoiseConfig())

    def update() -> None:
        engine.optimizer.prepare_grads()
        gradient_norm(engine.optimizer)
        engine.optimizer.step_with_ready_grads()

    def subject_of(length: int) -> Subject:
        lengths = document_lengths(length, "lognormal")
        documents = draw_documents(lengths, min(BLOCK, length), VIEWS, config.model.vocab_size)
        batch = build_batch(documents, OURS, config.model.mask_token_id)
        if device.type == "cuda":
            batch = batch.pin_memory()
        return Subject(
            lambda: train_step(engine, [batch], device, objective, EmbeddingNoise()),
            update,
            batch,
            needed_flops(config.model, batch),
        )

    return subject_of


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The shortest of several calls."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def speed_row(subject: Subject, length: int, device: torch.device) -> dict[str, Any]:
    """Tokens a second, needed operations a second and the peak of memory of one step."""
    started = time.perf_counter()
    result = subject.run()
    first = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(subject.run, device)
    update = _seconds(subject.update, device)
    tflops = subject.flops / seconds / 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    return {
        "what": f"step of {length} tokens",
        "status": "ok" if result.is_applied else "failed",
        "ms": 1e3 * seconds,
        "document tokens/s": length / seconds,
        "forward tokens": int(subject.batch.num_forward_tokens),
        "TFLOP/s needed": tflops,
        "MFU": tflops / peak if peak else None,
        "ms of norm and optimizer": 1e3 * update,
        "MFU without optimizer": subject.flops / (seconds - update) / 1e12 / peak if peak else None,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "s of first step": first,
    }


def profile_rows(subject: Subject, device: torch.device) -> Iterator[dict[str, Any]]:
    """The operations that take the most time of a step, what share is essential, and the largest wastes by name."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    synchronize(device)
    started = time.perf_counter()
    with profile(activities=activities) as found:
        subject.run()
        synchronize(device)
    wall = 1e3 * (time.perf_counter() - started)
    times = operation_times(found, is_cuda)
    busy = sum(ms for ms, _ in times.values())
    essential = sum(ms for name, (ms, _) in times.items() if is_essential(name))
    yield _share_row("profiled step, the host waits for the profiler too", wall, wall)
    yield _share_row("all operations", busy, busy)
    yield _share_row("attention and matrix products", essential, busy)
    ordered = sorted(times.items(), key=lambda item: -item[1][0])
    for name, (ms, calls) in ordered[:NUM_OPERATIONS]:
        yield _share_row(name, ms, busy) | {"calls": calls}
    wastes = [(name, ms) for name, (ms, _) in ordered if not is_essential(name)]
    for rank, (name, ms) in enumerate(wastes[:NUM_WASTES], 1):
        yield _share_row(f"waste {rank}: {name}", ms, busy)


def operation_times(found: profile, is_cuda: bool) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of every operation that computes something: of the device where there is one."""
    times = {}
    for event in found.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU or event.key in NOT_OPERATIONS:
            continue
        micro = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if micro > 0:
            times[event.key] = (micro / 1e3, event.count)
    return times


def is_essential(name: str) -> bool:
    """Whether an operation is one of those that the model is made of."""
    return any(key in name for key in ESSENTIAL)


def _share_row(what: str, ms: float, busy: float) -> dict[str, Any]:
    return {"what": what[:90], "status": "ok", "ms": ms, "share": ms / busy if busy else None}
