"""What is there: the card, the driver, the packages, and the two ceilings that everything else is measured by."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.attention import synchronize
from benchmarks.gpu.settings import Settings

PACKAGES = (
    "megatron-core", "triton", "transformer-engine", "flash-attn", "apex", "deepspeed", "transformers", "tokenizers",
    "safetensors", "numpy", "hydra-core", "wandb", "tensorboard",
)  # fmt: skip
COPY_BYTES, PRODUCT_SIZE = {False: 2**32, True: 2**22}, {False: 8192, True: 256}


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Name, value and unit of each fact."""
    yield from (_row(name, value) for name, value in _software().items())
    yield from (_row(name, value) for name, value in _card(settings.device).items())
    device = torch.device(settings.device)
    yield _row("copy", copy_rate(device, COPY_BYTES[settings.is_small]), "GB/s, bytes read and written")
    for dtype in (torch.bfloat16, torch.float32):
        rate = product_rate(device, dtype, PRODUCT_SIZE[settings.is_small])
        yield _row(f"matrix product {str(dtype).removeprefix('torch.')}", rate, "TFLOP/s")


def _row(name: str, value: float | str, unit: str = "") -> dict[str, Any]:
    return {"fact": name, "value": value, "unit": unit}


def _software() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _card(device: str) -> dict[str, str]:
    if device == "cpu":
        return {"device": f"CPU, {torch.get_num_threads()} threads"}
    properties = torch.cuda.get_device_properties(0)
    found = {
        "device": properties.name,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "cuDNN": str(torch.backends.cudnn.version()),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
        found["driver, largest clock, power limit"] = done.stdout.strip().splitlines()[0] if done.stdout else "unknown"
    return found


def seconds_per_call(run: Callable[[], Any], device: torch.device, calls: int = 10) -> float:
    """Mean seconds of one call, after two that do not count."""
    for _ in range(2):
        run()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """GB/s of a copy on the device, counting bytes read and written."""
    source = torch.randint(255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_per_call(lambda: target.copy_(source), device) / 1e9


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of the product of two square matrices of random numbers."""
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_per_call(lambda: torch.mm(first, second), device) / 1e12
