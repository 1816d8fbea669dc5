"""One case of the step benchmark, in a process of its own: reads it as JSON, prints its result as JSON."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.attention import document_lengths
from benchmarks.step_cases import (
    OURS,
    Documents,
    Variant,
    build,
    build_batch,
    count_pairs,
    draw_documents,
    model_config,
    needed_flops,
    step,
    with_experts_apart,
)
from megatron_dllm.config import ParallelConfig, RunConfig
from megatron_dllm.data.context_shard import take_context_shard
from megatron_dllm.host import prepare_host, quiet_libraries

# Of what is free when a case starts; a case that wants more fails alone and says so.
MEMORY_SHARE = 0.8


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Measure a case; its fields are those of `benchmarks.step.Case`."""
    quiet_libraries()
    logging.disable(logging.WARNING)
    torch.set_num_threads(case["threads"])
    device = torch.device(case["device"])
    if device.type == "cpu":
        limit = int(psutil.virtual_memory().available * MEMORY_SHARE) + psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    prepare_host()
    from megatron_dllm.parallel import groups

    ranks = case.get("ranks", 1)
    layout = ParallelConfig(precision=case["precision"], context_parallel_size=ranks)
    groups.initialize(layout, RunConfig(name="benchmark"))
    try:
        return {"time": measure_time, "memory": measure_memory, "parts": measure_parts}[case["task"]](
            case, layout, device
        )
    finally:
        groups.destroy()


def _documents(case: dict[str, Any], vocab_size: int) -> Documents:
    kind = case["documents"]
    if isinstance(kind, int):
        lengths = [case["length"] // kind] * kind
    else:
        lengths = document_lengths(case["length"], kind)
    return draw_documents(lengths, case["block"], case["views"], vocab_size, case["seed"])


def _prepare(
    case: dict[str, Any], variant: Variant, layout: ParallelConfig, device: torch.device, has_attention: bool = True
) -> tuple[Any, Any, Any]:
    """(model, batch, batch of whole rows)."""
    model = model_config(case["model"], **case["changes"])
    whole = build_batch(
        _documents(case, model.vocab_size),
        variant,
        model.mask_token_id,
        multiple=1 if layout.context_parallel_size == 1 else 128 * layout.context_parallel_size,
    )
    rank = torch.distributed.get_rank()
    batch = take_context_shard(whole, rank, layout.context_parallel_size).to(device)
    return build(model, variant, layout, has_attention), batch, whole


def _share_parameters(built: Any, first: Any) -> None:
    """Let `built` use the weights and gradients of `first`, whether its experts are modules of their own or not."""
    data = with_experts_apart({name: parameter.data for name, parameter in first.named_parameters()})
    grads = with_experts_apart({name: parameter.grad for name, parameter in first.named_parameters()})
    for name, parameter in built.named_parameters():
        parameter.data, parameter.grad = data[name], grads[name]


def _allocate_gradients(built: Any) -> None:
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter)


def _clear_gradients(built: Any) -> None:
    for parameter in built.parameters():
        parameter.grad.zero_()


def _clock(device: torch.device, is_alone: bool) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device.type == "cpu" and is_alone else time.perf_counter()


