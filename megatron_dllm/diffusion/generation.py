"""A text while blocks are written behind its prompt, and what it came to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

STOP_EOS, STOP_MAX_NEW_TOKENS, STOP_CONTEXT_LENGTH = "eos", "max_new_tokens", "context_length"


@dataclass(frozen=True)
class Generation:
    """The result of decoding one prompt.

    Attributes:
        generated_ids: tokens after the prompt, the first eos included, cut at max_new_tokens.
        stop_reason: "eos", "max_new_tokens" or "context_length".
        steps_per_block: denoising passes of each generated block, in order.
        num_commit_forwards: passes that only stored clean keys and values: one for the prompt's whole
            blocks if there are any, one after each generated block that another block follows.
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


@dataclass
class Text:
    """A prompt and what has been written behind it so far.

    Attributes:
        ids: of the prompt and of the finished blocks.
        prompt_length: tokens of the prompt.
        limit: most tokens that are kept.
        stop_reason: why the text ends there, if no eos ends it before.
    """

    ids: list[int]
    prompt_length: int
    limit: int
    stop_reason: str
    steps_per_block: list[int] = field(default_factory=list)
    num_commits: int = 0
    accepted_in_pass: list[int] = field(default_factory=list)
    is_finished: bool = False

    @classmethod
    def begin(cls, prompt_ids: Sequence[int], max_new_tokens: int, context_length: int) -> Text:
        """A text of which nothing but the prompt is known."""
        limit = len(prompt_ids) + max_new_tokens
        if limit > context_length:
            return cls(list(prompt_ids), len(prompt_ids), context_length, STOP_CONTEXT_LENGTH)
        return cls(list(prompt_ids), len(prompt_ids), limit, STOP_MAX_NEW_TOKENS)

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
        eos = _first_eos(block[num_known:], eos_token_ids)
        self.is_finished = eos is not None or len(self.ids) >= self.limit

    def generation(self, eos_token_ids: tuple[int, ...]) -> Generation:
        """What it came to."""
        generated, stop_reason = self.ids[self.prompt_length : self.limit], self.stop_reason
        eos = _first_eos(generated, eos_token_ids)
        if eos is not None:
            generated, stop_reason = generated[: eos + 1], STOP_EOS
        passes = self.accepted_in_pass[: len(generated)]
        return Generation(generated, stop_reason, self.steps_per_block, self.num_commits, passes)


def _first_eos(ids: Iterable[int], eos_token_ids: tuple[int, ...]) -> int | None:
    return next((i for i, token in enumerate(ids) if token in eos_token_ids), None)
