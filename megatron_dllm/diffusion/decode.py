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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.roles import BLOCK, CLEAN_VIEW, VIEW

NOISY_VIEW = 1
STOP_EOS, STOP_MAX_NEW_TOKENS, STOP_CONTEXT_LENGTH = "eos", "max_new_tokens", "context_length"


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


@dataclass(frozen=True)
class Generation:
    """The result of decoding one prompt.

    Attributes:
        generated_ids: tokens after the prompt, the first eos included, cut at max_new_tokens.
        stop_reason: "eos", "max_new_tokens" or "context_length".
        steps_per_block: denoising passes of each generated block, in order.
        num_commit_forwards: passes that only stored clean keys and values: one for the prompt's whole
            blocks if there are any, one after each generated block that another block follows.
    """

    generated_ids: list[int]
    stop_reason: str
    steps_per_block: list[int]
    num_commit_forwards: int

    @property
    def num_denoising_forwards(self) -> int:
        """Passes that predicted masked tokens."""
        return sum(self.steps_per_block)

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens per denoising pass (TPF). Tokens that were cut off and commit passes do not count."""
        return len(self.generated_ids) / self.num_denoising_forwards


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
    config.validate()
    contract.validate()
    check_prompt(prompt_ids, contract)
    generator = torch.Generator(device=device).manual_seed(config.seed)
    block_size, context_length = contract.block_size, contract.context_length
    ids, steps_per_block, num_commits = list(prompt_ids), [], 0
    limit = min(len(prompt_ids) + config.max_new_tokens, context_length)
    num_whole = len(ids) // block_size * block_size
    if num_whole:
        _commit(forward, ids[:num_whole], 0, block_size, device)
        num_commits += 1
    while True:
        start = len(ids) // block_size * block_size
        end = min(start + block_size, context_length)
        known = ids[start:]
        block = torch.tensor(known + [contract.mask_token_id] * (end - len(ids)), dtype=torch.int64, device=device)
        is_masked = torch.arange(end - start, device=device) >= len(known)
        steps_per_block.append(_denoise(forward, block, is_masked, start, config, contract, generator))
        new_ids = block[len(known) :].tolist()
        ids += new_ids
        if len(ids) >= limit or _first_eos(new_ids, contract.eos_token_ids) is not None:
            break
        _commit(forward, ids[start:end], start, block_size, device)
        num_commits += 1
    generated_ids = ids[len(prompt_ids) : limit]
    stop_reason = STOP_CONTEXT_LENGTH if limit < len(prompt_ids) + config.max_new_tokens else STOP_MAX_NEW_TOKENS
    eos = _first_eos(generated_ids, contract.eos_token_ids)
    if eos is not None:
        generated_ids, stop_reason = generated_ids[: eos + 1], STOP_EOS
    return Generation(generated_ids, stop_reason, steps_per_block, num_commits)


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


def _first_eos(ids: Iterable[int], eos_token_ids: tuple[int, ...]) -> int | None:
    return next((i for i, token in enumerate(ids) if token in eos_token_ids), None)


def _places(start: int, length: int, block_size: int, view: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """position_ids [1, n] and roles [1, n, 3] of `length` tokens from position `start`."""
    position_ids = torch.arange(start, start + length, device=device).unsqueeze(0)
    roles = torch.zeros(1, length, 3, dtype=torch.int32, device=device)
    roles[..., BLOCK] = position_ids // block_size
    roles[..., VIEW] = view
    return position_ids, roles


def _commit(forward: Forward, ids: list[int], start: int, block_size: int, device: torch.device | str) -> None:
    position_ids, roles = _places(start, len(ids), block_size, CLEAN_VIEW, device)
    forward(torch.tensor([ids], dtype=torch.int64, device=device), position_ids, roles, commit=True)


def _denoise(
    forward: Forward,
    block: Tensor,
    is_masked: Tensor,
    start: int,
    config: DecodingConfig,
    contract: DecodingContract,
    generator: torch.Generator,
) -> int:
    """Fill the masked tokens of `block` [n] in place; returns the number of passes it took."""
    position_ids, roles = _places(start, len(block), contract.block_size, NOISY_VIEW, block.device)
    num_steps = 0
    while bool(is_masked.any()):
        logits = forward(block.unsqueeze(0), position_ids, roles, commit=False)
        assert logits is not None, "a forward that commits nothing must return logits"
        places = is_masked.nonzero().squeeze(1)
        token_ids, confidence = predict(logits[0, places], contract.mask_token_id, config, generator)
        is_accepted = accept(confidence, config.threshold, config.min_tokens_per_step)
        block[places[is_accepted]] = token_ids[is_accepted]
        is_masked = is_masked.index_fill(0, places[is_accepted], False)
        num_steps += 1
    return num_steps


def predict(
    logits: Tensor, mask_token_id: int, config: DecodingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose a token for every masked position.

    The confidence is the model's own probability of the chosen token, over the whole vocabulary and at
    temperature 1, also when sampling: so a threshold means the same whatever the sampling options, and
    a small top_k does not make every token look certain. The mask token keeps its share of the
    probability, as in SGLang, but is never chosen.

    Args:
        logits: [m, v] of the masked positions.
        mask_token_id: never predicted.
        config: temperature, top_p and top_k.
        generator: source of randomness, on the device of the logits.

    Returns:
        [m] int64 token ids, and [m] fp32 confidence.

    Raises:
        ValueError: a probability is not a number.
    """
    logits = logits.float()
    probabilities = torch.softmax(logits, dim=1)
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError(
            "logits (nan or inf) must be finite; the checkpoint has broken weights or overflows in its "
            "precision: compare with precision=fp32."
        )
    candidates = logits.index_fill(1, torch.tensor([mask_token_id], device=logits.device), float("-inf"))
    if config.temperature == 0.0:
        token_ids = candidates.argmax(dim=1)
    else:
        token_ids = _sample(candidates / config.temperature, config.top_p, config.top_k, generator)
    return token_ids, probabilities.gather(1, token_ids.unsqueeze(1)).squeeze(1)


def _sample(logits: Tensor, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw one token per row of `logits` [m, v] among its top_k and the smallest set with probability top_p."""
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    probabilities = torch.softmax(ordered, dim=1)
    if top_p < 1.0:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, rank).squeeze(1)


def accept(confidence: Tensor, threshold: float, min_tokens: int) -> Tensor:
    """Which predictions to keep: all above the threshold, and at least the `min_tokens` most probable.

    Args:
        confidence: [m] probability of each predicted token.
        threshold: keep every prediction that is more probable.
        min_tokens: kept even below the threshold; of equal ones the leftmost first.

    Returns:
        [m] bool.
    """
    is_accepted = confidence > threshold
    if int(is_accepted.sum()) < min_tokens:
        best = confidence.argsort(descending=True, stable=True)[:min_tokens]
        is_accepted[best] = True
    return is_accepted
