"""Time and memory of the attention backends, forward and backward, relative to a dense mask in the same run.

    python -m benchmarks.attention                                  # all of it; long
    python -m benchmarks.attention --lengths 1024 --blocks 32       # quick

A row is [x_t; x_0]: every document with one noisy view and its whole clean copy, 2 x length tokens. The limit
beside the ratios is the share of (query, key) pairs that the mask allows. The last line of a mask is torch's causal
attention of one sequence with as many visible pairs, which needs no mask: the pace that its kernel can reach. CPU
times are CPU seconds; on CUDA, wall seconds of several passes that the device computes one after the other without
waiting for the host, divided by their number. The backends take turns, and the shortest repetition counts. Memory on
CPU counts the tensors that torch operations return, not what kernels use inside.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.diffusion.roles import visible_keys
from megatron_dllm.model.attention.backends import BACKENDS

NOTE = (
    "ratio and peak_ratio are against the first backend of the same mask; limit is the share of visible pairs. "
    "causal: torch's causal attention of one sequence with as many visible pairs; causal_pace: its time over the "
    "backend's. causal_flash: the same by torch's flash kernel, where torch would choose another. tflops_s counts "
    "visible pairs and 3 times the forward pass."
)
CAUSAL, CAUSAL_FLASH = "causal", "causal_flash"
CUDA_PASSES = 10


class LiveMemory(TorchDispatchMode):
    """Bytes of all live tensors that operations have returned, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.known: set[StorageWeakRef] = set()
        self.peak = 0

    def ignore(self, *tensors: Tensor) -> None:
        """Do not count these tensors: they exist anyway."""
        self.known.update(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)

    def now(self) -> int:
        """Bytes alive at present."""
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        return sum(self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and count what it returned."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref not in self.known:
                    self.storages[ref] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now())
        return result


def document_lengths(length: int, kind: str, seed: int = 0) -> list[int]:
    """One document, or log-normal lengths (mean length / 8, sigma 1) cut to add up to `length`."""
    if kind == "one":
        return [length]
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < length:
        size = int(torch.exp(torch.randn((), generator=generator)) * length / 8 * 0.607)
        lengths.append(min(max(size, 1), length - sum(lengths)))
    return lengths


def build_roles(lengths: list[int], block: int) -> Tensor:
    """Roles [1, 2 * sum(lengths), 3] int32 of documents laid out as [noisy; clean] each."""
    rows = []
    for doc, size in enumerate(lengths):
        for view in (1, 0):
            rows.append(
                torch.stack([torch.full((size,), doc), torch.arange(size) // block, torch.full((size,), view)], dim=1)
            )
    return torch.cat(rows).int().unsqueeze(0)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(device: torch.device) -> float:
    """Seconds: of this process on CPU (other processes do not count), of the wall on CUDA after it is done."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def measure_memory(run: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[int, int]:
    """Peak bytes of a forward and backward pass, and the bytes kept between the two, output included."""
    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run()
        kept = torch.cuda.memory_allocated() - before
        torch.autograd.grad(out, inputs, grad)
        return torch.cuda.max_memory_allocated() - before, kept
    with LiveMemory() as memory:
        memory.ignore(*inputs, grad)
        out = run()
        kept = memory.now()
        grads = torch.autograd.grad(out, inputs, grad)
        assert all(tensor is not None for tensor in grads)
    return memory.peak, kept


@dataclass(frozen=True)
class Run:
    """Attention to be measured: its forward pass, inputs, and the gradient of its output."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    grad: Tensor

    def step(self) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.forward(), self.inputs, self.grad)


def causal_run(
    pairs: int, inputs: tuple[Tensor, ...], grad: Tensor, kernel: torch.nn.attention.SDPBackend | None = None
) -> Run:
    """Causal attention, heads as in `inputs`, over one sequence of n tokens with n (n + 1) / 2 nearest to `pairs`.

    No mask of a row [x_t; x_0] has so many that n would be longer than the row. `kernel` None: torch's own choice.
    """
    length = round(((8 * pairs + 1) ** 0.5 - 1) / 2)
    inputs = tuple(tensor.detach()[:, :, :length].contiguous().requires_grad_() for tensor in inputs)
    query, key, value = inputs

    def forward() -> Tensor:
        with contextlib.nullcontext() if kernel is None else torch.nn.attention.sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
            )

    return Run(forward, inputs, grad[:, :, :length].contiguous())


