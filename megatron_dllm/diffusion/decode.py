"""Block-by-block decoding of many texts at once (LLaDA2.0 section 5.4), for any model that offers a forward pass.

The block grid starts at position 0 of the prompt. Whole prompt blocks are committed first, as clean tokens; the
prompt's tail shares the first generated block, where it stays as it is. Each pass predicts every masked token of a
text's block and keeps those it is sure of (`acceptance`). A finished block is run once more as clean tokens, so that
later blocks see keys and values computed without a mask: in training, too, they only ever saw clean copies.

Texts go at their own pace: in one pass some fill a block and others commit theirs; a text that has ended leaves, and a
waiting prompt takes its place. What a text becomes does not depend on the others.

With a shift, the slot before a token predicts it: inside a block its neighbour, of a block's first token the last one
of the block before, when that is run as clean tokens. So that pass also begins the next block, with its first token
accepted, as SGLang's HierarchyBlock does.

`block_size == 1` decodes from left to right, one token a step; `block_size >= context_length` is MDLM
decoding, where prompt and continuation are one block and nothing is ever committed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.decoding_batch import DecodingBatch
from megatron_dllm.diffusion.decoding_pass import Alone, BlockGrid, DecodingPass, Forward, Peers, clean_pass, idle_pass
from megatron_dllm.diffusion.generation import Generation, Request, Text
from megatron_dllm.diffusion.prediction import NUM_VALUES, predict
from megatron_dllm.diffusion.prefill import Entrant, plan_prefill

_ALONE = Alone()


@dataclass(frozen=True)
class DecodingContract:
    """What the checkpoint decides about decoding, and the user cannot change.

    Attributes:
        block_size: tokens denoised together.
        context_length: most tokens of prompt and continuation together. If `block_size` does not divide
            it, the last block is shorter.
        mask_token_id: stands for an unknown token; never generated.
        eos_token_ids: any of these ends the text.
        shift: the slot before a token predicts it; else its own.
        clean_block_size: tokens of finished blocks that see each other; None: block_size.
    """

    block_size: int
    context_length: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    shift: bool = False
    clean_block_size: int | None = None

    @property
    def grid(self) -> BlockGrid:
        """The blocks of noisy and of clean tokens."""
        return BlockGrid(self.block_size, self.clean_block_size or self.block_size)

    def validate(self) -> None:
        """Raise ValueError for impossible sizes, or if the mask token would end the text."""
        for name in ("block_size", "context_length"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name} ({value}) must be positive; give a number of tokens.")
        if self.block_size % self.grid.clean_block_size:
            raise ValueError(
                f"block_size ({self.block_size}) must be a multiple of {self.clean_block_size}, the clean_block_size "
                "that the checkpoint was trained with; leave block_size out, or give a multiple."
            )
        if self.mask_token_id in self.eos_token_ids:
            raise ValueError(
                f"mask_token_id ({self.mask_token_id}) must not be among eos_token_ids "
                f"{self.eos_token_ids}; the mask token must be a token of its own."
            )


@dataclass(frozen=True)
class Finished:
    """A text that has ended.

    Attributes:
        index: of its request.
        seconds: since it entered the batch.
    """

    index: int
    generation: Generation
    seconds: float


def requests_of(prompts: Sequence[Sequence[int]], config: DecodingConfig, first: int = 0) -> list[Request]:
    """Prompts with the length and the seeds of a configuration; the one with index i is sampled with seed + i.

    Args:
        prompts: token ids.
        config: max_new_tokens and seed.
        first: index of the first prompt.
    """
    return [Request(ids, config.max_new_tokens, config.seed + first + i) for i, ids in enumerate(prompts)]


def decode(
    forward: Forward, prompt_ids: Sequence[int], config: DecodingConfig, contract: DecodingContract
) -> Generation:
    """Continue one prompt; see `decode_all`."""
    return decode_all(forward, requests_of([prompt_ids], config), config, contract)[0]


def decode_all(
    forward: Forward,
    requests: Sequence[Request],
    config: DecodingConfig,
    contract: DecodingContract,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    peers: Peers = _ALONE,
) -> list[Generation]:
    """Continue prompts, in their order; see `decode_stream`."""
    found = {done.index: done for done in decode_stream(forward, requests, config, contract, batch_size, device, peers)}
    return [found[index].generation for index in range(len(requests))]


def decode_stream(
    forward: Forward,
    requests: Sequence[Request],
    config: DecodingConfig,
    contract: DecodingContract,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    peers: Peers = _ALONE,
) -> Iterator[Finished]:
    """Continue prompts until an eos, a stop, their max_new_tokens or the end of the context; each as soon as it ends.

    Each text is what its prompt alone would give. A block is always denoised to its end; tokens past the limit are cut
    off afterwards. On several ranks of one model all must call this with the same requests, and read it to its end.

    Args:
        forward: the model; what its slots held is overwritten.
        requests: prompts without a mask token.
        config: rule, threshold and sampling; lengths and seeds are the requests'.
        contract: block grid and special tokens of the checkpoint.
        batch_size: most texts at a time.
        device: where the logits are.
        peers: the other ranks.

    Raises:
        ValueError: an impossible setting, or a prompt that is empty, too long or holds the mask token;
            logits that are not finite.
    """
    config.validate()
    contract.validate()
    for request in requests:
        check_prompt(request.ids, contract)
    return _Decoder(forward, config, contract, batch_size, device, peers).run(requests)


class _Decoder:
    """A decoding with what does not change in it, and the texts that are on their way."""

    def __init__(
        self,
        forward: Forward,
        config: DecodingConfig,
        contract: DecodingContract,
        batch_size: int,
        device: torch.device | str,
        peers: Peers,
    ) -> None:
        self._forward, self._config, self._contract = forward, config, contract
        self._batch_size, self._device, self._peers = batch_size, device, peers
        self._batch = DecodingBatch(
            batch_size,
            contract.grid,
            contract.context_length,
            contract.mask_token_id,
            contract.eos_token_ids,
            config,
            contract.shift,
        )

    def run(self, requests: Sequence[Request]) -> Iterator[Finished]:
        """Decode all; yields each when it has ended."""
        waiting = deque(enumerate(requests))
        while True:
            self._enter(waiting)
            found = self._pass(self._batch.next_pass() if len(self._batch) else None)
            if found is None:
                return
            if len(self._batch):
                yield from self._leave(self._batch.take(found))

    def _enter(self, waiting: deque[tuple[int, Request]]) -> None:
        """Fill the batch up with waiting prompts."""
        num_entering = min(self._batch_size - len(self._batch), len(waiting))
        if not num_entering:
            return
        entering = [waiting.popleft() for _ in range(num_entering)]
        texts = [Text.begin(request, index, self._contract.context_length, self._device) for index, request in entering]
        present = [text.ids[: self._batch.num_kept(row)] for row, text in enumerate(self._batch.texts)]
        size = self._contract.block_size
        whole = [text.ids[: self._batch.num_prefilled(text)] for text in texts]
        for group in plan_prefill(present, whole, size):
            self._prefill(group)
        for text, ids in zip(texts, whole, strict=True):
            text.num_commits = int(bool(ids))
            self._batch.add(text)

    def _prefill(self, group: Sequence[Entrant]) -> None:
        """Store the whole blocks of some prompts."""
        for entrant in group:
            if entrant.source is not None:
                self._forward.copy(entrant.source, entrant.slot, entrant.num_shared)
        if any(entrant.num_computed for entrant in group):
            runs = [(entrant.num_shared, entrant.ids[entrant.num_shared :]) for entrant in group]
            self._pass(clean_pass(group[0].slot, runs, self._contract.grid))

    def _pass(self, step: DecodingPass | None) -> Tensor | None:
        """Compute a pass together with the peers.

        Args:
            step: that this rank needs; None: none.

        Returns:
            [P, NUM_VALUES] float64 predictions of its wanted tokens (`Proposals.packed`); None where no rank needs one.
        """
        shape = self._peers.agree((0, 0) if step is None else step.shape)
        if shape == (0, 0):
            return None
        step = (idle_pass() if step is None else step).padded(*shape)
        pieces = [self._predict(step, rows, logits) for rows, logits in self._forward.run(step) if len(logits)]
        if not len(step.wanted):
            return torch.zeros(0, NUM_VALUES, dtype=torch.float64)
        return self._peers.share(torch.cat(pieces) if pieces else None, len(step.wanted))

    def _predict(self, step: DecodingPass, rows: range, logits: Tensor) -> Tensor:
        """[p, NUM_VALUES] predictions of the wanted tokens of some rows, from their logits [p, v]."""
        # A row without wanted tokens may be that of a prompt that enters, or padding.
        asking = [row for row in rows if step.counts[row]]
        generators = [self._batch.texts[row].generator for row in asking]
        counts = [step.counts[row] for row in asking]
        trace, mask = self._batch.trace(asking), self._contract.mask_token_id
        return predict(logits, mask, self._config, generators, counts, trace).packed().cpu()

    def _leave(self, rows: Sequence[int]) -> Iterator[Finished]:
        """Take the texts of some rows out of the batch."""
        done = [self._batch.texts[row] for row in rows]
        for move in self._batch.remove(rows):
            self._forward.copy(move.source, move.target, move.num_kept)
        now = time.perf_counter()
        return (Finished(text.index, text.generation(), now - text.begun) for text in done)


def check_prompt(prompt_ids: Sequence[int], contract: DecodingContract) -> None:
    """Raise ValueError for a prompt that is empty, fills the context, or holds the mask token."""
    if not len(prompt_ids):
        raise ValueError("prompt ([]) is empty; give at least one token to continue from.")
    if len(prompt_ids) >= contract.context_length:
        raise ValueError(
            f"prompt ({len(prompt_ids)} tokens) must be shorter than context_length "
            f"({contract.context_length}); shorten the prompt or raise context_length."
        )
    if contract.mask_token_id in prompt_ids:
        raise ValueError(
            f"prompt holds the mask token ({contract.mask_token_id}) at position "
            f"{list(prompt_ids).index(contract.mask_token_id)}; take it out of the text."
        )
