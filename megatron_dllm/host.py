"""Lets megatron-core run on a machine without CUDA: gloo ranks, tensors on the CPU. Nothing else knows about it.

megatron-core 0.16 names the device in four ways, each answered once here:

    calls of torch.cuda (current_device, Stream, ...)      answered for the CPU
    the literal "cuda" and "torch.cuda.FloatTensor"        rewritten in its loaded functions
    functions compiled at import (torch.compile)           run as they are written
    split sizes of an all-to-all as tensors                given to gloo as lists

`prepare_host` comes before the first use of megatron-core, whatever was imported in which order.
With CUDA it only checks the version and repairs the router.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

TESTED_VERSION = "0.16.1"
_PREPARED_MARK = "_megatron_dllm_host_prepared"
_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
# Modules that name the device and that megatron.core's own import leaves out.
_LAZY_MODULES = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.token_dispatcher",
)


def prepare_host() -> None:
    """Make megatron-core usable on this machine. Calling it again does nothing.

    Raises:
        RuntimeError: for a megatron-core other than 0.16, or a missing psutil (without it the process that
            writes a checkpoint dies and the save waits for it for ever).
    """
    with contextlib.nullcontext() if torch.cuda.is_available() else _nothing_compiled():
        core = importlib.import_module("megatron.core")
        if getattr(core, _PREPARED_MARK, False):
            return
        _check_installation(core.__version__)
        for name in _LAZY_MODULES:
            importlib.import_module(name)
    moe_utils = sys.modules["megatron.core.transformer.moe.moe_utils"]
    # 0.16.1 asks `te_general_gemm is not None` without having bound it where TransformerEngine is missing.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not torch.cuda.is_available():
        # Advice for overlapping communication with computation on a GPU.
        warnings.filterwarnings("ignore", message="(?s).*CUDA_DEVICE_MAX_CONNECTIONS.*")
        _answer_cuda_calls()
        _rewrite_functions()
        _use_cpu_random_state()
        _give_split_sizes_as_lists()
    setattr(core, _PREPARED_MARK, True)


def _check_installation(version: str) -> None:
    if version.split(".")[:2] != TESTED_VERSION.split(".")[:2]:
        raise RuntimeError(
            f"megatron-core ({version}) must be 0.16: this program was tested with {TESTED_VERSION} and relies on its "
            f"internals; pip install megatron-core=={TESTED_VERSION}."
        )
    if importlib.util.find_spec("psutil") is None:
        raise RuntimeError(
            "psutil (not installed) is needed by megatron-core's checkpoint writer, which would "
            "otherwise die and leave the save waiting; pip install psutil."
        )


class _NoStream:
    """A CUDA stream or event where everything runs in order: nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    __hash__ = object.__hash__

    def _nothing(self, *_: Any, **__: Any) -> _NoStream:
        return self

    wait_stream = wait_event = record_event = record = synchronize = wait = _nothing


def _answer_cuda_calls() -> None:
    """Answer for the CPU what raises without CUDA."""

    def to_cpu(self: Any, *_: Any, **__: Any) -> Any:
        return self

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    cuda: Any = torch.cuda
    # `device=torch.cuda.current_device()` is how layers, buffers and collectives choose where their tensors lie.
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda _: None
    cuda.device_count = lambda: 1  # a divisor in the checkpoint writer's choice of device
    cuda.synchronize = lambda *_: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *_: _NoStream()
    cuda.stream = stream
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = module.cuda = to_cpu


def _rewrite_functions() -> None:
    """In every loaded function of megatron-core: say "cpu" for "cuda", and undo torch.compile.

    Compiling these few element-wise functions on a CPU costs seconds per process and gains nothing.
    """
    for module in [m for name, m in sys.modules.items() if name.startswith("megatron.core") and m is not None]:
        for owner in [module, *(v for v in vars(module).values() if isinstance(v, type))]:
            if not getattr(owner, "__module__", module.__name__).startswith("megatron.core"):
                continue
            for name, value in list(vars(owner).items()):
                if value is torch.compile:
                    setattr(owner, name, _as_written)
                elif isinstance(value, types.FunctionType) and hasattr(value, "_torchdynamo_orig_callable"):
                    setattr(owner, name, value._torchdynamo_orig_callable)
                _rewrite_literals(value)


def _as_written(function: Any = None, **_: Any) -> Any:
    """The decorator that stands for torch.compile."""
    return function if function is not None else _as_written


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Let modules that are imported inside have their functions as they are written.

    torch.compile loads its compiler when it first decorates a function: 1.4 of the 6.3 CPU seconds from the start of a
    process to its first step.
    """
    compiler: Any = torch
    real = compiler.compile
    compiler.compile = _as_written
    try:
        yield
    finally:
        compiler.compile = real


def _rewrite_literals(value: Any) -> None:
    """Replace the device literals in a function, and in the functions it wraps."""
    while value is not None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, types.FunctionType) and value.__module__.startswith("megatron.core"):
            value.__code__ = _rewrite_code(value.__code__)
        value = getattr(value, "__wrapped__", None)


def _rewrite_code(code: types.CodeType) -> types.CodeType:
    def rewrite(constant: Any) -> Any:
        if isinstance(constant, types.CodeType):
            return _rewrite_code(constant)
        if isinstance(constant, tuple):
            return tuple(rewrite(item) for item in constant)
        return _LITERALS.get(constant, constant) if isinstance(constant, str) else constant

    return code.replace(co_consts=tuple(rewrite(constant) for constant in code.co_consts))


def _use_cpu_random_state() -> None:
    """The tracker of per-rank random states works on the CPU generator."""
    random: Any = sys.modules["megatron.core.tensor_parallel.random"]
    cuda: Any = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # Drawing on the "GPU" now moves the CPU's state, which is all that this warning is about.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


class _SplitSizes(list[int]):
    """A list that also answers what megatron-core asks of a host array."""

    def tolist(self) -> list[int]:
        """The sizes."""
        return list(self)


def _give_split_sizes_as_lists() -> None:
    """Gloo's all_to_all_single wants lists of int where NCCL takes host arrays."""
    dispatcher: Any = sys.modules["megatron.core.transformer.moe.token_dispatcher"]

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        del record_stream
        return _SplitSizes(tensor.tolist()) if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_host


def quiet_libraries() -> None:
    """Keep the engine's notes to its own developers off a user's terminal. For entry points, before they import it.

    What they say is that optional packages are not installed, that torch functions will be renamed and that a barrier
    uses the rank's device; errors and this project's own warnings still show.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"contextlib")
    # megatron-core's own barriers; each rank has chosen its device before.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
