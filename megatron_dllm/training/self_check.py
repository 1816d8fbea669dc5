"""Before a run starts: each fast path that is on, against the plain one, on a tiny input of this device.

A kernel that gives other numbers than its definition trains a wrong model without a word. Some milliseconds on a CPU;
on a GPU what is compiled here would be compiled in the first step anyhow. `model/attention/flex.py` has its own check.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dllm.config import TrainConfig
from megatron_dllm.model.attention.flex import check_gradients
from megatron_dllm.model.dispatch import CopyOrder, combine, permute
from megatron_dllm.model.experts import grouped_experts
from megatron_dllm.model.head import nll_gradient
from megatron_dllm.model.paths import Paths
from megatron_dllm.model.vocabulary_sums import chunk_sums
from megatron_dllm.parallel.agreement import raise_together
from megatron_dllm.training.host_adam import Update, host_update, torch_update

# Sums and products in another order, relative to their norm: what fp32 may differ by.
FP32_TOLERANCE = 1e-5
Function = Callable[..., Any]


def check_together(check: Callable[[], object]) -> None:
    """Have every rank check its own device, and stop all of them where one fails (a collective).

    Args:
        check: of this rank, as `check_paths`.

    Raises:
        ValueError: on every rank, where the check of some rank refuses its device; it names the first of them.
        RuntimeError: on every rank, where the check of some rank breaks down.
    """
    error: Exception | None = None
    try:
        check()
    except ValueError as caught:
        error = ValueError(f"rank {dist.get_rank()} of {dist.get_world_size()}, on {platform.node()}: {caught}")
    except Exception as caught:
        error = caught
    raise_together(error)


def check_paths(paths: Paths, config: TrainConfig, device: torch.device) -> list[str]:
    """Compare what runs with what it stands for; returns what was compared.

    Args:
        paths: that were chosen.
        config: of the run.
        device: of this process.

    Raises:
        ValueError: a path gives other numbers than the plain one.
    """
    dtype = torch.float32 if config.parallel.precision == "fp32" else torch.bfloat16
    checked = []
    if paths.attention.name == "flex" and device.type == "cuda":
        check_gradients(device, dtype, config.model.kv_channels)
        checked.append("attention")
    if paths.experts.name == "grouped":
        check_experts(device, dtype)
        checked.append("experts")
    if paths.experts.name in ("grouped", "sections") and paths.dispatcher.name == "alltoall":
        check_dispatcher(device, dtype)
        checked.append("dispatcher")
    if paths.fusions.name == "compiled":
        check_head(device, dtype)
        checked.append("head")
    if paths.optimizer.name == "offloaded":
        check_adam(host_update(config.optimizer.offload_adam), torch.device("cpu"))
        checked.append("optimizer")
    elif paths.optimizer.name == "torch" and paths.fusions.name == "compiled":
        check_adam(torch_update, device)
        checked.append("optimizer")
    return checked


def check_experts(device: torch.device, dtype: torch.dtype, product: Function | None = None) -> None:
    """The grouped product against one expert after the other, gradients included.

    Args:
        device: of this process.
        dtype: of the model.
        product: takes the place of the grouped product, in a test.

    Raises:
        ValueError: they differ by more than rounding explains.
    """
    sizes = [5, 0, 9, 2]
    shapes = [(sum(sizes), 32), (sum(sizes), 1), (len(sizes), 32, 32), (len(sizes), 32, 16)]

    def grouped(rows: Tensor, probs: Tensor, first: Tensor, second: Tensor) -> Sequence[Tensor]:
        return (grouped_experts(rows, probs, torch.tensor(sizes), first, second),)

    def plain(rows: Tensor, probs: Tensor, first: Tensor, second: Tensor) -> Sequence[Tensor]:
        parts = []
        for part, factor, up, down in zip(
            torch.split(rows, sizes), torch.split(probs, sizes), first, second, strict=True
        ):
            gate, linear = (part @ up.t()).chunk(2, dim=-1)
            parts.append((F.silu(gate) * linear * factor) @ down.t())
        return (torch.cat(parts),)

    compare("experts (grouped)", product or grouped, plain, _random(shapes, device, dtype))


def check_dispatcher(device: torch.device, dtype: torch.dtype, fast: Function | None = None) -> None:
    """Tokens to their experts and back by gathers, against sums over all pairs of token and expert.

    Args:
        device: of this process.
        dtype: of the model.
        fast: takes the place of the gathers, in a test.

    Raises:
        ValueError: they differ by more than rounding explains.
    """
    routing = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    order = CopyOrder.of(routing.to(device), 2)

    def gathers(tokens: Tensor, probs: Tensor) -> Sequence[Tensor]:
        rows, factors = permute(tokens, probs, order)
        return (combine(rows * factors.unsqueeze(-1).to(rows.dtype), order),)

    def plain(tokens: Tensor, probs: Tensor) -> Sequence[Tensor]:
        return (tokens * probs.sum(dim=1, keepdim=True).to(tokens.dtype),)

    compare("dispatcher (gathers)", fast or gathers, plain, _random([(5, 32), (5, 2)], device, dtype))


def check_head(
    device: torch.device, dtype: torch.dtype, sums: Function = chunk_sums, gradient: Function = nll_gradient
) -> None:
    """What the head has fused, a chunk's sums and the gradient of its logits, against softmax in double precision.

    Args:
        device: of this process.
        dtype: of the logits.
        sums: `chunk_sums`, or another in a test.
        gradient: `nll_gradient`, or another in a test.

    Raises:
        ValueError: they differ by more than rounding explains.
    """
    logits = _random([(16, 64)], device, dtype)[0].detach()
    ids = torch.arange(16, device=device) * 4
    exact, factors = logits.double(), torch.linspace(0.5, 2.0, 16, device=device)
    best, _, target, total = sums(logits, ids)
    log_partition = torch.logsumexp(exact, dim=-1)
    nll = best + total.log() - target
    chosen = exact.gather(1, ids.unsqueeze(1)).squeeze(1)
    _refuse_difference("head (fused)", "NLL", nll, log_partition - chosen, torch.float32)
    expected = torch.softmax(exact, dim=-1)
    expected[torch.arange(16, device=device), ids] -= 1.0
    got = gradient(logits, log_partition.float(), ids, factors)
    _refuse_difference("head (fused)", "gradient", got, expected * factors.double().unsqueeze(1), dtype)


def check_adam(update: Update, device: torch.device) -> None:
    """Three steps of an Adam against its formula in double precision.

    Args:
        update: of the Adam that runs.
        device: where the state lies.

    Raises:
        ValueError: they differ by more than rounding explains.
    """
    group = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    weight, *gradients = _random([(64,)] * 4, device, torch.float32)
    weight = weight.detach()
    zeros = torch.zeros_like(weight)
    state = {"master_param": weight.clone(), "exp_avg": zeros.clone(), "exp_avg_sq": zeros.clone()}
    state["step"] = torch.zeros((), device=device)
    expected, mean, square = weight.double(), zeros.double(), zeros.double()
    for number, gradient in enumerate(gradients, start=1):
        update([state], [gradient.detach()], group)
        exact = gradient.detach().double()
        mean, square = 0.9 * mean + 0.1 * exact, 0.95 * square + 0.05 * exact**2
        move = mean / (1 - 0.9**number) / ((square / (1 - 0.95**number)).sqrt() + 1e-8)
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * move
    _refuse_difference("optimizer (Adam)", "weight", state["master_param"], expected, torch.float32)


def compare(name: str, fast: Function, plain: Function, inputs: Sequence[Tensor]) -> None:
    """Compare outputs and gradients of a function with those of its plain form in double precision.

    Args:
        name: of the path, for the refusal.
        fast: what runs.
        plain: what it stands for.
        inputs: [...] each a leaf that requires a gradient, of any shape.

    Raises:
        ValueError: they differ by more than rounding explains.
    """
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    outs, wants = fast(*inputs), plain(*exact)
    grads = [torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape) for out in outs]
    got = torch.autograd.grad(outs, inputs, [grad.to(out.dtype) for grad, out in zip(grads, outs, strict=True)])
    want = torch.autograd.grad(wants, exact, [grad.to(outs[0].dtype).double() for grad in grads])
    dtype = max((tensor.dtype for tensor in inputs), key=lambda kind: torch.finfo(kind).eps)
    for number, (one, other) in enumerate(zip([*outs, *got], [*wants, *want], strict=True)):
        what = "output" if number < len(outs) else f"gradient {number - len(outs) + 1}"
        _refuse_difference(name, what, one, other, dtype)


def _refuse_difference(name: str, what: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Compare a tensor of any shape with the exact one, computed in `dtype`."""
    error = float((got.double() - want).detach().norm() / want.detach().norm())
    tolerance = max(8 * torch.finfo(dtype).eps, FP32_TOLERANCE)
    if not error < tolerance:
        raise ValueError(
            f"{name}: the {what} is off by {error:.1e} on {got.device}, at most {tolerance:.1e} is expected of "
            f"{dtype}; this machine would train a wrong model: try another torch or driver."
        )


def _random(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
