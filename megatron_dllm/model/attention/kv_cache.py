"""Keys and values of the clean tokens that decoding has finished with, layer by layer, in a slot for each text.

A token's place in its slot is its position, so rows of one pass may stand at different places. A pass writes its tokens
behind what its rows keep and attends to one slice of the memory, without copying it; noisy tokens are overwritten by
the next pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dllm.diffusion.decoding_room import room_for
from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, VIEW


class CachedPass:
    """One forward pass behind the tokens of a cache (`KVCache.open`).

    Attributes:
        key_roles: [b, k, 3] int32 roles of all keys that the layers see, padding included.
        has_stored: whether some row has tokens in front of those of this pass.
    """

    def __init__(self, cache: KVCache, slots: slice, position_ids: Tensor, key_roles: Tensor, has_stored: bool) -> None:
        self.key_roles, self.has_stored = key_roles, has_stored
        self._cache, self._slots, self._positions = cache, slots, position_ids
        self._rows = torch.arange(slots.start, slots.stop, device=position_ids.device).unsqueeze(1)

    def extend(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The stored tokens of a layer together with those of this pass.

        Args:
            layer_number: the layer that asks.
            key: [s, b, g, d] keys of this pass, rotary embedding applied.
            value: [s, b, g, d] values of this pass.

        Returns:
            Keys and values [k, b, g, d], views of the cache's memory; zeros or old ones where `key_roles` are padding.
        """
        num_keys = self.key_roles.shape[1]
        memories = self._cache.memory(layer_number, key, value)
        for memory, new in zip(memories, (key, value), strict=True):
            memory[self._rows, self._positions] = new.detach().transpose(0, 1)
        keys, values = (memory[self._slots, :num_keys].transpose(0, 1) for memory in memories)
        return keys, values


class KVCache:
    """Stands in front of the tokens of a forward pass.

        cache = KVCache()
        model.states(clean prompt blocks, cached=cache.open(0, positions, roles))    # kept: they are clean
        model.states(noisy block, cached=cache.open(0, positions, roles))            # reads the prompt, keeps nothing

    Only what lies in front of a pass is read, so a slot is used anew by a pass that begins at position 0.
    """

    def __init__(self) -> None:
        # [slots, capacity, 3] roles; keys and values [slots, capacity, g, d] of each layer.
        self._roles: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def open(self, first_slot: int, position_ids: Tensor, roles: Tensor) -> CachedPass:
        """A pass of tokens, row i in slot first_slot + i; clean ones are kept.

        Args:
            first_slot: of row 0.
            position_ids: [b, s] int64, each row's running on from its stored tokens.
            roles: [b, s, 3] int32 roles of the tokens of the pass.
        """
        starts = position_ids[:, 0]
        num_keys = int(position_ids[:, -1].max()) + 1
        slots = slice(first_slot, first_slot + len(roles))
        stored = self._make_room(slots.stop, num_keys, roles)[slots, :num_keys]
        places = torch.arange(num_keys, device=roles.device)
        key_roles = stored.clone()
        key_roles[..., DOC].masked_fill_(places >= starts.unsqueeze(1), PADDING_DOC)
        rows = torch.arange(len(roles), device=roles.device).unsqueeze(1)
        key_roles[rows, position_ids] = roles
        is_kept = (roles[..., VIEW] == CLEAN_VIEW) & (roles[..., DOC] != PADDING_DOC)
        kept_rows = rows.expand_as(is_kept)[is_kept]
        stored[kept_rows, position_ids[is_kept]] = roles[is_kept]
        return CachedPass(self, slots, position_ids, key_roles, bool((starts > 0).any()))

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of slot `source`."""
        if not length:
            return
        assert self._roles is not None, "an empty cache has no tokens to copy"
        self._make_room(target + 1, length, self._roles)
        self._roles[target, :length] = self._roles[source, :length]
        for number, layer in self._layers.items():
            for memory in self._fit(number, *layer):
                memory[target, :length] = memory[source, :length]

    def memory(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Memory [slots, capacity, g, d] of a layer whose keys and values are like `key` and `value` [s, b, g, d]."""
        return self._fit(layer_number, *self._layers.get(layer_number, (key[:0, :0], value[:0, :0])))

    def _fit(self, layer_number: int, *layer: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [slots, capacity, g, d], as large as the roles."""
        assert self._roles is not None, "a pass has been opened"
        sizes = self._roles.shape[:2]
        if layer_number not in self._layers or layer[0].shape[:2] != sizes:
            # Zeros: what is masked must be finite.
            larger = [old.new_zeros(*sizes, *old.shape[2:]) for old in layer]
            for old, memory in zip(layer, larger, strict=True):
                memory[: old.shape[0], : old.shape[1]] = old
            self._layers[layer_number] = (larger[0], larger[1])
        return self._layers[layer_number]

    def _make_room(self, num_slots: int, num_keys: int, like: Tensor) -> Tensor:
        """Roles [slots, capacity, 3] for at least so many; `like` [b, s, 3] are some."""
        old = self._roles
        slots, capacity = (0, 0) if old is None else old.shape[:2]
        if old is not None and slots >= num_slots and capacity >= num_keys:
            return old
        self._roles = like.new_full((max(slots, num_slots), room_for(num_keys, capacity), 3), PADDING_DOC)
        if old is not None:
            self._roles[: old.shape[0], : old.shape[1]] = old
        return self._roles
