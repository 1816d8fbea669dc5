"""Strings that end a text, found in its tokens and cut off its text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from megatron_dllm.diffusion.generation import Generation
from megatron_dllm.inference.stopping import StopStrings

PIECES = ["<eos>", "a", "b", "\n", "Q", ":", "c"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({piece: number for number, piece in enumerate(PIECES)}, unk_token="a"))
    made.decoder = Fuse()
    made.add_special_tokens(["<eos>"])
    return made


def ids_of(pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("text", "strings", "expected"),
    [
        ("abc", ("Q:",), None),
        ("abc", (), None),
        ("abQ:c", ("Q:",), 4),
        ("abQ:c", ("Q:", "b"), 2),
        ("Q:abQ:", ("Q:",), 2),
        ("a\n\nb", ("\n\n",), 3),
        ("", ("a",), None),
    ],
)
def test_the_fewest_tokens_that_hold_a_string(
    tokenizer: Tokenizer, text: str, strings: tuple[str, ...], expected: int | None
) -> None:
    assert StopStrings(tokenizer, strings).find(ids_of(text)) == expected


def test_the_text_ends_in_front_of_the_string(tokenizer: Tokenizer) -> None:
    stopping = StopStrings(tokenizer, ("Q:", "\n"))
    for text, reason, expected in (("ab\nQ:", "stop", "ab"), ("abQ:", "stop", "ab"), ("ab", "max_new_tokens", "ab")):
        assert stopping.text_of(Generation(ids_of(text), reason, [1], 0, [1] * len(text))) == expected
    assert stopping.text_of(Generation([*ids_of("ab"), 0], "eos", [1], 0, [1] * 3)) == "ab"
