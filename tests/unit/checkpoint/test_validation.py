"""validation.json is read as it was written, and says what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_dllm.checkpoint.validation import Conditions, Validation, read_validation, write_validation
from tests.unit.checkpoint.small_checkpoint import CONDITIONS

VALIDATION = Validation({"32": 2.5, "4": 2.0}, {"32": 1.25, "4": 1.0}, 32, CONDITIONS)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_validation(tmp_path) is None
    write_validation(tmp_path, VALIDATION)
    assert read_validation(tmp_path) == VALIDATION
    assert json.loads((tmp_path / "validation.json").read_text())["conditions"]["num_tokens"] == 100


def test_a_file_of_an_earlier_version_has_no_conditions(tmp_path: Path) -> None:
    content = {"elbo": {"32": 2.5}, "bits_per_byte": {}, "target_block_size": 32, "num_tokens": 600}
    (tmp_path / "validation.json").write_text(json.dumps(content))
    found = read_validation(tmp_path)
    assert found == Validation({"32": 2.5}, {}, 32)
    assert found.elbo == 2.5
    assert "not recorded" in found.difference(VALIDATION) and not found.difference(found)


@pytest.mark.parametrize("name", [item.name for item in fields(Conditions)])
def test_every_condition_makes_a_difference(name: str) -> None:
    value = 7 if isinstance(getattr(CONDITIONS, name), int) else "other"
    changed = replace(VALIDATION, conditions=replace(CONDITIONS, **{name: value}))
    assert changed.difference(VALIDATION) == f"{name} {value}, not {getattr(CONDITIONS, name)}"
    assert not VALIDATION.difference(replace(VALIDATION, nats_per_token={"4": 1.0}))


@pytest.mark.parametrize(
    "content",
    [
        {"elbo": {"32": True}},
        {"elbo": [2.5]},
        {"target_block_size": "32"},
        {"conditions": []},
        {"conditions": {"corpus": "a"}},
        {"conditions": {**vars(CONDITIONS), "colour": "red"}},
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: dict[str, object]) -> None:
    (tmp_path / "validation.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"validation\.json"):
        read_validation(tmp_path)
