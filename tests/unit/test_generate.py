"""What is taken for a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dllm.config import GenerateConfig
from megatron_dllm.generate import read_prompts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffdef f(\r\n\r\nclass A:\r\n", ["def f(", "class A:"]),
        ("a.txt", "one\u2028line\x0cof text\n", ["one\u2028line\x0cof text"]),
        ("a.jsonl", '\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "\\ufeffc"}', ["a\u2028b", "\ufeffc"]),
    ],
)
def test_prompts_of_a_file(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(GenerateConfig(checkpoint="c", prompts_file=str(tmp_path / name))) == expected
