"""Block-by-block threshold decoding (LLaDA2.0 section 5.4), for any model that offers a forward pass.

The block grid starts at position 0 of the prompt. Whole prompt blocks are committed first, as clean
tokens; the prompt's tail shares the first generated block, where it stays as it is. Each step predicts
every masked token of the block and keeps those it is sure of. A finished block is run once more as
clean tokens, so that later blocks see keys and values computed without a mask: in training, too, they
only ever saw clean copies.

`block_size == 1` decodes from left to right, one token a step; `block_size >= context_length` is MDLM
decoding, where prompt and continuation are one block and nothing is ever committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.generation import Generation, Text
from megatron_dllm.diffusion.prediction import accept, predict
from megatron_dllm.diffusion.roles import BLOCK, CLEAN_VIEW, VIEW

NOISY_VIEW = 1


class Forward(Protocol):
    """A model's forward pass, with its own cache of keys and values; every prompt needs a fresh one."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, roles: Tensor, commit: bool) -> Tensor | None:
        """Run the tokens of one block (or of the prompt's whole blocks) after everything committed so far.

        Args:
            input_ids: [b, n] int64, token ids; the mask token where nothing is known yet.
            position_ids: [b, n] int64, places from the prompt's start.
            roles: [b, n, 3] int32 (doc, block, view); view 1 while a block is denoised, 0 in a commit.
            commit: keep these tokens' keys and values for all later calls. Otherwise nothing is kept.

        Returns:
            [b, n, v] logits; position i predicts token i. Never read after a commit, so None will do there.
        """


@dataclass(frozen=True)
class DecodingContract:
    """What the checkpoint decides about decoding, and the user cannot change.

    Attributes:
        block_size: tokens denoised together.
        context_length: most tokens of prompt and continuation together. If `block_size` does not divide
            it, the last block is shorter.
        mask_token_id: stands for an unknown token; never generated.
        eos_token_ids: any of these ends the text.
    """

    block_size: int
    context_length: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]

    def validate(self) -> None:
        """Raise ValueError for impossible sizes, or if the mask token would end the text."""
        for name in ("block_size", "context_length"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name} ({value}) must be positive; give a number of tokens.")
        if self.mask_token_id in self.eos_token_ids:
            raise ValueError(
                f"mask_token_id ({self.mask_token_id}) must not be among eos_token_ids "
                f"{self.eos_token_ids}; the mask token must be a token of its own."
            )


def decode(
    forward: Forward,
    prompt_ids: Sequence[int],
    config: DecodingConfig,
    contract: DecodingContract,
    device: torch.device | str = "cpu",
) -> Generation:
    """Continue one prompt until an eos, max_new_tokens or the end of the context.

    A block is always denoised to its end; tokens past max_new_tokens are cut off afterwards.

    Args:
        forward: the model, with an empty cache.
        prompt_ids: token ids of the prompt, without a mask token.
        config: threshold, sampling and length.
        contract: block grid and special tokens of the checkpoint.
        device: where the tensors given to `forward` live.

    Raises:
        ValueError: an impossible setting, or a prompt that is empty, too long or holds the mask token;
            logits that are not finite.
    """
    return decode_together(forward, [prompt_ids], config, contract, device)[0]


