"""The acceptance run's checks of whole runs: the recorded losses, what is noticed, and all of it on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import correct, decoding, whole
from benchmarks.gpu.golden import STAGES, model_words, recorded_steps, stage_words
from benchmarks.gpu.runs import LIMITS, compare_steps, differing_tensors
from benchmarks.gpu.settings import Settings
from benchmarks.ranks import run_ranks
from megatron_dllm.compose import compose_train_config
from tests.integration.tiny_chain import run_module


def _run_logged(words: list[str], log: str, environment: dict[str, str]) -> int:
    """What `python -m WORDS` does, in this process; its exit code."""
    output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.update(environment)
    return run_module(["-m", *words])


def run_in_a_rank(words: Sequence[str], log: Path, environment: Mapping[str, str], seconds: float) -> int:
    """In a process that has imported the libraries already, where a program of its own would first do that."""
    (code,) = run_ranks(_run_logged, 1, list(words), str(log), dict(environment), timeout_s=seconds)
    return code


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("cpu", True, tmp_path, 900.0, run=run_in_a_rank)


@pytest.mark.parametrize("is_choosing", [True, False])
def test_twenty_steps_of_all_stages_are_recorded(is_choosing: bool) -> None:
    steps = recorded_steps(is_choosing)
    assert [step["step"] for step in steps] == list(range(1, 21))
    assert list(dict.fromkeys(step["stage"] for step in steps)) == list(STAGES)


@pytest.mark.parametrize("is_small", [True, False])
def test_the_golden_run_has_stages_of_the_shipped_recipe(is_small: bool) -> None:
    words = ["experiment=tiny_convert", *stage_words(is_small), *model_words(is_choosing=False)]
    config = compose_train_config(words)
    config.model.validate()
    assert config.model.moe_router_topk == config.model.num_moe_experts
    expected = list(STAGES)[:2] if is_small else list(STAGES)
    assert list(config.schedule.stages) == expected
    assert [stage.num_tokens for stage in config.schedule.stages.values()] == [STAGES[name] for name in expected]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_or_a_norm_that_is_off_is_noticed(name: str) -> None:
    steps = recorded_steps(is_choosing=False)
    found = compare_steps(list(zip(steps, steps, strict=True)), LIMITS["fp32"])
    assert found.value == 0.0 and not found.is_failure and found.columns["steps"] == 20
    wrong = [step | {name: step[name] * (1.0 + 2e-5 * (step["step"] == 9))} for step in steps]
    found = compare_steps(list(zip(wrong, steps, strict=True)), LIMITS["fp32"])
    assert found.is_failure and found.value == pytest.approx(2e-5)
    assert found.columns[f"errors of {name}"].split()[8] == "2e-05"


def test_one_bit_of_one_tensor_is_noticed() -> None:
    tensors = {"a": torch.ones(3), "b": torch.arange(4.0)}
    assert differing_tensors(tensors, dict(tensors)) == ((0.0, ""), [])
    other = tensors | {"b": torch.tensor([0.0, 1.0, 2.0, 3.0 + 3e-7])}
    (error, name), names = differing_tensors(other, tensors)
    assert names == ["b"] and name == "b" and 0.0 < error < 1e-6


@pytest.mark.slow
def test_kernels_and_runs_on_the_cpu(settings: Settings) -> None:
    rows = {row["check"]: row for row in correct.rows(settings)}
    assert {row["status"] for name, row in rows.items() if "flex" not in name} == {"ok"}, rows
    assert [row["status"] for name, row in rows.items() if "flex" in name] == ["skipped", "skipped"]
    assert {"experts grouped, bf16", "experts sections, fp32", "head, bf16"} <= rows.keys()
    assert rows["golden run, fp32"]["steps"] == 7 and rows["resume, fastest operations"]["value"] == 0


@pytest.mark.slow
def test_the_whole_pipeline_on_the_cpu(settings: Settings) -> None:
    rows = list(whole.rows(settings))
    assert [row["status"] for row in rows] == ["ok"] * 7, rows
    assert rows[-1]["check"] == "decode" and rows[-1]["value"] > 0.0


@pytest.mark.ranks
def test_decoding_speed_on_the_cpu(settings: Settings) -> None:
    rows = list(decoding.rows(settings))
    assert [row["status"] for row in rows] == ["ok"] * 5, rows
    for row in rows[1:]:
        assert row["value"] > 0.0 and row["passes"] > 0
