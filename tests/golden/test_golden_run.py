"""Training comes to what it came to before: the golden run in every layout, and that a difference would be seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_run import write_corpus
from tests.golden.golden_run import LAYOUTS, STAGES, differences, machine, read_record, train_layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_corpus(folder / "corpus")
    return folder


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_training_comes_to_what_was_recorded(name: str, folder: Path) -> None:
    recorded_on, expected = read_record()
    assert differences(train_layout(folder, name), expected[name], machine() == recorded_on) == []


def test_the_record_holds_every_layout_and_stage() -> None:
    _, expected = read_record()
    assert list(expected) == list(LAYOUTS)
    assert all(list(dict.fromkeys(step.stage for step in run.steps)) == list(STAGES) for run in expected.values())
    # The global batches are the same in every layout.
    assert len({tuple(step.fingerprint for step in run.steps) for run in expected.values()}) == 1


def test_the_smallest_difference_is_seen() -> None:
    golden = read_record()[1]["one_rank"]
    first = golden.steps[0]
    for change in (
        dict(loss=first.loss * (1 + 1e-15)),
        dict(grad_norm=first.grad_norm * (1 + 1e-15)),
        dict(fingerprint="0"),
        dict(stage="other"),
    ):
        changed = replace(golden, steps=[replace(first, **change), *golden.steps[1:]])
        assert len(differences(changed, golden, is_exact=True)) == 1
    assert differences(replace(golden, weights="0"), golden, is_exact=True)
    assert differences(replace(golden, steps=golden.steps[:-1]), golden, is_exact=True)
