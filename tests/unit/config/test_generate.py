"""What decoding refuses, with name, value and a remedy in the message."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config import GenerateConfig
from tests.unit.config.configs import refusal_of


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(checkpoint=""), ("checkpoint (not given)", "name an HF or a run folder")),
        (dict(prompt=None), ("none is given", "exactly one of the four")),
        (dict(prompt=""), ("prompt ('')", "at least one token")),
        (dict(prompts_file="x"), ("(prompt, prompts_file)", "exactly one of the four")),
        (dict(threshold=0.0), ("threshold (0.0)", "(0, 1]")),
        (dict(max_new_tokens=0), ("max_new_tokens (0)", "positive")),
        (dict(temperature=-1.0), ("temperature (-1.0)", "0 takes the most probable")),
        (dict(top_p=0.0), ("top_p (0.0)", "(0, 1]")),
        (dict(top_k=-1), ("top_k (-1)", "0 keeps")),
        (dict(seed=-1), ("seed (-1)", "[0, 2^63)")),
        (dict(block_size=0), ("block_size (0)", "null takes the checkpoint's")),
        (dict(precision="fp8"), ("precision (fp8)", "fp32, bf16")),
        (dict(attention_backend="magic"), ("attention_backend (magic)", "dense")),
    ],
)
def test_generation_is_checked(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    right = GenerateConfig(checkpoint="runs/x", prompt="hello")
    right.validate()
    message = refusal_of(replace(right, **changes).validate)
    for part in parts:
        assert part in message
