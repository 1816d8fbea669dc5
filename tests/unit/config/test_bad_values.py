"""Every key of the schema with what no key may hold: refused, naming the key. New keys are covered as they come."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import TrainConfig

WORDS = ["experiment=tiny_base", "run.name=x", "data.train=a", "data.validation=b", "data.tokenizer=c"]
BAD_NUMBERS = {int: (10**30, -(10**30)), float: (float("nan"), float("inf"), float("-inf"), 1e30, -1e30)}
BAD_TEXTS = ("", "  ", "a\0b")


def _keys(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values of a configuration."""
    entries = (
        config.items() if isinstance(config, dict) else ((f.name, getattr(config, f.name)) for f in fields(config))
    )
    found: list[tuple[str, Any]] = []
    for name, value in entries:
        key = f"{prefix}{name}"
        found += _keys(value, f"{key}.") if is_dataclass(value) or isinstance(value, dict) else [(key, value)]
    return found


def _set(config: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    setattr(config, last, value)


BASE = compose_train_config(WORDS)
CASES = [
    (key, bad)
    for key, value in _keys(BASE)
    if not isinstance(value, bool)
    for bad in (BAD_TEXTS if isinstance(value, str) else BAD_NUMBERS.get(type(value), ()))
]


def test_the_table_covers_the_schema() -> None:
    """Of the keys whose value is a number or a text, all are tried; some hundreds of inputs."""
    assert len(CASES) > 200
    assert {"model.layernorm_epsilon", "data.train", "optimizer.spike_factor"} <= {key for key, _ in CASES}


@pytest.mark.parametrize(("key", "bad"), CASES, ids=[f"{key}={bad!r}" for key, bad in CASES])
def test_what_no_key_may_hold_is_refused_by_name(key: str, bad: Any) -> None:
    config: TrainConfig = copy.deepcopy(BASE)
    _set(config, key, bad)
    with pytest.raises(ValueError, match=rf"{key.rsplit('.', 1)[-1]}\b") as caught:
        config.validate(1)
    assert "\n" not in str(caught.value)
