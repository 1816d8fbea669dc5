"""A report compares validations that measured the same, and says what they measured."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dllm.reporting.held_out import alike, conditions_in, difference, measured_on
from megatron_dllm.reporting.history import read_history
from megatron_dllm.reporting.results import drawn_beside, results
from tests.unit.checkpoint.small_checkpoint import CONDITIONS
from tests.unit.reporting.folders import training_record, validation_record, write_run


def validation(step: int, elbo: float = 3.0, **changes: Any) -> dict[str, Any]:
    return {**validation_record(step, elbo), "conditions": asdict(replace(CONDITIONS, **changes))}


def test_lines_are_cut_where_the_measurement_changes() -> None:
    records = [validation(1), validation(2), validation(3, num_tokens=7), validation(4, num_tokens=7), validation(5)]
    assert [[record["step"] for record in part] for part in alike(records)] == [[1, 2], [3, 4], [5]]
    assert [len(part) for part in alike([validation_record(1, 3.0), validation_record(2, 3.0)])] == [2]
    assert alike([]) == []


def test_what_was_measured_is_said() -> None:
    records = [validation(1, num_tokens=7), validation(2, num_tokens=12034)]
    said = measured_on(records, "data/held_out")
    assert "12,034 document tokens of data/held_out (fingerprint lengths:1)" in said and "context length 64" in said
    assert measured_on([], "x") == "nothing was validated"
    assert measured_on([validation_record(1, 2.0)], "x") == "x"


@pytest.mark.parametrize("conditions", [None, [], "text", {}, {"corpus": "a"}, {**asdict(CONDITIONS), "colour": 1}])
def test_conditions_of_another_shape_are_none(conditions: object) -> None:
    record = {**validation_record(1, 2.0), "conditions": conditions}
    assert conditions_in(record) is None
    assert "not recorded" in difference(record, validation(2))


def test_conditions_of_a_stranger_are_text(tmp_path: Path) -> None:
    record = validation(1, num_tokens=["x"], corpus=5)
    assert "['x'] document tokens" in measured_on([record], "x")
    assert difference(record, validation(2)).startswith("corpus 5, not")


def test_the_table_marks_what_was_measured_otherwise(tmp_path: Path) -> None:
    records = [training_record(4), validation(4, 2.0, num_tokens=7), training_record(8), validation(8, 3.0)]
    run = write_run(tmp_path / "run", records)
    cells = [line.cells()[1] for line in results(read_history(run))]
    assert cells == ["ELBO, block 32 (num_tokens 7, not 100)", "ELBO, block 32"]


def test_runs_on_another_text_are_kept_apart(tmp_path: Path) -> None:
    """A chain whose base and conversion were measured on text, and whose last run on chats."""
    ar = {"stage": "ar", "validation_elbo/ar": 2.0}
    ends = {"base": {**validation(8), **ar}, "convert": validation(8, 3.0), "sft": validation(8, 1.0, corpus="chats")}
    del ends["base"]["validation_elbo/32"]
    for index, (name, end) in enumerate(ends.items()):
        write_run(tmp_path / name, [training_record(4), end], time=1.7e9 + index)
    history = read_history(tmp_path)
    noted = {line.name: line.note for line in results(history)}
    assert noted["sft: after stable"] == ""
    assert noted["AR base"] == noted["convert: after stable"] == "corpus lengths:1, not chats"
    beside = {track.name: drawn_beside(track, history)[1] for track in history.tracks}
    assert beside == {"base": None, "convert": 2.0, "sft": None}
