"""The device on which this rank computes, and what is known about it before anything is decided."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch.utils._triton import has_triton

from megatron_dllm.parallel.packages import Packages


@dataclass(frozen=True)
class DeviceFacts:
    """What decides which implementations can run.

    Attributes:
        is_cuda: the device is an NVIDIA GPU, else the CPU.
        has_triton: Triton compiles for this device.
        has_transformer_engine: TransformerEngine is installed.
        packages: optional ones that are installed.
        capability: compute capability of the GPU; (0, 0) without one.
    """

    is_cuda: bool
    has_triton: bool
    has_transformer_engine: bool
    packages: Packages = field(default_factory=Packages)
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def here(cls) -> DeviceFacts:
        """Of this process's device."""
        packages = Packages.here()
        return cls(
            is_cuda=torch.cuda.is_available(),
            has_triton=has_triton(),
            has_transformer_engine=packages.transformer_engine is not None,
            packages=packages,
            capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0),
        )

    @classmethod
    def as_cuda(cls, has_transformer_engine: bool = True) -> DeviceFacts:
        """Of a GPU node as it is usually installed, asked on any machine."""
        return cls(is_cuda=True, has_triton=True, has_transformer_engine=has_transformer_engine, capability=(9, 0))


def local_device() -> torch.device:
    """The current CUDA device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def choose_determinism(is_deterministic: bool) -> None:
    """Have torch take operations that give the same bits each time, or whichever are fastest, in this process.

    Before the first matrix product on a GPU: cuBLAS reads its variable once.
    """
    if is_deterministic:
        # Sums of a product split over several streams would come in any order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Whoever reads memory that nothing has written has a defect; filling it all is no cure.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
