"""Ways to compute a rank's experts, forward and backward: time and memory relative to megatron-core's loop.

    python -m benchmarks.experts                                # on the CPU
    python -m benchmarks.experts --device cuda --dtype bfloat16

All ways compute the same sums from the same weights; that is checked first. CPU times are CPU seconds of one thread:
the ways take turns, and the shortest repetition counts. Memory on CPU counts the tensors that operations return.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import clock, measure_memory
from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.host import prepare_host
from megatron_dllm.parallel.device import DeviceFacts

# (experts, hidden size, inner size, rows, busiest expert over the mean); rows = tokens x experts a token.
CASES = (
    (64, 64, 32, 4096, 1),
    (256, 64, 32, 4096, 1),
    (256, 128, 64, 16384, 6),
    (64, 256, 128, 16384, 1),
    (256, 256, 128, 2048, 1),
)
CUDA_CASES = ((256, 2048, 512, 65536, 1), (256, 2048, 512, 65536, 6))
NOTE = (
    "ratio and peak_ratio are against SequentialMLP of the same case, megatron-core's loop. busiest: tokens of the "
    "busiest expert over the mean. padded: every expert padded to the busiest one."
)


def draw_sizes(num_experts: int, rows: int, busiest: float) -> Tensor:
    """[e] rows of each expert: they fall evenly, the first has `busiest` times the mean; their sum is `rows`."""
    shares = torch.ones(num_experts)
    if busiest > 1:
        shares = torch.arange(1, num_experts + 1).float().pow(-1 + 1 / busiest)
        shares[0] = busiest * shares[1:].sum() / (num_experts - busiest)
    sizes = (shares / shares.sum() * rows).floor().long()
    sizes[-1] += rows - sizes.sum()
    return sizes


def padded_experts(rows: Tensor, probs: Tensor, sizes: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The experts as one batch, each padded to the busiest: [m, h]."""
    expert = torch.arange(len(sizes), device=rows.device).repeat_interleave(sizes)
    place = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[expert]
    slots = expert * int(sizes.max()) + place
    padded = rows.new_zeros(len(sizes) * int(sizes.max()), rows.shape[1]).index_copy(0, slots, rows)
    gate, up = torch.bmm(padded.view(len(sizes), -1, rows.shape[1]), first.transpose(1, 2)).chunk(2, dim=-1)
    out = torch.bmm(F.silu(gate) * up, second.transpose(1, 2))
    return out.flatten(0, 1)[slots] * probs


def build_experts(num_experts: int, hidden: int, inner: int, precision: str, device: str) -> Any:
    """The experts of a layer with random weights, TransformerEngine's left out; process groups must exist."""
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.groups import Groups

    model = ModelConfig(
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=inner,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=hidden // 4,
        vocab_size=64,
        num_moe_experts=num_experts,
        moe_ffn_hidden_size=inner,
        moe_router_topk=2,
        moe_router_num_groups=1,
        moe_router_group_topk=1,
        mask_token_id=2,
        eos_token_id=0,
        pad_token_id=1,
    )
    layout = ParallelConfig(precision=precision)
    paths = choose_paths(model, layout, facts_of(device))
    return build_model(model, layout, Groups.current(), paths=paths).to(device).decoder.layers[0].mlp.experts


def facts_of(device: str) -> DeviceFacts:
    """Those of cpu or cuda, TransformerEngine left out: its layers are compared by its own tests."""
    if device == "cpu":
        return DeviceFacts(is_cuda=False, has_triton=False, has_transformer_engine=False)
    return replace(DeviceFacts.here(), has_transformer_engine=False)


def sequential_like(experts: Any) -> Any:
    """megatron-core's SequentialMLP of the same weights, whose gradients come to those of the two parameters."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    built = SequentialMLP(len(experts.weight1), experts.config, layers, get_default_pg_collection())
    for expert, first, second in zip(built.local_experts, experts.weight1, experts.weight2, strict=True):
        for layer, weight in ((expert.linear_fc1, first), (expert.linear_fc2, second)):
            del layer.weight
            layer.weight = weight
    return built


def ways_of(experts: Any, rows: Tensor, sizes: Tensor, probs: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> forward pass, the base of the ratios first."""
    from megatron_dllm.model.experts import grouped_experts

    first, second = experts.weight1, experts.weight2
    sequential = sequential_like(experts)
    factor = probs.unsqueeze(-1)
    return {
        "SequentialMLP": lambda: sequential(rows, sizes, probs)[0],
        "ours": lambda: experts(rows, sizes, probs)[0],
        "grouped product": lambda: grouped_experts(rows, factor, sizes, first, second),
        "padded": lambda: padded_experts(rows, factor, sizes, first, second),
    }


def measure(case: tuple[int, int, int, int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every way."""
    num_experts, hidden, inner, num_rows, busiest = case
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    sizes = draw_sizes(num_experts, num_rows, busiest).to(device)
    rows, grad = (torch.randn(num_rows, hidden, generator=generator).to(device, dtype) for _ in range(2))
    probs = torch.rand(num_rows, generator=generator).to(device, dtype)
    experts = build_experts(num_experts, hidden, inner, "bf16" if dtype == torch.bfloat16 else "fp32", args.device)
    inputs = (rows.requires_grad_(), probs.requires_grad_(), *experts.parameters())
    ways = ways_of(experts, rows, sizes, probs)
    found: dict[str, dict[str, Any]] = {}
    expected: list[Tensor] = []
    for name, way in ways.items():
        out = way()
        results = [out, *torch.autograd.grad(out, inputs, grad)]
        expected = expected or results
        for result, other in zip(results, expected, strict=True):
            error = float(((result - other).norm() / other.norm().clamp(min=1e-12)).detach())
            if error > (1e-5 if dtype == torch.float32 else 2e-2):
                raise SystemExit(f"{name} is not the same sum: relative difference {error:.1e}")
        peak, kept = measure_memory(way, inputs, grad)
        found[name] = dict(
            experts=num_experts,
            hidden=hidden,
            inner=inner,
            rows=num_rows,
            busiest=busiest,
            way=name,
            milliseconds=float("inf"),
            ratio=None,
            peak_mib=peak / 2**20,
            kept_mib=kept / 2**20,
        )
    for _ in range(args.repeats):
        for name, way in ways.items():
            started = clock(device)
            torch.autograd.grad(way(), inputs, grad)
            found[name]["milliseconds"] = min(found[name]["milliseconds"], 1e3 * (clock(device) - started))
    base = found["SequentialMLP"]
    for row in found.values():
        row["ratio"] = row["milliseconds"] / base["milliseconds"]
        row["peak_ratio"] = row["peak_mib"] / base["peak_mib"]
    return list(found.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="without suffix; default: benchmarks/results/experts_DEVICE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare_host()
    from megatron_dllm.parallel.groups import single_rank

    table: list[dict[str, Any]] = []
    with single_rank(0):
        for case in CASES if args.device == "cpu" else CUDA_CASES:
            table += measure(case, args)
            print(*table[-4:], sep="\n", flush=True)
    write_results(
        args.output or RESULTS / f"experts_{args.device}",
        "Ways to compute the experts",
        machine(torch.device(args.device)) | dict(dtype=args.dtype, repeats=args.repeats),
        {"rows": table},
        NOTE,
    )


if __name__ == "__main__":
    main()
