"""A mask that opens from causal to bidirectional, in rows of one-block documents (after DiffuLLaMA).

Each noisy copy of such a document sees itself alone. While the mask opens, token q of n sees token k by the share r
that is open:

    window    k <= q + w, with the window w = floor(r n)
    random    k <= q, or u(q, k) < r, with u drawn anew in each step for every pair of a document

At r = 0 both are the causal mask, at r = 1 all of it. An AR row among the others has a block for each token, and stays
causal at every r.

A window is nothing new to a backend. Give the keys of a copy the roles of an autoregressive document, each token a
clean block of its own, and each query the block w further on: it sees its "own" block q + w and the "earlier" ones,
which is k <= q + w. So a query's keys stay an interval, and every backend and every layout computes it. Random pairs
(`random_pairs`) are no intervals: the dense mask holds them, and flex draws them in its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from megatron_dllm.config.annealing import RANDOM, AttentionAnnealConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, VIEW
from megatron_dllm.model.attention.backends import Backend, PairBackend
from megatron_dllm.model.attention.plan import find_intervals
from megatron_dllm.model.attention.random_pairs import PLACE, RandomPairs
from megatron_dllm.model.mixing import mix, shifted

_KEY_BITS = 31


@dataclass(frozen=True)
class Opening:
    """How far the mask of a step is open.

    Attributes:
        kind: what opens, of `config.annealing.KINDS`.
        share: that is open, r, below 1.
    """

    kind: str
    share: float


@dataclass(frozen=True)
class Annealing:
    """How the mask of a stage opens.

    Attributes:
        config: what opens, and over how many steps.
        step: steps of the stage before this one.
    """

    config: AttentionAnnealConfig
    step: int = 0

    def at(self, step: int) -> Annealing:
        """In the step after so many of the stage."""
        return replace(self, step=step)

    @property
    def opening(self) -> Opening | None:
        """How far it is open; None: all of it."""
        share = self.config.open_share(self.step)
        return Opening(self.config.kind, share) if share < 1.0 else None


@dataclass(frozen=True)
class PlacedOpening:
    """The opening of a micro-batch's mask.

    Attributes:
        opening: of the step.
        seed: of its random pairs.
        tokens: [b, s, 5] int32 roles, places and documents' numbers of this rank's tokens, which travel as roles do.
    """

    opening: Opening
    seed: int
    tokens: Tensor

    @classmethod
    def of(cls, opening: Opening, seed: int, batch: Batch) -> PlacedOpening:
        """The opening in a micro-batch, or this context rank's part of one.

        Args:
            opening: of the step.
            seed: another one in each step.
            batch: its tokens.
        """
        doc = batch.roles[..., DOC].long()
        key = shifted(mix(mix(batch.row_keys.long()).unsqueeze(-1) + doc), 64 - _KEY_BITS)
        columns = [batch.roles, batch.position_ids.unsqueeze(-1), key.unsqueeze(-1)]
        return cls(opening, seed, torch.cat([column.int() for column in columns], dim=-1))

    def plan(self, backend: Backend, query: Tensor, key: Tensor) -> Any:
        """The backend's plan of the mask.

        Args:
            backend: that attends; one that takes random pairs where there are some.
            query: [b, q, 5] int32, as in `tokens`.
            key: [b, k, 5] int32.
        """
        if self.opening.kind == RANDOM:  # the configuration has refused other backends
            pairs = RandomPairs(self.opening.share, self.seed)
            return cast(PairBackend, backend).build_plan(query, key, pairs=pairs)
        return backend.build_plan(*window_roles(query, key, self.opening.share))


def window_roles(query: Tensor, key: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Roles by which `roles.visible` is the window.

    Args:
        query: [b, q, 4] int32 roles and places, more columns behind them or none; documents of one block.
        key: [b, k, 4] int32: every token that the queries may see at all.
        share: that is open.

    Returns:
        [b, q, 3] and [b, k, 3] int32 roles of queries and keys.
    """
    found = find_intervals(query, key)
    length = (found.own_stop - found.own_start).double()
    window = torch.floor(share * length).to(query.dtype)
    # Every copy is a document of its own.
    stride = torch.maximum(query[..., VIEW].max(), key[..., VIEW].max()) + 1
    return _in_order(query, stride, query[..., PLACE] + window), _in_order(key, stride, key[..., PLACE])


def _in_order(tokens: Tensor, stride: Tensor, block: Tensor) -> Tensor:
    """Clean roles [b, s, 3] of tokens [b, s, 4] in blocks [b, s], their copies as documents."""
    doc = torch.where(tokens[..., DOC] >= 0, tokens[..., DOC] * stride + tokens[..., VIEW], PADDING_DOC)
    return torch.stack([doc, block, torch.full_like(block, CLEAN_VIEW)], dim=-1)
