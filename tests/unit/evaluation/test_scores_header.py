"""Scores of other settings are refused by the name of what differs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.evaluation.scores_header import check_header
from tests.unit.evaluation.made_header import HEADER

PATH = Path("pairs.scores")
OTHERS = {
    "checkpoint": "d" * 64,
    "corpus": "e" * 64,
    "chat_template": None,
    "seed": 8,
    "block_size": 8,
    "context_length": 64,
    "fill": "none",
    "turn_boundary": "last",
    "precision": "bf16",
    "num_documents": 12,
}


@pytest.mark.parametrize("name", OTHERS)
def test_scores_of_another_setting_are_refused_by_its_name(name: str) -> None:
    ours = replace(HEADER, **{name: OTHERS[name]})
    message = f"{name} ({getattr(HEADER, name)}) differs from this run's ({OTHERS[name]}); score the pairs again"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_header(PATH, HEADER, ours)


@pytest.mark.parametrize(("name", "value"), [("num_views", 8), ("t_min", 0.1), ("view_relation", "independent")])
def test_scores_under_other_noise_are_refused_by_name(name: str, value: object) -> None:
    ours = replace(HEADER, noise={**HEADER.noise, name: value})
    with pytest.raises(ValueError, match=rf"noise.{name} \({HEADER.noise[name]}\) differs from this run's \({value}\)"):
        check_header(PATH, HEADER, ours)


@pytest.mark.parametrize("lacks", ["the file", "the run"])
def test_a_field_of_the_noise_that_one_of_them_lacks_is_a_difference(lacks: str) -> None:
    less = replace(HEADER, noise={name: value for name, value in HEADER.noise.items() if name != "is_count"})
    header, ours = (less, HEADER) if lacks == "the file" else (HEADER, less)
    values = ("None", "True") if lacks == "the file" else ("True", "None")
    with pytest.raises(ValueError, match=r"noise.is_count \({}\) differs from this run's \({}\)".format(*values)):
        check_header(PATH, header, ours)


def test_the_epochs_of_the_run_must_be_there() -> None:
    check_header(PATH, HEADER, HEADER)
    check_header(PATH, HEADER, replace(HEADER, num_epochs=1))
    with pytest.raises(ValueError, match=r"the scores of 2 epochs, .* and the schedule reads the corpus 3 times"):
        check_header(PATH, HEADER, replace(HEADER, num_epochs=3))
