"""Strings that end a text: found after every block, cut off at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from megatron_dllm.diffusion.generation import STOP_TEXT, Generation


@dataclass(frozen=True)
class StopStrings:
    """The strings that end a text, by the tokenizer that turns its tokens into text.

    Attributes:
        tokenizer: special tokens are no text.
        strings: any of these ends a text; empty: none does.
    """

    tokenizer: Tokenizer
    strings: tuple[str, ...]

    def find(self, generated: Sequence[int]) -> int | None:
        """The `Request.stop` of such texts: the fewest tokens whose text holds one of the strings; None: none does."""
        if not self.strings or not self._holds(generated, len(generated)):
            return None
        low, high = 0, len(generated)  # of so few tokens it does not, of so many it does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds(generated, middle) else (middle, high)
        return high

    def _holds(self, generated: Sequence[int], count: int) -> bool:
        text = self._text(generated[:count])
        return any(string in text for string in self.strings)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def text_of(self, generation: Generation) -> str:
        """The text in front of whatever has ended it, an eos or one of the strings."""
        text = self._text(generation.generated_ids)
        if generation.stop_reason != STOP_TEXT:
            return text
        return text[: min(place for string in self.strings if (place := text.find(string)) >= 0)]
