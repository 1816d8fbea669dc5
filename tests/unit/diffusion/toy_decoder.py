"""Small models that can be decoded, with the keys and values of every slot, and no tensors of batches inside."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_dllm.diffusion.decode import DecodingContract
from megatron_dllm.diffusion.decoding_pass import DecodingPass
from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, VIEW, visible

VOCAB, HIDDEN, MAX_LENGTH = 23, 16, 64
MASK, EOS, OTHER_EOS = 22, 21, 20
NO_EOS = 10_000
CONTRACT = DecodingContract(block_size=4, context_length=MAX_LENGTH, mask_token_id=MASK, eos_token_ids=(NO_EOS,))
PROMPT = [3, 1, 4, 1, 5, 9, 2]


class ToyModel:
    """Two layers of fixed random attention: a token's logits depend on the tokens it sees, and on theirs."""

    def __init__(self, seed: int = 0, sharpness: float = 6.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.embedding, self.position = draw(VOCAB, HIDDEN), draw(MAX_LENGTH, HIDDEN)
        self.layers = [[gain * draw(HIDDEN, HIDDEN) / HIDDEN**0.5 for gain in (1, 1, 3)] for _ in range(2)]
        self.head = draw(HIDDEN, VOCAB) * sharpness / HIDDEN**0.5

    def logits(self, ids: Tensor, positions: Tensor, roles: Tensor) -> Tensor:
        """[n, v] logits of n tokens that attend to one another as their roles allow."""
        hidden = self.embedding[ids] + self.position[positions]
        mask = visible(roles, roles)
        for query, key, value in self.layers:
            scores = (hidden @ query) @ (hidden @ key).T / HIDDEN**0.5
            hidden = torch.tanh(hidden + scores.masked_fill(~mask, -math.inf).softmax(1) @ (hidden @ value))
        return hidden @ self.head


Kept = tuple[list[tuple[Tensor, Tensor]], Tensor]


class CachedForward:
    """The toy model with the cache a serving engine has: keys and values of committed tokens, per slot and layer.

    Every row is computed by itself, so nothing can depend on the others.
    """

    def __init__(self, model: ToyModel) -> None:
        self.model = model
        self.slots: dict[int, Kept] = {}
        self.calls: list[tuple[bool, list[int], list[int], list[list[int]]]] = []
        self.num_passes = 0
        self.num_tokens = 0

    def run(self, step: DecodingPass) -> Iterator[tuple[range, Tensor]]:
        self.num_passes += 1
        logits = torch.zeros(*step.shape, VOCAB, dtype=torch.float64)
        for row in range(step.shape[0]):
            is_token = step.roles[row, :, DOC] >= 0
            if is_token.any():
                ids, positions, roles = (
                    part[row, is_token] for part in (step.input_ids, step.position_ids, step.roles)
                )
                logits[row, is_token] = self._row(step.first_slot + row, ids, positions, roles)
        yield range(step.shape[0]), logits.flatten(0, 1)[step.wanted]

    def _row(self, slot: int, ids: Tensor, positions: Tensor, roles: Tensor) -> Tensor:
        is_commit = bool((roles[:, VIEW] == CLEAN_VIEW).all())
        assert is_commit or bool((roles[:, VIEW] != CLEAN_VIEW).all()), "a row is clean or noisy"
        self.calls.append((is_commit, ids.tolist(), positions.tolist(), roles.tolist()))
        self.num_tokens += len(ids)
        empty = [(torch.zeros(0, HIDDEN).double(), torch.zeros(0, HIDDEN).double()) for _ in self.model.layers]
        kept, kept_roles = self.slots.get(slot, (empty, torch.zeros(0, 3, dtype=torch.int32)))
        start = int(positions[0])
        assert len(kept_roles) >= start, "the tokens in front have not been kept"
        hidden = self.model.embedding[ids] + self.model.position[positions]
        key_roles = torch.cat([kept_roles[:start], roles])
        mask = visible(roles, key_roles)
        new = []
        for (query, key, value), (old_keys, old_values) in zip(self.model.layers, kept, strict=True):
            keys = torch.cat([old_keys[:start], hidden @ key])
            values = torch.cat([old_values[:start], hidden @ value])
            new.append((keys, values))
            scores = (hidden @ query) @ keys.T / HIDDEN**0.5
            hidden = torch.tanh(hidden + scores.masked_fill(~mask, -math.inf).softmax(1) @ values)
        if is_commit:
            self.slots[slot] = new, key_roles
        return hidden @ self.model.head

    def copy(self, source: int, target: int, length: int) -> None:
        if not length:
            return
        kept, roles = self.slots[source]
        self.slots[target] = [(keys[:length], values[:length]) for keys, values in kept], roles[:length]


class ScriptedForward:
    """Logits that depend on the position alone: `script[position]` = (token, its probability)."""

    def __init__(self, script: dict[int, tuple[int, float]]) -> None:
        self.script = script
        self.num_commits = 0
        self.seen: list[list[int]] = []

    def run(self, step: DecodingPass) -> Iterator[tuple[range, Tensor]]:
        self.seen.append(step.input_ids[0].tolist())
        self.num_commits += int((step.roles[..., VIEW] == CLEAN_VIEW).all(dim=1).sum())
        logits = torch.empty(*step.shape, VOCAB)
        for row, positions in enumerate(step.position_ids.tolist()):
            for i, position in enumerate(positions):
                token, probability = self.script.get(position, (7, 0.99))
                logits[row, i] = math.log((1 - probability) / (VOCAB - 1))
                logits[row, i, token] = math.log(probability)
        yield range(step.shape[0]), logits.flatten(0, 1)[step.wanted]

    def copy(self, source: int, target: int, length: int) -> None:
        """Nothing is kept."""
