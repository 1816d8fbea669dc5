"""Adam on the CPU: time for each parameter and step of torch's three forms and of DeepSpeed's.

    python -m benchmarks.optimizer                          # 1e7 and 1e8 parameters, CPU seconds of one thread
    python -m benchmarks.optimizer --parameters 1e6         # does it run here

fp32 weights, gradients and moments in ten tensors, as the state of `optimizer.offload=cpu` lies in the host's memory.
"default" is what megatron-core takes without TransformerEngine and Apex.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.training.host_adam import State, Update, deepspeed_update, torch_update

GROUP = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
NUM_TENSORS = 10
NOTE = (
    "ns: CPU nanoseconds for each parameter and step, the least of the steps behind the first. distance: of the "
    "weights after all steps from the default's, over how far the default has moved them."
)


def _weights(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(number // NUM_TENSORS, generator=generator) for _ in range(NUM_TENSORS)]


def _gradients(number: int, num_steps: int) -> Iterator[list[Tensor]]:
    """Of each step; two sets take turns, so that they need not be drawn while the clock runs."""
    generator = torch.Generator().manual_seed(1)
    sets = [[torch.randn(number // NUM_TENSORS, generator=generator) for _ in range(NUM_TENSORS)] for _ in range(2)]
    for step in range(num_steps):
        yield sets[step % 2]


def _torchs(**how: Any) -> Callable[[list[Tensor]], Callable[[list[Tensor]], None]]:
    def start(weights: list[Tensor]) -> Callable[[list[Tensor]], None]:
        adam = torch.optim.AdamW(weights, **GROUP, **how)

        def step(gradients: list[Tensor]) -> None:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            adam.step()

        return step

    return start


def _ours(make: Callable[[], Update]) -> Callable[[list[Tensor]], Callable[[list[Tensor]], None]]:
    def start(weights: list[Tensor]) -> Callable[[list[Tensor]], None]:
        update, zeros = make(), torch.zeros
        states: list[State] = [
            {
                "master_param": weight,
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
                "step": zeros(()),
            }
            for weight in weights
        ]
        return lambda gradients: update(states, gradients, GROUP)

    return start


def measure(number: int, num_steps: int) -> list[dict[str, Any]]:
    """A row for each Adam, over so many parameters."""
    ways = {
        "torch, default": _torchs(),
        "torch, foreach": _torchs(foreach=True),
        "torch, fused": _torchs(fused=True),
        "torch, fused, offloaded": _ours(lambda: torch_update),
    }
    if importlib.util.find_spec("deepspeed") is not None:
        ways["DeepSpeed CPUAdam, offloaded"] = _ours(deepspeed_update)
    rows: list[dict[str, Any]] = []
    moved: list[Tensor] = []
    for name, start in ways.items():
        weights = _weights(number)
        step, seconds = start(weights), []
        for gradients in _gradients(number, num_steps):
            began = time.process_time()
            step(gradients)
            seconds.append(time.process_time() - began)
        moved = moved or [weight.clone() for weight in weights]
        rows.append(
            dict(
                parameters=f"{number:.0e}", adam=name, ns=1e9 * min(seconds[1:]) / number, distance=_far(weights, moved)
            )
        )
        print(rows[-1], flush=True)
    return rows


def _far(weights: list[Tensor], moved: list[Tensor]) -> float:
    """Distance of weights from those of the default, over how far these are from the beginning (each a list of [n])."""
    begun = _weights(sum(weight.numel() for weight in weights))
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(weights, moved, strict=True))
    way = sum(float((a - b).double().square().sum()) for a, b in zip(moved, begun, strict=True))
    return float((apart / way) ** 0.5)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e7, 1e8])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "optimizer_cpu", help="without suffix")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for number in args.parameters for row in measure(int(number), args.steps)]
    write_results(args.output, "Adam on the CPU", machine() | dict(steps=args.steps), {"rows": rows}, NOTE)


if __name__ == "__main__":
    main()
