"""The attention layer: token roles in, megatron-core's DotProductAttention replaced.

The roles arrive where megatron passes its attention mask. A backend turns them into a plan once per
micro-batch; all layers and recomputed passes share it.
"""

from __future__ import annotations

import logging
import math
from types import ModuleType
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils._triton import has_triton

from megatron_dllm.model.attention import chunked, dense, flex, shared_prefix
from megatron_dllm.model.attention.context_parallel import gather_roles, plan_exchange
from megatron_dllm.model.attention.head_exchange import heads_to_tokens, tokens_to_heads
from megatron_dllm.model.attention.kv_cache import KVCache
from megatron_dllm.model.attention.plan import PlanCache
from megatron_dllm.model.attention.selection import join_rows, select_queries, select_roles

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {"dense": dense, "chunked": chunked, "shared_prefix": shared_prefix, "flex": flex}
# Shared by all layers of the process: that is its purpose. Entries die with the roles they belong to.
PLANS = PlanCache()
_logged_choices: set[tuple[str, str]] = set()


def choose_backend(name: str, device: torch.device | str) -> tuple[str, str]:
    """The attention backend to use and why.

    Args:
        name: dense, chunked, shared_prefix, flex, or auto.
        device: where the tensors live.

    Returns:
        (backend, reason). The choice is logged once.

    Raises:
        ValueError: for a backend that is unknown or cannot run there.
    """
    device = torch.device(device)
    backend, reason = _choose(name, device)
    if (backend, reason) not in _logged_choices:
        _logged_choices.add((backend, reason))
        logger.info("attention backend: %s (%s)", backend, reason)
    return backend, reason


def _choose(name: str, device: torch.device) -> tuple[str, str]:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention_backend ({name}) is not known; use auto or one of {', '.join(BACKENDS)}.")
    if name == "shared_prefix" and device.type != "cpu":
        raise ValueError(
            f"attention_backend (shared_prefix) calls a kernel of the CPU and the tensors are on "
            f"{device.type}; use auto, flex or chunked."
        )
    if name == "flex" and device.type == "cuda" and not has_triton():
        raise ValueError("attention_backend (flex) needs Triton and a GPU that it supports; use chunked.")
    if name != "auto":
        return name, "asked for by name"
    if device.type == "cuda":
        return ("flex", "fastest on CUDA") if has_triton() else ("chunked", "no Triton here, which flex needs")
    if device.type == "cpu":
        return "shared_prefix", "fastest on CPU"
    return "chunked", f"the only one without a mask of the whole row that runs on {device.type}"


class RoleAttention(MegatronModule):
    """Core attention whose mask is the predicate `diffusion.roles.visible`; takes DotProductAttention's place.

    With a context-parallel group of more than one rank, queries stay local and see the keys of all ranks, or
    (cp_comm_type "a2a") each rank attends with some heads of all tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        backend: str = "auto",
        selects_rows: bool = False,
    ) -> None:
        """Take megatron-core's arguments.

        Args:
            config: the model's; dropout must be 0 and the softmax the plain one.
            layer_number: 1 for the first layer.
            attn_mask_type: ignored, the roles say what is visible.
            attention_type: ignored.
            attention_dropout: overrides the config's.
            softmax_scale: factor on the logits; None: 1 / sqrt(d).
            cp_comm_type: "a2a" exchanges tokens for heads; else keys and values are gathered.
            pg_collection: the model's process groups.
            backend: see `choose_backend`.
            selects_rows: compute only the queries that `attention_bias` names.

        Raises:
            ValueError: for dropout, another softmax, or an unknown backend.
        """
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout ({dropout}) must be 0; the attention backends have none.")
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise ValueError(f"softmax_type ({config.softmax_type}) is not supported; use vanilla.")
        if backend != "auto" and backend not in BACKENDS:
            choose_backend(backend, "cpu")
        self.layer_number = max(1, layer_number)
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.backend = backend
        self.selects_rows = selects_rows
        self.kv_cache: KVCache | None = None
        self.cp_group = getattr(pg_collection, "cp", None)
        self.exchanges_heads = cp_comm_type == "a2a" and self.context_parallel_size > 1

    @property
    def context_parallel_size(self) -> int:
        """Ranks among which the tokens of a row are split."""
        return 1 if self.cp_group is None else self.cp_group.size()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend by roles.

        Args:
            query: [s, b, n, d] queries of this rank's heads and tokens, rotary embedding applied.
            key: [s, b, g, d] keys.
            value: [s, b, g, d] values.
            attention_mask: [b, s, 3] int32 roles of these tokens.
            attn_mask_type: ignored.
            attention_bias: with `selects_rows`, [R] int64 indexes into the flattened [s * b] tokens whose output is
                wanted, or None; ignored without. (megatron-core hands this argument through recomputation as it is.)
            packed_seq_params: must be None.

        Returns:
            [s, b, n * d], or [R, 1, n * d] of the chosen tokens; exactly 0 for padding.

        Raises:
            ValueError: if the roles are missing or of another shape.
        """
        assert packed_seq_params is None, "RoleAttention reads only token roles"
        roles, rows = attention_mask, attention_bias if self.selects_rows else None
        s, b, n, d = query.shape
        if roles is None or roles.shape != (b, s, 3) or roles.dtype.is_floating_point:
            shape = None if roles is None else tuple(roles.shape)
            raise ValueError(
                f"attention_mask ({shape}) must hold the integer roles [{b}, {s}, 3] of the tokens; pass Batch.roles."
            )
        backend, _ = choose_backend(self.backend, query.device)
        if backend == "flex" and self.kv_cache is not None:
            backend = "chunked"  # The number of keys grows with every block: flex would compile each time.
        if self.exchanges_heads:
            query, key, value = tokens_to_heads(query, key, value, self.cp_group)
        key, value, key_roles = self._keys(key, value, roles)
        build = BACKENDS[backend].build_plan
        if rows is None:
            query_roles = key_roles if self.exchanges_heads else roles
            plan = PLANS.get(key_roles, (backend, key.device), lambda: build(query_roles, key_roles))
        else:
            assert not self.exchanges_heads, "rows are chosen from this rank's tokens"
            query, key, value = select_queries(query, rows, backend == "flex"), join_rows(key), join_rows(value)
            plan = PLANS.get(
                rows, (backend, key.device), lambda: build(*select_roles(roles, key_roles, rows, len(query)))
            )
        out = BACKENDS[backend].attend(
            query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), plan, self.softmax_scale
        )
        out = out.permute(2, 0, 1, 3)
        if rows is not None:
            return out[: len(rows)].reshape(len(rows), 1, n * d)
        if self.exchanges_heads:
            out = heads_to_tokens(out, self.cp_group)
        return out.reshape(s, b, n * d)

    def _keys(self, key: Tensor, value: Tensor, roles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of every token that these may see, and those tokens' roles, one tensor per micro-batch."""
        if self.kv_cache is not None:
            assert self.context_parallel_size == 1, "the KV cache holds whole rows: decode without context parallelism"
            return self.kv_cache.extend(self.layer_number, key, value, roles)
        if self.exchanges_heads:
            return key, value, PLANS.get(roles, ("heads", self.cp_group), lambda: gather_roles(roles, self.cp_group))
        if self.context_parallel_size > 1:
            exchange = PLANS.get(roles, ("keys", self.cp_group), lambda: plan_exchange(roles, self.cp_group))
            return *exchange.exchange(key, value), exchange.key_roles
        return key, value, roles
