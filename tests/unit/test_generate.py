"""The command line of generate."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dllm.config import RotaryScalingConfig
from megatron_dllm.generate import main, parse_arguments


def test_the_user_s_folder_goes_before_the_shipped_settings(tmp_path: Path) -> None:
    (tmp_path / "generate.yaml").write_text("defaults: [generate_schema, _self_]\nthreshold: 0.5\n")
    for flag in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        config = parse_arguments([*flag, "checkpoint=x", "prompt=a --config-dir=b"])
        assert (config.threshold, config.prompt) == (0.5, "a --config-dir=b")
    with pytest.raises(ValueError, match=r"--config-dir \(none\) must be a folder of recipes"):
        parse_arguments(["--config-dir", "none"])


def test_help_names_every_key_with_its_default_as_it_would_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"stop=[]", "checkpoint=???", "prompt=null", "resume=false", "threshold=0.95"} <= set(lines)


def test_a_scaling_is_given_as_one_group() -> None:
    words = ["checkpoint=x", "prompt=a", "rotary_scaling={kind: ntk, factor: 2, original_max_position_embeddings: 64}"]
    config = parse_arguments(words)
    config.validate()
    assert config.rotary_scaling == RotaryScalingConfig("ntk", 2.0, 64)
    with pytest.raises(ValueError, match=r"rotary_scaling.original_max_position_embeddings \(0\) must lie in \[8, "):
        parse_arguments([*words[:2], "rotary_scaling={factor: 2}"]).validate()
    assert parse_arguments(words[:2]).rotary_scaling is None
