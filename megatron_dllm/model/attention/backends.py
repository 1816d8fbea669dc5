"""The ways to compute attention by roles, by name; each is a module with the two functions of `Backend`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from megatron_dllm.model.attention import chunked, dense, flex, shared_prefix
from megatron_dllm.model.attention.random_pairs import RandomPairs


class Backend(Protocol):
    """Turns roles into a plan, once per micro-batch, and attends by it, once per layer.

    Attributes:
        IS_COMPILED_PER_SHAPE: every other number of queries or keys costs a compilation.
    """

    IS_COMPILED_PER_SHAPE: bool

    def build_plan(self, query_roles: Tensor, key_roles: Tensor) -> Any:
        """The plan of the mask.

        Args:
            query_roles: [b, q, 3] int32.
            key_roles: [b, k, 3] int32.
        """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: Any, scale: float) -> Tensor:
        """Softmax attention over the visible keys.

        Args:
            query: [b, n, q, d].
            key: [b, g, k, d], every one of the g groups serving n / g heads.
            value: [b, g, k, d].
            plan: see `build_plan`.
            scale: factor on the logits.

        Returns:
            [b, n, q, d]; exactly 0, with zero gradients, where a query sees no key.
        """


class PairBackend(Protocol):
    """A backend whose mask need not be intervals of keys: dense and flex."""

    def build_plan(self, query_roles: Tensor, key_roles: Tensor, *, pairs: RandomPairs) -> Any:
        """The plan of the mask, of which only some pairs are left.

        Args:
            query_roles: [b, q, 5] int32 roles, places and documents' numbers.
            key_roles: [b, k, 5] int32.
            pairs: that are left.
        """


BACKENDS: dict[str, Backend] = {"dense": dense, "chunked": chunked, "shared_prefix": shared_prefix, "flex": flex}
