"""Cutting gives what the json module and bytes.split give, wherever the pieces end."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_dllm.data.cutting import BrokenArrayError, array_elements, lines, whole

VALUES = [
    {"text": 'a "quoted" \\ word, [1, 2] {3}', "n": [1, [2, {"x": "]"}]]},
    "a string, with commas",
    "ends in a backslash \\",
    -1.5e3,
    None,
    [],
    {},
    [[], {"a": {}}],
    "größe 字 \u2028",
]


def pieces(content: bytes, generator: np.random.Generator) -> list[bytes]:
    """The content in up to eight pieces, cut anywhere; some may be empty."""
    cuts = sorted(generator.integers(0, len(content) + 1, size=7).tolist())
    return [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]


@pytest.mark.parametrize("seed", range(100))
def test_array_elements_wherever_the_pieces_end(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = [VALUES[n] for n in generator.integers(0, len(VALUES), size=generator.integers(1, 12))]
    content = json.dumps(values, indent=[None, 1][seed % 2], ensure_ascii=seed % 3 == 0).encode()
    found = list(array_elements(pieces(content, generator), 1 << 20))
    assert [json.loads(element) for element in found if element is not None] == values
    assert len(found) == len(values)


@pytest.mark.parametrize("seed", range(30))
def test_lines_wherever_the_pieces_end(seed: int) -> None:
    generator = np.random.default_rng(seed)
    content = bytes(generator.choice(np.frombuffer(b"ab\n\r", np.uint8), size=40))
    expected = content.split(b"\n")
    assert list(lines(pieces(content, generator), 40)) == (expected if expected[-1] else expected[:-1])
    assert whole(pieces(content, generator), 40) == content


@pytest.mark.parametrize("seed", range(10))
def test_what_is_longer_than_the_limit_is_passed_over(seed: int) -> None:
    generator = np.random.default_rng(seed)
    content = b'[1,"' + b"x" * 9 + b'","' + b"y" * 8 + b'", 4]'
    assert list(array_elements(pieces(content, generator), 10)) == [b"1", None, b'"yyyyyyyy"', b" 4"]
    assert list(lines(pieces(b"12345\n123456\n\n123456", generator), 5)) == [b"12345", None, b"", None]
    assert whole(pieces(b"123456", generator), 5) is None


def test_an_empty_array() -> None:
    assert list(array_elements([b" [", b" ", b"]\n"], 10)) == [b" "]
    assert whole([], 10) == b""


@pytest.mark.parametrize("content", ["[", "[1", "[1,", '["a]', '["a\\"]', "[[1]", '[{"a": 1]'])
def test_an_array_without_an_end(content: str) -> None:
    with pytest.raises(BrokenArrayError, match="does not end"):
        list(array_elements([content.encode()], 10))


@pytest.mark.parametrize("content", ["[1] 2", "[1]]", "[1]\n[2]", '[{"a": 1}}, 2]'])
def test_something_behind_the_end(content: str) -> None:
    for cut in range(len(content)):
        with pytest.raises(BrokenArrayError, match="something follows the end"):
            list(array_elements([content[:cut].encode(), content[cut:].encode()], 10))
