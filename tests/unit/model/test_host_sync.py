"""The model asks the device for nothing during a step: no operation of ours whose result the host has to wait for."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dllm.config import ParallelConfig
from megatron_dllm.diffusion.losses.alignment import AlignmentRule
from megatron_dllm.diffusion.losses.distillation import DistillRule
from megatron_dllm.model.attention import flex
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch
from tests.unit.model.attention.eager_kernel import small_backends

pytestmark = pytest.mark.usefixtures("one_rank")

# Operations that return a number to the host, or a tensor whose shape depends on values.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal",
    "bincount",
    "repeat_interleave.Tensor",
)
# The caller says how many there are.
NOT_WAITING = ("nonzero_static",)


class WatchWaits(TorchDispatchMode):
    """Collects (operation, file and function that called it) of operations that make the host wait."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        reads_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        if (name.startswith(WAITING) and not name.startswith(NOT_WAITING)) or reads_mask:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-1]
            self.found.add((name, f"{frames[-1].filename}:{frames[-1].name}"))
        return func(*args, **(kwargs or {}))


def _waits(layout: ParallelConfig, backend: str, asks: bool = False) -> set[tuple[str, str]]:
    """What a step waits for: operations, and who called them."""
    from megatron_dllm.model.alignment import Alignment
    from megatron_dllm.model.asked import Asked
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.model.objective import token_loss
    from megatron_dllm.parallel.groups import Groups

    model = tiny_model()
    built = build_model(model, layout, Groups.current()).train()
    built.attention = replace(built.attention, backend=small_backends(tile_size=16)[backend])
    batch = tiny_batch(model, [[17, 9], [24]], row_length=56, block_size=4)
    asked = Asked()
    if asks:
        alignment = Alignment.empty(AlignmentRule(weight=1.0), model.num_layers, torch.device("cpu"))
        asked = Asked(alignment, DistillRule(1.0, is_own=True))
    with WatchWaits() as watch:
        token_loss(batch, built(batch, mask_noise_sigma=0.3, noise_seed=5, asked=asked)).total.backward()
    return watch.found


@pytest.mark.parametrize("backend", ["dense", "flex"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_only_megatron_core_makes_the_host_wait(recompute: str, backend: str) -> None:
    found = _waits(ParallelConfig(recompute=recompute), backend)
    ours = {place.rsplit("/", 1)[1] for _, place in found if "megatron_dllm" in place}
    # On the CPU alone it looks whether the tokens are in order; a GPU asserts it.
    assert ours == ({"flex.py:build_plan"} if backend == "flex" else set())
    # What remains is the sorting of tokens by expert, where TransformerEngine's fused kernels are not in use.
    assert {place.rsplit("/", 1)[1] for _, place in found} - ours == {
        "moe_utils.py:permute",
        "token_dispatcher.py:dispatch_postprocess",
    }


def test_the_kernels_mask_is_built_without_waiting() -> None:
    batch = tiny_batch(tiny_model(), [[17, 9], [24]], row_length=56, block_size=4)
    with WatchWaits() as watch:
        flex.build_plan(batch.roles, batch.roles.clone())
    assert not watch.found


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_nothing_waits_where_one_rank_has_all_experts(recompute: str, asks: bool) -> None:
    layout = ParallelConfig(recompute=recompute, moe_token_dispatcher="alltoall")
    assert _waits(layout, "dense", asks) == set()
