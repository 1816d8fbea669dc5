"""A loaded model that decodes requests, on one rank or on many: its replicas share them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.decode import DecodingContract, Finished, decode_stream
from megatron_dllm.diffusion.generation import Generation, Request
from megatron_dllm.inference.cached_forward import CachedForward, GroupPeers
from megatron_dllm.model.gpt import DiffusionGPTModel
from megatron_dllm.parallel.groups import Groups

# Batches of requests that every replica decodes before the replicas exchange what they have: between the waste at the
# end of a round, where batches run dry, and how much an interrupted start loses.
_BATCHES_PER_ROUND = 8


@dataclass(frozen=True)
class Decoder:
    """What decodes.

    Attributes:
        model: this rank's part.
        groups: of this rank; no context parallelism, for the cache holds whole rows.
        contract: block grid and special tokens of the checkpoint.
        batch_size: most texts at a time, on each replica.
    """

    model: DiffusionGPTModel
    groups: Groups
    contract: DecodingContract
    batch_size: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def stream(self, requests: Sequence[Request], config: DecodingConfig) -> Iterator[Finished]:
        """Every text, on every rank, once it is known; a collective that must be read to its end.

        Args:
            requests: the same on all ranks.
            config: rule, threshold and sampling.

        Raises:
            ValueError: see `decode_stream`.
        """
        replicas, mine = self.groups.data.size(), self.groups.data.rank()
        if replicas == 1:
            yield from self._decode(requests, config)
            return
        round_size = replicas * self.batch_size * _BATCHES_PER_ROUND
        for start in range(0, len(requests), round_size):
            indices = range(start + mine, min(start + round_size, len(requests)), replicas)
            done = [(indices[text.index], text) for text in self._decode([requests[i] for i in indices], config)]
            everyones: list[list[tuple[int, Finished]]] = [[] for _ in range(replicas)]
            dist.all_gather_object(everyones, done, group=self.groups.data)
            for index, text in sorted((pair for part in everyones for pair in part), key=lambda pair: pair[0]):
                yield Finished(index, text.generation, text.seconds)

    def decode(self, requests: Sequence[Request], config: DecodingConfig) -> list[Generation]:
        """All texts in the order of the requests, on every rank; see `stream`."""
        found = {text.index: text.generation for text in self.stream(requests, config)}
        return [found[index] for index in range(len(requests))]

    def _decode(self, requests: Sequence[Request], config: DecodingConfig) -> Iterator[Finished]:
        """Texts of this replica."""
        forward, peers = self.passes()
        return decode_stream(forward, requests, config, self.contract, self.batch_size, self.device, peers)

    def passes(self) -> tuple[CachedForward, GroupPeers]:
        """The model with an empty cache, and the ranks that share it."""
        return CachedForward(self.model, self.groups), GroupPeers(self.groups, self.device)
