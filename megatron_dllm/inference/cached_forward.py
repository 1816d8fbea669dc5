"""The forward pass of decoding by a megatron model, on one rank or on the ranks that share one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_dllm.diffusion.decoding_pass import DecodingPass
from megatron_dllm.diffusion.decoding_room import LOGITS_ELEMENTS
from megatron_dllm.diffusion.prediction import NUM_VALUES
from megatron_dllm.inference.pass_shapes import Needs, shape_for
from megatron_dllm.model.attention.kv_cache import KVCache
from megatron_dllm.model.gpt import DiffusionGPTModel
from megatron_dllm.parallel.groups import Groups


class CachedForward:
    """The `Forward` of `diffusion.decoding_pass`: committed tokens live in a `KVCache`."""

    def __init__(self, model: DiffusionGPTModel, groups: Groups | None = None) -> None:
        """Take a model with an empty cache.

        Args:
            model: this rank's part.
            groups: of this rank; None: the model is whole here.
        """
        self._model = model
        self._groups = groups
        self._cache = KVCache()
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def run(self, step: DecodingPass) -> Iterator[tuple[range, Tensor]]:
        """See `Forward.run`; a collective of the ranks that share the model."""
        config = self._model.config
        multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        num_rows, length = step.shape
        step = step.padded(num_rows, length + -length % multiple)
        states = self._states(step)
        return iter(()) if states is None else self._pieces(states, step.counts)

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Forward.copy`."""
        self._cache.copy(source, target, length)

    def _states(self, step: DecodingPass) -> Tensor | None:
        """Hidden states [P, h] of the wanted tokens; None on a stage without the head."""
        position_ids, roles = step.position_ids.to(self._device), step.roles.to(self._device)
        cached = self._cache.open(step.first_slot, position_ids, roles)
        tokens = (step.input_ids.to(self._device), position_ids, roles, step.wanted.to(self._device), cached)
        if self._groups is None or self._groups.pipeline.size() == 1:
            return self._model.states(*tokens)

        def forward_step(batches: Any, model: nn.Module) -> tuple[Tensor, None]:
            assert isinstance(model, DiffusionGPTModel), "the schedule hands on the model that it was given"
            return model.states(*tokens), None

        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[self._model],
            num_microbatches=1,
            seq_length=step.shape[1],
            micro_batch_size=step.shape[0],
            forward_only=True,
        )
        return found[0] if found else None

    @torch.no_grad()
    def _pieces(self, states: Tensor, counts: list[int]) -> Iterator[tuple[range, Tensor]]:
        """Rows and the logits of their wanted tokens, from hidden states [P, h]; `counts` of each row."""
        most = max(LOGITS_ELEMENTS // self._model.vocab_size, 1)
        begin, first, taken = 0, 0, 0
        for row, count in enumerate([*counts, most]):
            if taken and (taken + count > most or row == len(counts)):
                yield range(begin, row), self._model.head_logits(states[first : first + taken])
                begin, first, taken = row, first + taken, 0
            taken += count


class GroupPeers:
    """The `Peers` of `diffusion.decoding_pass`: the ranks that share a model's layers and experts."""

    def __init__(self, groups: Groups, device: torch.device) -> None:
        """Take the groups of this rank and its device."""
        self._groups, self._device = groups, device
        # Experts of ranks with other texts: every pass is one of all ranks, with equal numbers of tokens.
        self._is_in_step = groups.expert.size() > 1 and groups.data.size() > 1

    def agree(self, shape: tuple[int, int]) -> tuple[int, int]:
        """See `Peers.agree`: as many tokens as all ranks where they compute together, else this rank's own."""
        if not self._is_in_step:
            return shape
        most = torch.tensor(Needs.of(shape).numbers(), device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._groups.world)
        return shape_for(shape, Needs(*most.tolist()), self._groups.tensor.size())

    def share(self, found: Tensor | None, count: int) -> Tensor:
        """See `Peers.share`: from the last pipeline stage to the others."""
        pipeline = self._groups.pipeline
        if pipeline.size() == 1:
            assert found is not None, "a rank that has all layers has the head"
            return found
        values = torch.zeros(count, NUM_VALUES, dtype=torch.float64) if found is None else found
        sent = values.to(self._device)
        dist.broadcast(sent, group=pipeline, group_src=pipeline.size() - 1)
        return sent.cpu()
