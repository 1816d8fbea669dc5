"""A text while blocks are written behind its prompt, and what it came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

STOP_EOS, STOP_MAX_NEW_TOKENS, STOP_CONTEXT_LENGTH = "eos", "max_new_tokens", "context_length"
STOP_TEXT = "stop"


def no_stop(generated: Sequence[int]) -> int | None:
    """The `Request.stop` of a text that only an eos or its length ends."""
    return None


@dataclass(frozen=True)
class Request:
    """A prompt and what it asks for.

    Attributes:
        ids: tokens of the prompt.
        max_new_tokens: most tokens that are generated.
        seed: of sampling.
        stop: asked after every block with the tokens generated so far, none behind an eos: how many of them make up
            the text if it ends there, else None.
    """

    ids: Sequence[int]
    max_new_tokens: int
    seed: int
    stop: Callable[[Sequence[int]], int | None] = no_stop


@dataclass(frozen=True)
class Generation:
    """The result of decoding one prompt.

    Attributes:
        generated_ids: tokens after the prompt, the first eos included, cut at max_new_tokens.
        stop_reason: "eos", "stop", "max_new_tokens" or "context_length".
        steps_per_block: denoising passes of each generated block, in order.
        num_commit_forwards: passes that only stored clean keys and values: one for the prompt's whole
            blocks if there are any, one after each generated block that another block follows. With a shift the latter
            also predict a token, and count as the first denoising pass of the block that follows.
        accepted_in_pass: for each generated token the denoising pass that accepted it; the first pass is 1, and they
            count on from block to block.
    """

    generated_ids: list[int]
    stop_reason: str
    steps_per_block: list[int]
    num_commit_forwards: int
    accepted_in_pass: list[int]

    @property
    def num_denoising_forwards(self) -> int:
        """Passes that predicted masked tokens."""
        return sum(self.steps_per_block)

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens per denoising pass (TPF). Tokens that were cut off and commit passes do not count."""
        return len(self.generated_ids) / self.num_denoising_forwards

    @property
    def tokens_per_forward_with_commits(self) -> float:
        """Generated tokens per pass of either kind, as an engine pays for them."""
        return len(self.generated_ids) / (self.num_denoising_forwards + self.num_commit_forwards)


@dataclass
class Text:
    """A prompt and what has been written behind it so far.

    Attributes:
        request: that it answers.
        index: of the request.
        generator: of its samples.
        ids: of the prompt and of the finished blocks.
        limit: most tokens that are kept, those of the prompt included.
        end: number of tokens at which an eos or a stop string ends the text, and its reason; else the limit's.
        begun: time at which it entered, of `time.perf_counter`.
    """

    request: Request
    index: int
    generator: torch.Generator
    ids: list[int]
    limit: int
    end: tuple[int, str]
    steps_per_block: list[int] = field(default_factory=list)
    num_commits: int = 0
    accepted_in_pass: list[int] = field(default_factory=list)
    is_finished: bool = False
    begun: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(cls, request: Request, index: int, context_length: int, device: torch.device | str) -> Text:
        """A text of which nothing but the prompt is known; it is sampled on a device."""
        generator = torch.Generator(device=device).manual_seed(request.seed)
        limit = len(request.ids) + request.max_new_tokens
        reason = STOP_CONTEXT_LENGTH if limit > context_length else STOP_MAX_NEW_TOKENS
        limit = min(limit, context_length)
        return cls(request, index, generator, list(request.ids), limit, (limit, reason))

    def add_block(self, block: list[int], passes: list[int], start: int, eos_token_ids: tuple[int, ...]) -> None:
        """Take over a finished block, and find out whether it ends the text.

        Args:
            block: its tokens, the known ones included.
            passes: pass that accepted each, counted from the block's first; 0 for known tokens.
            start: position of the block.
            eos_token_ids: any of these ends the text.
        """
        num_known, before = len(self.ids) - start, sum(self.steps_per_block)
        self.ids += block[num_known:]
        self.accepted_in_pass += [before + number for number in passes[num_known:]]
        self.steps_per_block.append(max(passes))
        self._find_end(start + num_known, eos_token_ids)
        # An eos behind the limit ends nothing that is kept, and is no reason to go on.
        self.is_finished |= len(self.ids) >= self.limit

    def _find_end(self, first_new: int, eos_token_ids: tuple[int, ...]) -> None:
        """See whether the tokens from place `first_new` on end the text."""
        prompt_length = len(self.request.ids)
        eos = _first_eos(self.ids[first_new : self.limit], eos_token_ids)
        stop_at = min(len(self.ids), self.limit) if eos is None else first_new + eos
        stop = self.request.stop(self.ids[prompt_length:stop_at])
        if stop is not None:
            self.end, self.is_finished = (prompt_length + stop, STOP_TEXT), True
        elif eos is not None:
            self.end, self.is_finished = (stop_at + 1, STOP_EOS), True

    def generation(self) -> Generation:
        """What it came to."""
        end, reason = self.end
        generated = self.ids[len(self.request.ids) : end]
        return Generation(
            generated, reason, self.steps_per_block, self.num_commits, self.accepted_in_pass[: len(generated)]
        )


def _first_eos(ids: Iterable[int], eos_token_ids: tuple[int, ...]) -> int | None:
    return next((i for i, token in enumerate(ids) if token in eos_token_ids), None)
