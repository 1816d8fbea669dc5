"""The report of chains that are not the demo's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dllm.report import results, write_report


def test_a_chain_without_validations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "convert").mkdir()
    (tmp_path / "convert" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"chain .* has no validation in .*set evaluation.num_tokens"):
        write_report(tmp_path)


def test_a_conversion_may_begin_autoregressively(tmp_path: Path) -> None:
    records = [
        {"step": 5, "stage": "anneal", "is_stage_end": True, "validation_elbo/ar": 2.0},
        {"step": 9, "stage": "decay", "is_stage_end": True, "validation_elbo/32": 3.0, "validation_elbo/4": 2.5},
    ]
    (line,) = results([], records, tmp_path, None)
    assert (line.name, line.measure, line.nats) == ("after decay", "ELBO, block 32", 3.0)