def decode_together(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    contract: DecodingContract,
    device: torch.device | str = "cpu",
) -> list[Generation]:
    """Continue several prompts in the same passes; each text is what the prompt alone would give.

    A finished text stays in the passes until the last one has finished, so texts of like length go well together.

    Args:
        forward: the model, with an empty cache.
        prompts: token ids of the prompts; all have the same number of whole blocks (len // block_size). The one with
            index i is sampled with seed + i.
        config: threshold, sampling and length.
        contract: block grid and special tokens of the checkpoint.
        device: where the tensors given to `forward` live.

    Raises:
        ValueError: as `decode`.
    """
    config.validate()
    contract.validate()
    for prompt_ids in prompts:
        check_prompt(prompt_ids, contract)
    block_size = contract.block_size
    (num_whole,) = {len(prompt_ids) // block_size for prompt_ids in prompts}
    texts = [Text.begin(prompt_ids, config.max_new_tokens, contract.context_length) for prompt_ids in prompts]
    generators = [torch.Generator(device=device).manual_seed(config.seed + index) for index in range(len(prompts))]
    start = num_whole * block_size
    if start:
        whole = torch.tensor([text.ids[:start] for text in texts], dtype=torch.int64, device=device)
        _commit(forward, whole, 0, block_size, texts)
    while True:
        end = min(start + block_size, contract.context_length)
        block, is_masked = _open_block(texts, start, end, contract.mask_token_id, device)
        passes = _denoise(forward, block, is_masked, start, config, contract, generators)
        for text, row, row_passes in zip(texts, block.tolist(), passes.tolist(), strict=True):
            if not text.is_finished:
                text.add_block(row, row_passes, start, contract.eos_token_ids)
        if all(text.is_finished for text in texts):
            return [text.generation(contract.eos_token_ids) for text in texts]
        _commit(forward, block, start, block_size, texts)
        start = end


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


def _places(start: int, ids: Tensor, block_size: int, view: int) -> tuple[Tensor, Tensor]:
    """position_ids [b, n] and roles [b, n, 3] of the tokens `ids` [b, n], which begin at position `start`."""
    position_ids = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
    roles = torch.zeros(*ids.shape, 3, dtype=torch.int32, device=ids.device)
    roles[..., BLOCK] = position_ids // block_size
    roles[..., VIEW] = view
    return position_ids, roles


def _commit(forward: Forward, ids: Tensor, start: int, block_size: int, texts: Sequence[Text]) -> None:
    """Store the clean tokens `ids` [b, n] from position `start`; counts the pass for the texts that need it."""
    position_ids, roles = _places(start, ids, block_size, CLEAN_VIEW)
    forward(ids, position_ids, roles, commit=True)
    for text in texts:
        text.num_commits += not text.is_finished


def _open_block(
    texts: Sequence[Text], start: int, end: int, mask_token_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Ids [b, n] of the block from `start` to `end`, and [b, n] which are to be found; none of a finished text."""
    known = [[] if text.is_finished else text.ids[start:] for text in texts]
    rows = [ids + [mask_token_id] * (end - start - len(ids)) for ids in known]
    num_known = [end - start if text.is_finished else len(ids) for text, ids in zip(texts, known, strict=True)]
    block = torch.tensor(rows, dtype=torch.int64, device=device)
    return block, torch.arange(end - start, device=device) >= torch.tensor(num_known, device=device).unsqueeze(1)


def _denoise(
    forward: Forward,
    block: Tensor,
    is_masked: Tensor,
    start: int,
    config: DecodingConfig,
    contract: DecodingContract,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Fill the masked tokens of a block in place.

    Args:
        forward: the model.
        block: [b, n] int64 tokens, the mask token where they are to be found; filled in place.
        is_masked: [b, n] bool, which are to be found; all False afterwards.
        start: position of the block.
        config: threshold and sampling.
        contract: block grid and special tokens.
        generators: of each row's samples.

    Returns:
        [b, n] int64 pass that accepted a token, from 1 on; 0 where it was known.
    """
    position_ids, roles = _places(start, block, contract.block_size, NOISY_VIEW)
    passes = torch.zeros_like(block)
    while bool(is_masked.any()):
        logits = forward(block, position_ids, roles, commit=False)
        assert logits is not None, "a forward that commits nothing must return logits"
        number = int(passes.max()) + 1
        for row in is_masked.any(dim=1).nonzero().squeeze(1).tolist():
            places = is_masked[row].nonzero().squeeze(1)
            token_ids, confidence = predict(logits[row, places], contract.mask_token_id, config, generators[row])
            is_accepted = accept(confidence, config.threshold, config.min_tokens_per_step)
            block[row, places[is_accepted]] = token_ids[is_accepted]
            is_masked[row, places[is_accepted]] = False
            passes[row, places[is_accepted]] = number
    return passes
