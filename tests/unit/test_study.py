"""The command line of a study."""

from __future__ import annotations

import pytest

from megatron_dllm.study import main


def test_help_names_every_key_with_its_default_as_it_would_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"checkpoint=[]", "output=null", "factors=[0.5, 1.0, 2.0]", "batch_size=16"} <= set(lines)
