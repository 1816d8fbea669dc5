"""Which checkpoints stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.checkpoint.retention import retire
from megatron_dllm.checkpoint.validation import Validation, write_validation
from megatron_dllm.run.names import MANIFEST, VALIDATION
from tests.unit.checkpoint.small_checkpoint import CONDITIONS, make_checkpoint, steps_in


def test_the_last_ones_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    deleted = retire(tmp_path, keep_last=2, keep_best=0, keep_every=0)
    assert [folder.name for folder in deleted] == ["step_0000010", "step_0000020"]
    assert steps_in(tmp_path) == [30, 40]
    assert not list(tmp_path.glob(".tmp*"))


def test_the_best_ones_stay(tmp_path: Path) -> None:
    for step, elbo in ((10, 3.0), (20, 1.0), (30, 2.0), (40, float("nan")), (50, None), (60, 5.0)):
        make_checkpoint(tmp_path, step, elbo)
    retire(tmp_path, keep_last=1, keep_best=2, keep_every=0)
    assert steps_in(tmp_path) == [20, 30, 60]


def test_the_best_are_chosen_among_those_that_can_be_merged(tmp_path: Path) -> None:
    for step, elbo, block_size in ((10, 1.0, 512), (20, 1.1, 512), (30, 3.0, 32), (40, 2.0, 32), (50, 4.0, 32)):
        make_checkpoint(tmp_path, step, elbo, block_size=block_size)
    retire(tmp_path, keep_last=1, keep_best=2, keep_every=0)
    assert steps_in(tmp_path) == [30, 40, 50]


def test_the_best_of_each_kind_of_measurement_stay(tmp_path: Path) -> None:
    """Validations on other text or at another target block size say nothing about the ones before."""
    other = replace(CONDITIONS, corpus="lengths:2")
    for step, elbo, conditions in (
        *((10, 3.0, CONDITIONS), (20, 2.0, CONDITIONS), (30, 9.0, other), (40, 8.0, other)),
        *((50, 7.0, None), (60, 5.0, CONDITIONS), (70, 9.5, other)),
    ):
        make_checkpoint(tmp_path, step, elbo, conditions=conditions)
    write_validation(tmp_path / "step_0000060", Validation({"32": 5.0, "4": 6.0}, {}, 4, CONDITIONS))
    retire(tmp_path, keep_last=1, keep_best=1, keep_every=0)
    assert steps_in(tmp_path) == [20, 40, 50, 60, 70]


def test_multiples_and_stage_ends_stay(tmp_path: Path) -> None:
    # Steps are as long as rows are full: the third save at the interval is some step or other.
    for step, number in ((11, 1), (15, None), (19, 2), (31, 3), (38, 4), (52, 5), (64, 6), (70, None), (75, 7)):
        make_checkpoint(tmp_path, step, is_stage_end=step == 15, save_number=number)
    retire(tmp_path, keep_last=1, keep_best=0, keep_every=3)
    assert steps_in(tmp_path) == [15, 31, 64, 75]


def test_a_damaged_validation_deletes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, elbo in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 5.0)):
        make_checkpoint(tmp_path, step, elbo)
    (tmp_path / "step_0000010" / VALIDATION).write_text('{"elbo": [')
    retire(tmp_path, keep_last=1, keep_best=1, keep_every=0)
    assert steps_in(tmp_path) == [10, 20, 40]
    assert "step_0000010 stays" in caplog.text


def test_the_only_good_one_is_never_deleted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    (make_checkpoint(tmp_path, 20) / "__0_0.distcp").unlink()
    (make_checkpoint(tmp_path, 30) / MANIFEST).unlink()
    assert retire(tmp_path, keep_last=1, keep_best=0, keep_every=0) == []
    assert steps_in(tmp_path) == [10]
