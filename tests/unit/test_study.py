"""The command line of a study."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config.study import StudyConfig
from megatron_dllm.study import main, warnings


def test_help_names_every_key_with_its_default_as_it_would_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"checkpoint=[]", "output=null", "factors=[0.5, 1.0, 2.0]", "batch_size=16"} <= set(lines)


def test_how_tasks_are_asked_has_no_effect_on_questions() -> None:
    config = StudyConfig(checkpoint=["runs/x"], tasks=["sort"], num_fewshot=2)
    (warning,) = warnings(config)
    assert warning.startswith("num_fewshot (2) has no effect without a task of lm-evaluation-harness")
    assert not warnings(replace(config, tasks=["sort", "gsm8k"])) and not warnings(replace(config, num_fewshot=None))
