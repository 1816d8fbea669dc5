"""How the router spreads tokens over experts, apart for masked, visible and clean tokens.

Masked tokens all read the same embedding and tend to crowd on few experts, which a load averaged over
all tokens hides. Counts are taken by forward hooks on megatron-core's routers while a step is logged.

Where the last layer computes only tokens that carry a loss (model.last_layer), its router sees no others: in block
diffusion without alignment it counts masked tokens alone, and its lines of the visible and clean ones stay 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, VIEW
from megatron_dllm.model.last_layer import LastLayer, rows_to_keep
from megatron_dllm.parallel.device import local_device
from megatron_dllm.training.observers.observer import Observer, Watch
from megatron_dllm.training.reports import StepReport

ROLES = ("masked", "visible", "clean")
_PADDING = len(ROLES)


def token_roles(batch: Batch) -> Tensor:
    """[s * b] int64: index into ROLES of every token, in the router's order; padding is len(ROLES)."""
    roles = torch.where(batch.roles[..., VIEW] == CLEAN_VIEW, 2, torch.where(batch.is_masked, 0, 1))
    roles = torch.where(batch.roles[..., DOC] < 0, _PADDING, roles)
    return roles.transpose(0, 1).reshape(-1)


class RouterLoad(Observer):
    """Counts of tokens per layer, role and expert over the micro-batches of one step."""

    def __init__(
        self, chunks: Sequence[nn.Module], tensor: ProcessGroup, num_layers: int, num_experts: int, is_recomputed: bool
    ) -> None:
        """Look for the routers of a model with experts.

        Args:
            chunks: the local model.
            tensor: ranks that split the tokens between layers.
            num_layers: of the whole model.
            num_experts: of a layer.
            is_recomputed: layers run first without gradient and once more in the backward pass.
        """
        self._tensor = tensor
        self._is_recomputed = is_recomputed
        modules = [m for chunk in chunks for m in chunk.modules()]
        self._routers = [m for m in modules if isinstance(m, TopKRouter)]
        self._selecting = {m.mlp.router for m in modules if isinstance(m, LastLayer) and m.is_moe_layer}
        self._shape = (num_layers, len(ROLES) + 1, num_experts)
        self._counts: Tensor | None = None
        self._roles: Tensor | None = None
        self._kept_roles: Tensor | None = None

    def observe(self, batch: Batch) -> None:
        """Tell which micro-batch the next forward pass is of."""
        roles = token_roles(batch)
        size, rank = self._tensor.size(), self._tensor.rank()
        num_rows, length = batch.input_ids.shape
        kept = roles[rows_to_keep(batch.target_positions, length, num_rows, size)]
        kept[len(batch.target_positions) :] = _PADDING
        self._roles, self._kept_roles = roles.chunk(size)[rank], kept.chunk(size)[rank]

    def around_step(self, is_logged: bool) -> AbstractContextManager[Watch | None]:
        """Count in steps that are logged."""
        return self.counting() if is_logged else nullcontext()

    def measure(self, report: StepReport) -> dict[str, Any]:
        """Imbalance by role, and the load of every expert of every layer (a collective)."""
        load = self.totals(local_device())
        if load.sum() == 0:
            return {}
        ratios = {f"router_imbalance/{role}": value for role, value in imbalance(load).items()}
        return {**ratios, "router_load": load.sum(0).tolist()}

    @contextmanager
    def counting(self) -> Iterator[Watch]:
        """Count while the block runs; it is given the function to tell each micro-batch to."""
        hooks = [router.register_forward_hook(self._count) for router in self._routers]
        self._counts = None
        try:
            yield self.observe
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, router: TopKRouter, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled() == self._is_recomputed:
            return  # the second pass of recomputation: tokens count once, while their roles are at hand
        routing_map = output[1].reshape(-1, self._shape[2])
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.float64, device=routing_map.device)
        assert self._roles is not None and self._kept_roles is not None, "a batch is told before its forward pass"
        # Where states are aligned, the last layer computes all tokens too.
        is_kept = router in self._selecting and len(routing_map) == len(self._kept_roles)
        roles = self._kept_roles if is_kept else self._roles
        one_hot = nn.functional.one_hot(roles, _PADDING + 1).double()
        self._counts[router.layer_number - 1] += one_hot.t() @ routing_map.double()

    def totals(self, device: torch.device) -> Tensor:
        """[layers, 3, experts] fp64 tokens per layer, role and expert over all ranks (a collective)."""
        counts = self._counts
        if counts is None:
            counts = torch.zeros(self._shape, dtype=torch.float64, device=device)
        dist.all_reduce(counts)
        return counts[:, :_PADDING].cpu()


def imbalance(totals: Tensor) -> dict[str, float]:
    """Per role, the load of the busiest expert over the mean, averaged over the layers that have experts."""
    result = {}
    for index, role in enumerate(ROLES):
        load = totals[:, index]
        load = load[load.sum(-1) > 0]
        if len(load):
            result[role] = float((load.max(-1).values / load.mean(-1)).mean())
    return result
