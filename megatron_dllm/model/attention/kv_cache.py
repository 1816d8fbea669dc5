"""Keys and values of the clean tokens that decoding has finished with, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, VIEW

_Layers = dict[int, tuple[Tensor, Tensor]]


class CachedPass:
    """One forward pass behind the tokens of a cache (`KVCache.open`).

    Attributes:
        key_roles: [b, c + s, 3] int32 roles of the c stored tokens and of the s tokens of this pass.
        seen: keys and values [c + s, b, g, d] of every layer that has run; kept only where they are to be stored.
    """

    def __init__(self, stored: _Layers, key_roles: Tensor, is_committing: bool) -> None:
        self.key_roles = key_roles
        self.is_committing = is_committing
        self.seen: _Layers = {}
        self._stored = stored

    def extend(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The stored tokens of a layer followed by those of this pass.

        Args:
            layer_number: the layer that asks.
            key: [s, b, g, d] keys of this pass, rotary embedding applied.
            value: [s, b, g, d] values of this pass.

        Returns:
            Keys and values [c + s, b, g, d].
        """
        if layer_number in self._stored:
            stored_key, stored_value = self._stored[layer_number]
            key, value = torch.cat([stored_key, key]), torch.cat([stored_value, value])
        if self.is_committing:
            self.seen[layer_number] = (key.detach(), value.detach())
        return key, value


class KVCache:
    """Stands in front of the tokens of a forward pass; grows only by passes that are stored.

        cache = KVCache()
        prompt = cache.open(roles, is_committing=True)
        model.logits(clean prompt blocks, cached=prompt)
        cache.store(prompt)
        model.logits(noisy block, cached=cache.open(roles))     # reads the prompt, stores nothing

    Positions, block ids and doc ids of later passes must go on from the stored tokens.

    Attributes:
        roles: [b, c, 3] int32 roles of the c stored tokens, None while empty.
    """

    def __init__(self) -> None:
        self.roles: Tensor | None = None
        self._layers: _Layers = {}

    def __len__(self) -> int:
        return 0 if self.roles is None else self.roles.shape[1]

    def open(self, roles: Tensor, is_committing: bool = False) -> CachedPass:
        """A pass of tokens behind the stored ones.

        Args:
            roles: [b, s, 3] int32 roles of the tokens of the pass; copied.
            is_committing: the pass is to be stored.

        Raises:
            ValueError: tokens to be stored are neither clean nor padding.
        """
        is_storable = (roles[..., VIEW] == CLEAN_VIEW) | (roles[..., DOC] == PADDING_DOC)
        if is_committing and not bool(is_storable.all()):
            raise ValueError(
                "KVCache: only clean tokens can be stored; run the finished block again with "
                "view 0 and commit that pass."
            )
        # A copy: the caller may write the next block's roles over these.
        key_roles = roles.clone() if self.roles is None else torch.cat([self.roles, roles], dim=1)
        return CachedPass(self._layers, key_roles, is_committing)

    def store(self, done: CachedPass) -> None:
        """Keep the tokens of a pass that has run through all layers."""
        assert done.is_committing and done.seen, "only a pass that was opened to be stored has kept its keys"
        self._layers, self.roles = done.seen, done.key_roles
