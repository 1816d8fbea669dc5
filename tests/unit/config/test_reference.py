"""Every key has a meaning, and the reference knows every key."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from megatron_dllm.compose import schema_keys
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.reference import SECTIONS, Key, keys_of, main, page


@dataclass
class _Inner:
    # Its size.
    size: int = 3


@dataclass
class _Outer:
    # Two lines
    # of meaning.
    name: str | None = None
    inner: _Inner = field(default_factory=_Inner)
    silent: bool = True
    # Many of them.
    many: dict[str, _Inner] = field(default_factory=dict)


def test_comments_become_meanings() -> None:
    assert list(keys_of(_Outer)) == [
        Key("name", "str | null", "null", "Two lines of meaning."),
        Key("inner.size", "int", "3", "Its size."),
        Key("silent", "bool", "true", ""),
        Key("many", "dict[str, _Inner]", "{}", "Many of them."),
        Key("many.NAME.size", "int", "3", "Its size."),
    ]


@pytest.mark.parametrize("schema", SECTIONS.values(), ids=lambda schema: schema.__name__)
def test_every_key_has_a_meaning(schema: type) -> None:
    silent = [key.name for key in keys_of(schema) if not key.meaning]
    assert not silent, "write the meaning and the unit into a comment above the field"


def test_the_reference_has_every_value_of_the_schema() -> None:
    names = {key.name.replace("NAME", "*") for key in keys_of(TrainConfig)}
    expected = set(schema_keys(TrainConfig))
    groups = {key for key in expected if any(other.startswith(f"{key}.") for other in expected)}
    assert expected - groups <= names <= expected


def test_the_page_holds_a_key_of_each_kind() -> None:
    text = page()
    assert (
        "| `schedule.stages.NAME.num_tokens` | int \\| null | `null` | Length of the stage in document tokens." in text
    )
    assert "| `run.name` | str | `???` |" in text
    assert "| `threshold` | float | `0.95` |" in text and "| `partition` | str \\| null | `null` |" in text


def test_the_command_prints_the_keys_that_begin_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimizer.adam_"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[::2]] == [
        f"optimizer.adam_{name}" for name in ("beta1", "beta2", "eps")
    ]
    with pytest.raises(
        ValueError, match=r"^'optimiser' must be the beginning of a key; the nearest keys are .*optimizer"
    ):
        main(["optimiser"])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
