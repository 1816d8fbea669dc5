"""What a test of long contexts refuses, and what it asks by default."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.config.needle import NeedleConfig
from tests.unit.config.configs import refusal_of, train_config


def _config(**changes: object) -> NeedleConfig:
    base = train_config()
    return NeedleConfig(**{item.name: getattr(base, item.name) for item in fields(TrainConfig)} | changes)


def test_lengths_and_stretches_follow_the_context() -> None:
    config = _config()
    config.validate(1)
    assert config.asked_lengths == [64, 128, 256] and config.stretch_length == 32
    config = _config(lengths=[100], stretch=64)
    config.validate(1)
    assert config.asked_lengths == [100] and config.stretch_length == 64


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(lengths=[512]), ("lengths (512)", "[64, 256]", "schedule.context_length")),
        (dict(lengths=[8]), ("lengths (8)", "[64, 256]")),
        (dict(depths=[1.5]), ("depths (1.5)", "[0, 1]")),
        (dict(depths=[]), ("depths ([])", "give one")),
        (dict(num_needles=-1), ("num_needles (-1)", "negative")),
        (dict(num_needles=0, num_documents=0), ("num_documents (0)", "give one of them")),
        (dict(num_choices=1), ("num_choices (1)", "at least 2")),
        (dict(stretch=0), ("stretch (0)", "positive")),
        (dict(needle="The number of {name}."), ("needle ('The number of {name}.')", "{value}")),
        (dict(question="Which number?"), ("question ('Which number?')", "{name}")),
        (dict(depths=[0.5, 0.5]), ("depths ([0.5, 0.5])", "each once")),
        (dict(answer=" {{value}}"), ("answer (' {{value}}')", "must hold {value}")),
        (dict(question="{name} or {value}?"), ("question ('{name} or {value}?')", "{name} alone", "twice")),
        (dict(needle="{name}: {value"), ("needle ('{name}: {value')", "must hold {value}")),
        (dict(needle="{ {name}: {value}"), ("needle ('{ {name}: {value}')", "other braces twice")),
        (dict(likelihood=replace(LikelihoodConfig(), num_views=0)), ("likelihood.num_views (0)", "positive")),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    message = refusal_of(lambda: _config(**changes).validate(1))
    for part in parts:
        assert part in message
