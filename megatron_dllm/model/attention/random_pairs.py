"""Pairs of a document's tokens that are open by chance, drawn anew in each step (DiffuLLaMA's annealing).

    token q sees token k:  k <= q, or u(q, k) < share

u is a pure function of the seed of the step, the document and the two places, so every layout and every backend has the
same. It takes one number of each query and one of each key, and mixes their sum: a kernel can do that pair by pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_dllm.model.mixing import GOLDEN, as_int64, mix, shifted

# Columns behind those of a token's role: its place in the document, and a number of the document.
PLACE, KEY = 3, 4
_BITS = 53


@dataclass(frozen=True)
class RandomPairs:
    """How they are drawn.

    Attributes:
        share: of the pairs that are open, r.
        seed: of the step.
    """

    share: float
    seed: int

    @property
    def limit(self) -> int:
        """Below which the 53 bits of an open pair lie."""
        return math.ceil(self.share * 2.0**_BITS)

    def of_query(self, tokens: Tensor) -> Tensor:
        """[...] int64 of tokens [..., 5] int32: roles, places and documents' numbers."""
        return mix(mix(tokens[..., KEY].long() + as_int64(self.seed)) + tokens[..., PLACE])

    def of_key(self, tokens: Tensor) -> Tensor:
        """[...] int64 of tokens [..., 5] int32."""
        return (tokens[..., PLACE].long() + 1) * as_int64(GOLDEN)


def is_open(query_place: Tensor, key_place: Tensor, of_query: Tensor, of_key: Tensor, limit: int | Tensor) -> Tensor:
    """Whether queries see keys of their own copy of a document; all arguments are broadcast.

    Args:
        query_place: [...] int32.
        key_place: [...] int32.
        of_query: [...] int64, `RandomPairs.of_query`.
        of_key: [...] int64, `RandomPairs.of_key`.
        limit: `RandomPairs.limit`, or as [] int64.

    Returns:
        [...] bool.
    """
    return (key_place <= query_place) | (shifted(mix(of_query + of_key), 64 - _BITS) < limit)
