"""One form of a blend, whatever way it is written; what is no blend is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dllm.compose import compose_train_config
from megatron_dllm.config.blend import BlendPart, blend_parts


def test_weights_become_shares() -> None:
    assert blend_parts("data.train", "a") == (BlendPart("a", 1.0),)
    assert blend_parts("data.train", [0.4, "a"]) == (BlendPart("a", 1.0),)
    assert blend_parts("data.train", [3, "a", 1.0, "b"]) == (BlendPart("a", 0.75), BlendPart("b", 0.25))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"data.train \(\[\]\) is not a blend; give one prefix, or weights and prefixes"),
        (["a", "b"], r"data.train: weight \(a\) must be a number above 0"),
        ([0.3, "a", 0.7], "is not a blend"),
        ([0.3, 2024], r"prefix \(2024\) must be text"),
        ([0, "a"], r"weight \(0\) must be"),
        ([-1.0, "a"], r"weight \(-1.0\)"),
        ([True, "a"], r"weight \(True\)"),
        ([float("nan"), "a"], r"weight \(nan\)"),
        ([1, "a", 2, "a"], "a stands there twice"),
        ({"a": 1}, "is not a blend"),
        (3, "is not a blend"),
        (None, r"data.train \(None\) is not a blend"),
    ],
)
def test_what_is_no_blend(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend_parts("data.train", value)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("[0.3,/data/web,0.7,/data/2024_01]", [0.3, "/data/web", 0.7, "/data/2024_01"]),
        ("[3, data/8e5, 7, 2024_01]", [3, "data/8e5", 7, "2024_01"]),
        ("[.5,a=b#c(d),1e-1,'e, f']", [0.5, "a=b#c(d)", 0.1, "e, f"]),
        ("data/[x]", "data/[x]"),
        ("'[x]'", "[x]"),
        ("2024_01", "2024_01"),
        ("[a,b]", "[a,b]"),
    ],
)
def test_on_the_command_line_texts_stay_as_typed(typed: str, expected: Any) -> None:
    assert compose_train_config([f"data.train={typed}", "run.name=x"]).data.train == expected


def test_a_stage_may_have_its_own_corpora() -> None:
    words = ["experiment=tiny_base", "run.name=x", "data.train=[1,a,3,b]"]
    config = compose_train_config(words)
    (name,) = config.schedule.stages
    assert [part.prefix for part in config.blend_of(name)] == ["a", "b"] and config.train_corpora == ("a", "b")
    config = compose_train_config([*words, f"schedule.stages.{name}.train=[1,c,1,b]"])
    assert config.blend_of(name) == (BlendPart("c", 0.5), BlendPart("b", 0.5)) and config.train_corpora == ("c", "b")
    with pytest.raises(ValueError, match=rf"schedule.stages.{name}.train: weight \(0\)"):
        compose_train_config([*words, f"schedule.stages.{name}.train=[0,c]"]).validate(1)
    with pytest.raises(ValueError, match=r"data.on_exhausted \(halt\) is not known"):
        compose_train_config([*words, "data.on_exhausted=halt"]).validate(1)