def _seconds(
    runs: dict[str, Callable[[], Tensor]],
    clear: Callable[[], None],
    repeats: int,
    device: torch.device,
    is_alone: bool = True,
) -> dict[str, float]:
    """The shortest time of each run; the runs take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            clear()
            started = _clock(device, is_alone)
            run()
            best[name] = min(best[name], _clock(device, is_alone) - started)
    return best


def measure_time(case: dict[str, Any], layout: ParallelConfig, device: torch.device) -> dict[str, Any]:
    """Loss, gradients and least time of every variant; on CUDA its peak memory too."""
    variants = {name: Variant(**fields) for name, fields in case["variants"].items()}
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    expected: dict[str, Any] = {}
    first = None
    for name, variant in variants.items():
        built, batch, whole = _prepare(case, variant, layout, device)
        if first is None:
            _allocate_gradients(built)
            first = built
        else:
            _share_parameters(built, first)
        run = step(built, batch, variant)
        results[name] = {
            "forward_tokens": int(whole.num_forward_tokens),
            "visible_pairs": count_pairs(whole),
            "needed_flops": needed_flops(model_config(case["model"], **case["changes"]), whole),
        }
        try:
            results[name] |= _compare(run, first, case, device, expected)
            runs[name] = run
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            results[name]["error"] = "out of memory"
        if device.type == "cuda":
            results[name] |= _measure_on_cuda(runs.pop(name, None), first, case["repeats"], device)
            del built, batch, run
    for name, seconds in _seconds(runs, lambda: _clear_gradients(first), case["repeats"], device).items():
        results[name]["seconds"] = seconds
    return results


def _measure_on_cuda(
    run: Callable[[], Tensor] | None, first: Any, repeats: int, device: torch.device
) -> dict[str, Any]:
    if run is None:
        return {}
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    seconds = _seconds({"": run}, lambda: _clear_gradients(first), repeats, device)[""]
    return {"seconds": seconds, "peak_bytes": peak}


def _compare(
    run: Callable[[], Tensor], first: Any, case: dict[str, Any], device: torch.device, expected: dict[str, Any]
) -> dict[str, float]:
    """Loss and gradient norm, and their distance from the first variant's, which `expected` keeps."""
    _clear_gradients(first)
    loss = float(run())
    norm = float(torch.stack([p.grad.float().norm() for p in first.parameters()]).norm())
    distance = 0.0
    if device.type == "cpu":
        gradient = torch.cat([p.grad.flatten() for p in first.parameters()])
        first_gradient = expected.setdefault("gradient", gradient)
        distance = float((gradient - first_gradient).norm() / first_gradient.norm())
    expected_loss, expected_norm = expected.setdefault("loss", loss), expected.setdefault("norm", norm)
    result = {
        "loss": loss,
        "gradient_norm": norm,
        "loss_difference": abs(loss / expected_loss - 1),
        "gradient_difference": max(distance, abs(norm / expected_norm - 1)),
    }
    tolerance = 1e-4 if case["precision"] == "fp32" else 0.05
    if result["loss_difference"] > tolerance or result["gradient_difference"] > tolerance:
        raise SystemExit(
            f"not the same step: {result}. (Where two experts score alike for a token, rounding decides "
            "which one it goes to, and the gradients of both ways are right: see whether another --seed "
            "differs too.)"
        )
    return result


def measure_memory(case: dict[str, Any], layout: ParallelConfig, device: torch.device) -> dict[str, Any]:
    """Peak resident memory of a step, on top of weights, gradients and the batch."""
    ((name, fields),) = case["variants"].items()
    small = case | {"length": 64, "documents": "one", "block": min(case["block"], 64)}
    built, batch, _ = _prepare(small, Variant(**fields), layout, device)
    _allocate_gradients(built)
    step(built, batch, Variant(**fields))()
    other, batch, _ = _prepare(case, Variant(**fields), layout, device)
    _share_parameters(other, built)
    run = step(other, batch, Variant(**fields))
    Path("/proc/self/clear_refs").write_text("5")  # from here on the high-water mark is this step's
    before = _status("VmRSS")
    try:
        run()
    except (RuntimeError, MemoryError):
        return {name: {"error": "out of memory"}}
    return {name: {"peak_bytes": _status("VmHWM") - before}}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure_parts(case: dict[str, Any], layout: ParallelConfig, device: torch.device) -> dict[str, Any]:
    """Seconds of our step, and of the same step with attention left out."""
    built, batch, whole = _prepare(case, OURS, layout, device)
    _allocate_gradients(built)
    bare, _, _ = _prepare(case, OURS, layout, device, has_attention=False)
    _share_parameters(bare, built)
    runs = {"step": step(built, batch, OURS), "without_attention": step(bare, batch, OURS)}
    if layout.context_parallel_size > 1:
        del runs["without_attention"]
    for run in runs.values():
        run()
    seconds = _seconds(
        runs, lambda: _clear_gradients(built), case["repeats"], device, is_alone=layout.context_parallel_size == 1
    )
    return {"ours": seconds | {"visible_pairs": count_pairs(whole), "forward_tokens": int(whole.num_forward_tokens)}}


def main() -> None:
    """Run the case given as JSON; the result is the last line of the first rank's output."""
    result = run_case(json.loads(sys.argv[1]))
    if int(os.environ.get("RANK", 0)) == 0:
        sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
