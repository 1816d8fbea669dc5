"""Confidence-aware training through the loop, from a checkpoint, on plain text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_run import STAGES, checkpoints_of, read_steps, read_tensors, run_config, train_ranks, write_corpus
from megatron_dllm.config import CapConfig, CheckpointConfig, StageConfig, TrainConfig

# Complementary views, so that every token is guessed once; few steps at a rate at which differences show.
STAGE = replace(STAGES["decay"], num_tokens=800, lr_shape="constant", final_learning_rate=None, loss_weight="uniform")


def _config(folder: Path, name: str, stage: StageConfig, **checkpoint: Any) -> TrainConfig:
    config = run_config(folder, name, checkpoint=CheckpointConfig(keep_last=1, timeout_minutes=10.0, **checkpoint))
    return replace(config, schedule=replace(config.schedule, stages={"only": stage}))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A plain run, whose checkpoint the others start from."""
    folder = tmp_path_factory.mktemp("cap")
    write_corpus(folder / "corpus")
    config = _config(folder, "start", STAGE)
    assert train_ranks(1, config) == [0]
    return config


def _train(start: TrainConfig, name: str, cap: CapConfig, world_size: int = 1) -> tuple[list[dict[str, Any]], Any]:
    """The records and the last tensors of a run from the checkpoint."""
    folder = Path(start.run.root).parent
    config = _config(folder, name, replace(STAGE, cap=cap), load=str(folder / "runs" / "start"))
    assert train_ranks(world_size, config) == [0] * world_size
    steps = read_steps(config)
    return steps, read_tensors(max(checkpoints_of(config).glob("step_*")))


def test_coefficient_0_trains_as_without_it_and_a_positive_one_differs(start: TrainConfig) -> None:
    plain, plain_weights = _train(start, "plain", CapConfig())
    off, off_weights = _train(start, "off", CapConfig(coefficient=0.0, temperature=0.5))
    assert off == plain and off_weights.keys() == plain_weights.keys()
    assert all(bool((off_weights[name] == tensor).all()) for name, tensor in plain_weights.items())
    assert not [name for name in plain[0] if "confiden" in name or "entropy" in name]

    steps, _ = _train(start, "on", CapConfig(coefficient=2.0))
    first = steps[0]
    # The same weights and data: the loss is the plain one and what confidence adds to it.
    assert first["data_fingerprint"] == plain[0]["data_fingerprint"]
    assert first["confidence_loss"] > 0.0
    assert first["loss"] - first["confidence_loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert first["masked_nll"] == plain[0]["masked_nll"] and first["grad_norm"] != plain[0]["grad_norm"]
    _check_levels(first)

    both, _ = _train(start, "on_2", CapConfig(coefficient=2.0), world_size=2)
    for found, expected in zip(both, steps, strict=True):
        for name in (name for name in expected if "confiden" in name or "entropy" in name or name == "loss"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name


def _check_levels(record: dict[str, Any]) -> None:
    """At every noise level there are shares of confident guesses, right ones no more than the accuracy."""
    levels = [name.removeprefix("accuracy_t/") for name in record if name.startswith("accuracy_t/")]
    assert len(levels) == 10
    for level in levels:
        accuracy, right = record[f"accuracy_t/{level}"], record[f"confident_right_t/{level}"]
        assert 0.0 <= right <= accuracy and 0.0 <= record[f"confident_wrong_t/{level}"] <= 1.0 - accuracy
        assert (f"entropy_right_t/{level}" in record) == (accuracy > 0.0)
