"""A file of scores: read as it was written, refused where it is damaged or of other settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dllm.evaluation.scores_file import (
    check_content,
    open_scores,
    partial_path,
    read_begun,
    write_begun,
    write_scores,
)
from tests.unit.evaluation.made_header import HEADER

SCORES = -np.random.default_rng(0).uniform(1.0, 5000.0, HEADER.shape).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_scores(tmp_path / "pairs.scores", HEADER, SCORES)
    return tmp_path / "pairs.scores"


def test_scores_are_read_by_sample_and_epoch(path: Path) -> None:
    stored = open_scores(path)
    check_content(path)
    assert stored.header == HEADER and stored.by_view.dtype == np.float32
    found = stored.of(torch.tensor([9, 0, 3]), torch.tensor([1, 0, 1]))
    assert found.dtype == torch.float64
    assert found.tolist() == [SCORES[1, 9].tolist(), SCORES[0, 0].tolist(), SCORES[1, 3].tolist()]
    assert [entry.name for entry in path.parent.iterdir()] == ["pairs.scores"], "nothing else is left behind"


def test_an_earlier_file_is_replaced_as_a_whole(path: Path) -> None:
    write_scores(path, replace(HEADER, num_epochs=1), SCORES[:1])
    assert open_scores(path).by_view.shape == (1, 10, 3)


def test_a_file_is_as_large_as_its_numbers(path: Path) -> None:
    assert path.stat().st_size < SCORES.nbytes + 1024


@pytest.mark.parametrize("place", [0, 10, 40, 700, -60, -1])
def test_any_changed_byte_is_noticed(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs.scores"):
        open_scores(path)
        check_content(path)


@pytest.mark.parametrize("size", [0, 7, 20, 300, -1])
def test_a_file_that_is_cut_off_is_refused(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"pairs.scores .*(must|damaged).*score the pairs again"):
        open_scores(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.scores is no file: .*evaluate ... scores=FILE"):
        open_scores(tmp_path / "none.scores")


def test_half_written_scores_are_not_left_behind(tmp_path: Path) -> None:
    holes = SCORES.copy()
    holes[1, 2, 0] = np.nan
    with pytest.raises(AssertionError, match="a document has no score"):
        write_scores(tmp_path / "pairs.scores", HEADER, holes)
    assert list(tmp_path.iterdir()) == []


def test_what_a_scoring_has_kept_is_read_by_the_same_scoring_alone(tmp_path: Path) -> None:
    path, so_far = tmp_path / "pairs.scores", SCORES.copy()
    so_far[1, 4:] = np.nan
    assert read_begun(path, HEADER) is None
    write_begun(path, HEADER, so_far, {"epoch": 1})
    begun = read_begun(path, HEADER)
    assert begun is not None and begun.position == {"epoch": 1} and begun.num_scored == 14
    assert np.array_equal(begun.by_view, so_far, equal_nan=True)
    assert read_begun(path, replace(HEADER, seed=8)) is None, "of other settings"
    with pytest.raises(ValueError, match="is of a scoring that has not ended"):
        open_scores(partial_path(path))
    partial_path(path).write_bytes(partial_path(path).read_bytes()[:-1])
    assert read_begun(path, HEADER) is None, "damaged"
    write_scores(path, HEADER, SCORES)
    assert not partial_path(path).exists()
