"""What the attention layers of a micro-batch have in common, made once, before the first of them runs.

megatron-core hands the argument `attention_bias` through all layers and both kinds of recomputation as it is, and
uses it for nothing itself: that is the way these inputs take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dllm.model.attention import chunked, dense
from megatron_dllm.model.attention.annealing import PlacedOpening
from megatron_dllm.model.attention.backends import Backend
from megatron_dllm.model.attention.context_parallel import KeyExchange, gather_roles, plan_exchange
from megatron_dllm.model.attention.kv_cache import CachedPass
from megatron_dllm.model.attention.selection import num_selected, select_roles

# Queries of a row up to which a pass behind cached keys writes out its mask even without such keys, and with them.
_FEW_QUERIES, _MANY_QUERIES = 64, 512


@dataclass(frozen=True)
class KeptQueries:
    """The tokens whose output the last layer computes.

    Attributes:
        rows: [R] int64 indexes into the flattened [s * b] tokens.
        num_queries: queries that the backend gets, R or a few more.
        plan: the backend's, of these queries.
    """

    rows: Tensor
    num_queries: int
    plan: Any


@dataclass(frozen=True)
class AttentionInputs:
    """What every attention layer reads, forward and recomputed.

    Attributes:
        roles: [b, s, 3] int32 roles of this rank's tokens.
        backend: computes the attention.
        plan: the backend's, of all queries; None where every layer here has `kept` queries.
        kept: the queries of the last layer where it leaves out the others.
        exchange: brings the keys of the other context-parallel ranks; None where rows are whole.
        heads: ranks that exchange tokens for heads in place of that; None: no such exchange.
        cached: the tokens decoded before; None unless decoding.
        after_layer: from a layer's number and output [s, b, h] to what the next one gets; None: the output itself.
    """

    roles: Tensor
    backend: Backend
    plan: Any = None
    kept: KeptQueries | None = None
    exchange: KeyExchange | None = None
    heads: ProcessGroup | None = None
    cached: CachedPass | None = None
    after_layer: Callable[[int, Tensor], Tensor] | None = None

    def bring_keys(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every token that these may see.

        Args:
            layer_number: the layer that asks.
            key: [s, b, g, d] of this rank's tokens.
            value: [s, b, g, d].

        Returns:
            [k, b, g, d] each.
        """
        if self.cached is not None:
            return self.cached.extend(layer_number, key, value)
        return (key, value) if self.exchange is None else self.exchange.exchange(key, value)


@dataclass(frozen=True)
class AttentionPlanner:
    """How this model attends: what is decided once, and from it the inputs of each micro-batch.

    Attributes:
        backend: computes the attention.
        context: ranks that hold parts of the same rows; None: rows are whole.
        exchanges_heads: the ranks of `context` exchange tokens for heads; else keys travel to the queries.
    """

    backend: Backend
    context: ProcessGroup | None = None
    exchanges_heads: bool = False

    def prepare(
        self,
        roles: Tensor,
        *,
        rows: Tensor | None = None,
        has_plain_layers: bool = True,
        cached: CachedPass | None = None,
        opening: PlacedOpening | None = None,
    ) -> AttentionInputs:
        """The inputs of a micro-batch; with a context group of more than one rank a collective.

        Args:
            roles: [b, s, 3] int32 roles of this rank's tokens.
            rows: [R] int64 indexes into the flattened [s * b] tokens that the last layer computes; None: no layer
                leaves out any.
            has_plain_layers: whether some layer attends with all queries.
            cached: a pass of the KV cache.
            opening: of the mask, whose documents are of one block; None: it is open.
        """
        assert self.context is None or cached is None or self.context.size() == 1, "the KV cache holds whole rows"
        backend = self.backend if cached is None else _backend_of(cached, roles, self.backend)
        build_plan: Callable[[Tensor, Tensor], Any] = backend.build_plan
        tokens = roles
        if opening is not None:
            assert cached is None, "decoding has the whole mask"
            tokens, build_plan = opening.tokens, partial(opening.plan, backend)
        exchange, heads, query_roles, key_roles = None, None, tokens, tokens
        if cached is not None:
            key_roles = cached.key_roles
        elif self.context is not None and self.context.size() > 1 and self.exchanges_heads:
            heads, query_roles = self.context, gather_roles(tokens, self.context)
            key_roles = query_roles
        elif self.context is not None and self.context.size() > 1:
            exchange = plan_exchange(tokens, self.context)
            key_roles = exchange.key_roles
        return AttentionInputs(
            roles=roles,
            backend=backend,
            plan=build_plan(query_roles, key_roles) if has_plain_layers else None,
            kept=None if rows is None else _keep(rows, tokens, key_roles, backend, build_plan),
            exchange=exchange,
            heads=heads,
            cached=cached,
        )


def _backend_of(cached: CachedPass, roles: Tensor, chosen: Backend) -> Backend:
    """What attends in a pass of the KV cache with token roles [b, s, 3].

    A few queries of each row on all its keys are one call with a small mask. Whole prompts go through the backend of
    the model unless it is compiled for every number of keys.
    """
    if cached.has_stored or roles.shape[1] <= _FEW_QUERIES:
        return dense if roles.shape[1] <= _MANY_QUERIES else chunked
    return chunked if chosen.IS_COMPILED_PER_SHAPE else chosen


def _keep(
    rows: Tensor, roles: Tensor, key_roles: Tensor, backend: Backend, build_plan: Callable[[Tensor, Tensor], Any]
) -> KeptQueries:
    """The last layer's queries.

    Args:
        rows: [R] int64 indexes into the flattened [s * b] tokens.
        roles: [b, s, 3] int32 of this rank's tokens.
        key_roles: [b, k, 3] int32 of the keys.
        backend: that attends.
        build_plan: makes its plan.
    """
    num_queries = num_selected(len(rows), roles.shape[0] * roles.shape[1], is_rounded=backend.IS_COMPILED_PER_SHAPE)
    return KeptQueries(rows, num_queries, build_plan(*select_roles(roles, key_roles, rows, num_queries)))
