"""Runs the program on tensors without content: only what its control flow reads has values.

    known      tensors made from values (rows, roles, counts, object sizes): every operation on them runs as it is
    unknown    weights, activations and what follows from them: tensors on torch's meta device, which have shapes alone
    assumed    the three questions that the program asks of unknown values

The three are: how many tokens the router sends to each expert (all the same), which elements a mask of the router
selects (that share of them), and a number of one element (1: a finite loss and gradient norm, a flag that is set).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_dllm.parallel.device import local_device
from megatron_dllm.planning.engine_collectives import UNKNOWN, LoneCollectives, has_unknown
from megatron_dllm.planning.engine_kernels import shaped_norm
from megatron_dllm.planning.engine_ledger import Ledger
from megatron_dllm.planning.engine_memory import LiveMemory

_aten = torch.ops.aten
# New objects at every access, so they are compared by value.
_DEVICE_OF, _IS_CUDA = (getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda"))
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_COUNTS_UP = (_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.randperm.default)


class KnownValues(TorchDispatchMode):
    """Decides for each operation whether it is computed."""

    def __init__(self, ledger: Ledger, expert_share: float, peers: Sequence[Sequence[Tensor]] = ()) -> None:
        """Take what to assume.

        Args:
            ledger: gets products and collectives; these are answered by `LoneCollectives`.
            expert_share: part of the experts that a token is sent to.
            peers: what other ranks hold, see there.
        """
        super().__init__()
        self._ledger, self._expert_share = ledger, expert_share
        self._collectives = LoneCollectives(ledger, peers)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute it, or assume what comes of it."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collectives.answer(func, args)
        self._ledger.add_product(func, args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _is_made_known(func, args, kwargs) if not tensors else not has_unknown(tensors):
            return func(*args, **kwargs)
        return self._assume(func, args, kwargs)

    def _assume(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outcome of an operation on unknown values."""
        first: Any = args[0] if args else None
        if func is _aten._local_scalar_dense.default:
            return True if first.dtype is torch.bool else 1.0 if first.is_floating_point() else 1
        if func is _aten.masked_select.default:
            return torch.empty(int(args[1].numel() * self._expert_share), dtype=first.dtype, device=UNKNOWN)
        if func is _aten.sum.dim_IntList and first.dtype is torch.bool and first.dim() == 2:
            return self._tokens_per_expert(first.shape, kwargs.get("dtype") or torch.int64)
        if func is _aten._grouped_mm.default:
            return _grouped_product(first, args[1], args[2] if len(args) > 2 else kwargs["offs"])
        if func is _aten._to_copy.default and kwargs.get("dtype") in (None, first.dtype):
            return _aten.alias.default(_without_values(first))
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": UNKNOWN}
        args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
        return func(*args, **kwargs)

    def _tokens_per_expert(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """[e] equal counts, whose sum is what a mask of the router, of `shape` [t, e], selects."""
        num_tokens, num_experts = shape
        ends = [int(num_tokens * (place + 1) * self._expert_share) for place in range(num_experts)]
        return torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)], dtype=dtype)


class DeviceNames(TorchFunctionMode):
    """Answers the calls of torch that no dispatch mode sees, for tensors without values."""

    def __init__(self, is_cuda: bool, memory: LiveMemory) -> None:
        """Args: whether the program is to believe that it runs on a GPU, and what counts its tensors."""
        super().__init__()
        self._is_cuda, self._memory = is_cuda, memory

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Name the device, answer for kernels of its own, and for a list of unknown numbers."""
        kwargs = kwargs or {}
        if func == _DEVICE_OF:
            return local_device()
        if func == _IS_CUDA:
            return self._is_cuda and args[0].is_meta
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.meta.", "torch.cuda." if torch.cuda.is_available() else "torch.")
        if self._is_cuda and func is F.rms_norm:
            return shaped_norm(args[0], kwargs["weight"])
        if self._is_cuda and getattr(func, "is_fused", False):
            with self._memory.one_kernel():
                return func.__wrapped__(*args)
        if func is torch.tensor and isinstance(args[0], list):
            numbers = tree_leaves(args[0])
            if has_unknown([number for number in numbers if isinstance(number, Tensor)]):
                return torch.empty(len(numbers), device=UNKNOWN)
        return func(*args, **kwargs)


def _grouped_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The shape of a grouped product, for which torch's own rule wants bf16.

    Args:
        left: [m, k] rows in sections; or [k, m], whose columns are.
        right: [e, k, n]; or [m, n], whose rows are.
        ends: [e] of the sections.

    Returns:
        [m, n]; or [e, k, n].
    """
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(len(ends), left.shape[0], right.shape[1])


def _without_values(tensor: Tensor) -> Tensor:
    """Shape and strides of a tensor of any shape."""
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=UNKNOWN)


def _is_made_known(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor that is made of nothing has values: numbers that count or index, not those that compute."""
    if kwargs.get("device") == UNKNOWN:
        return False
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype in _INTEGERS
    return func in _COUNTS_UP and not any(isinstance(arg, float) for arg in args)
