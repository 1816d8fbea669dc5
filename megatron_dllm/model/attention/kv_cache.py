"""Keys and values of the clean tokens that decoding has finished with, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, VIEW
from megatron_dllm.model.attention.plan import PlanCache


class KVCache:
    """Stands in front of the tokens of a forward pass; grows only by passes that commit.

        cache = KVCache()
        with cache.attached(model, is_committing=True):
            model(clean prompt blocks)                  # stored
        with cache.attached(model):
            model(noisy block)                          # reads the prompt, stores nothing

    Positions, block ids and doc ids of later passes must go on from the stored tokens.

    Attributes:
        roles: [b, c, 3] int32 roles of the c stored tokens, None while empty.
    """

    def __init__(self) -> None:
        self.roles: Tensor | None = None
        self.is_committing = False
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._pending_roles: Tensor | None = None
        self._joined_roles = PlanCache()

    def __len__(self) -> int:
        return 0 if self.roles is None else self.roles.shape[1]

    @contextmanager
    def attached(self, model: nn.Module, is_committing: bool = False) -> Iterator[KVCache]:
        """Let every RoleAttention inside `model` use the cache.

        Args:
            model: any module that contains the attention layers.
            is_committing: store the keys and values of the pass (its tokens must be clean or padding).

        Yields:
            The cache itself.
        """
        layers = [module for module in model.modules() if hasattr(module, "kv_cache")]
        if not layers:
            raise ValueError(f"model ({type(model).__name__}) has no RoleAttention layer; build it with build_model.")
        self.is_committing = is_committing
        for layer in layers:
            layer.kv_cache = self
        try:
            yield self
            self._layers.update(self._pending)
            if self._pending_roles is not None:
                self.roles = self._pending_roles
        finally:
            self._pending, self._pending_roles, self.is_committing = {}, None, False
            for layer in layers:
                layer.kv_cache = None

    def extend(self, layer_number: int, key: Tensor, value: Tensor, roles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stored tokens of a layer followed by those of this pass.

        Args:
            layer_number: the layer that asks.
            key: [s, b, g, d] keys of this pass, rotary embedding applied.
            value: [s, b, g, d] values of this pass.
            roles: [b, s, 3] roles of this pass.

        Returns:
            Keys and values [c + s, b, g, d] and roles [b, c + s, 3].
        """
        joined = self._joined_roles.get(roles, (len(self), self.is_committing), lambda: self._join_roles(roles))
        if layer_number in self._layers:
            key, value = (
                torch.cat([old, new]) for old, new in zip(self._layers[layer_number], (key, value), strict=True)
            )
        if self.is_committing:
            self._pending[layer_number] = (key.detach(), value.detach())
            self._pending_roles = joined
        return key, value, joined

    def _join_roles(self, roles: Tensor) -> Tensor:
        is_storable = (roles[..., VIEW] == CLEAN_VIEW) | (roles[..., DOC] == PADDING_DOC)
        if self.is_committing and not bool(is_storable.all()):
            raise ValueError(
                "KVCache: only clean tokens can be stored; run the finished block again with "
                "view 0 and commit that pass."
            )
        # A copy: the caller may write the next block's roles over these.
        return roles.clone() if self.roles is None else torch.cat([self.roles, roles], dim=1)