def seconds_of(run: Run, device: torch.device) -> float:
    """One forward and backward pass; on CUDA the mean of several, so that the host's own time is hidden."""
    passes = CUDA_PASSES if device.type == "cuda" else 1
    started = clock(device)
    for _ in range(passes):
        run.step()
    return (clock(device) - started) / passes


def measure(args: argparse.Namespace, length: int, documents: str, block: int, device: torch.device) -> list[dict]:
    """All backends on one mask: a list of table rows."""
    roles = build_roles(document_lengths(length, documents), block).to(device)
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    query, grad = (torch.randn(1, args.heads, 2 * length, args.head_dim, generator=generator) for _ in range(2))
    key, value = (torch.randn(1, args.groups, 2 * length, args.head_dim, generator=generator) for _ in range(2))
    inputs = tuple(tensor.to(device, dtype).requires_grad_() for tensor in (query, key, value))
    grad = grad.to(device, dtype)
    pairs = int(visible_keys(roles[0].cpu().numpy()).sum())
    flops = 3 * 4 * pairs * args.heads * args.head_dim
    scale = args.head_dim**-0.5
    runs: dict[str, Run] = {}
    rows: dict[str, dict] = {}
    for backend in args.backends:
        module = BACKENDS[backend]
        started = clock(device)
        plan = module.build_plan(roles, roles)
        plan_seconds = clock(device) - started
        run = Run(lambda module=module, plan=plan: module.attend(*inputs, plan, scale), inputs, grad)
        runs[backend], rows[backend] = run, {"plan_seconds": plan_seconds}
    runs[CAUSAL], rows[CAUSAL] = causal_run(pairs, inputs, grad), {"plan_seconds": 0.0}
    if device.type == "cuda" and dtype != torch.float32:
        flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
        runs[CAUSAL_FLASH], rows[CAUSAL_FLASH] = causal_run(pairs, inputs, grad, flash), {"plan_seconds": 0.0}
    for backend, run in runs.items():
        run.step()
        peak, kept = measure_memory(run.forward, run.inputs, run.grad)
        rows[backend] = (
            dict(
                length=length,
                documents=documents,
                block=block,
                limit=pairs / (2 * length) ** 2,
                backend=backend,
                seconds=float("inf"),
            )
            | rows[backend]
            | dict(peak_mib=peak / 2**20, kept_mib=kept / 2**20)
        )
    for _ in range(args.repeats):
        for backend, run in runs.items():
            rows[backend]["seconds"] = min(rows[backend]["seconds"], seconds_of(run, device))
    base = rows[args.backends[0]]
    for row in rows.values():
        row["ratio"] = row["seconds"] / base["seconds"]
        row["ratio_over_limit"] = row["ratio"] / row["limit"]
        row["peak_ratio"] = row["peak_mib"] / base["peak_mib"]
        row["tflops_s"] = flops / row["seconds"] / 1e12
        row["causal_pace"] = rows[CAUSAL]["seconds"] / row["seconds"]
    return list(rows.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="context lengths")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 32, 512, 0], help="block sizes; 0: the length")
    parser.add_argument("--documents", nargs="+", default=["one", "lognormal"], choices=["one", "lognormal"])
    parser.add_argument("--backends", nargs="+", choices=sorted(BACKENDS), help="the first is the base of the ratios")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="without suffix; default: benchmarks/results/attention_DEVICE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.backends is None:
        args.backends = ["dense", "flex"] if device.type == "cuda" else ["dense", "chunked", "shared_prefix"]
    output = args.output or RESULTS / f"attention_{device.type}"
    about = machine(device) | dict(
        heads=args.heads, groups=args.groups, head_dim=args.head_dim, dtype=args.dtype, repeats=args.repeats
    )
    rows: list[dict] = []
    for length in args.lengths:
        for documents in args.documents:
            for block in dict.fromkeys(block or length for block in args.blocks):
                if block > length:
                    continue
                measured = measure(args, length, documents, block, device)
                rows += measured
                for row in measured:
                    print(row, flush=True)
                write_results(output, "Attention backends, forward and backward", about, {"rows": rows}, NOTE)


if __name__ == "__main__":
    main()
