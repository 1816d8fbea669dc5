"""A checkpoint that an earlier version wrote continues as it would have continued then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import checkpoints_of, train_here, write_corpus
from tests.golden.earlier_run import CHECKPOINT, FOLDER, STEPS, earlier_config, steps_of
from tests.golden.golden_run import TOLERANCE, machine

# Relative: on the machine that recorded them, numbers differ by the order of sums alone, which has changed (5e-8).
OTHER_ORDER = 1e-6


def test_an_earlier_run_continues_to_the_same_numbers(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    config = earlier_config(tmp_path)
    checkpoints_of(config).mkdir(parents=True)
    shutil.copytree(FOLDER / CHECKPOINT, checkpoints_of(config) / CHECKPOINT)

    assert run_ranks(train_here, 1, config, timeout_s=500.0) == [0]

    recorded_on, *expected = (FOLDER / STEPS).read_text(encoding="utf-8").splitlines()
    first = int(CHECKPOINT.removeprefix("step_")) + 1
    found = steps_of(config, first)
    assert len(found) == len(expected) >= 4
    tolerance = OTHER_ORDER if machine() == recorded_on else TOLERANCE
    for mine, theirs in zip((line.split() for line in found), (line.split() for line in expected), strict=True):
        assert (mine[0], mine[1], mine[4]) == (theirs[0], theirs[1], theirs[4])
        assert [float(v) for v in mine[2:4]] == pytest.approx([float(v) for v in theirs[2:4]], rel=tolerance)


def test_the_kept_checkpoint_is_in_mid_stage_and_mid_chunk() -> None:
    state = json.loads((FOLDER / CHECKPOINT / "state.json").read_text())
    contract = json.loads((FOLDER / CHECKPOINT / "contract.json").read_text())
    assert not contract["is_stage_end"] and contract["stage"] == "mdlm"
    assert len(state["stream"]["emitted"]) == 3, "rows were emitted under several geometries"
