"""A method that is one file of mathematics and one of data trains through the unchanged loop, step and loader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import STAGES, checkpoints_of, read_metrics, run_config
from megatron_dllm.config import TrainConfig, TrainingConfig
from megatron_dllm.data.batch import Batch
from tests.toy_objective import LAMBDA, toy_objective
from tests.toy_source import ToySource, place_of, token_of


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """One stage, without what would make the first step differ from a plain forward and backward pass."""
    config = run_config(tmp_path, "toy", training=TrainingConfig())
    return replace(config, schedule=replace(config.schedule, stages={"only": STAGES["warmup"]}))


def _train(config: TrainConfig) -> int:
    from megatron_dllm.train import train
    from megatron_dllm.training.parts import Parts

    return train(config, lambda: Parts(objective_of=toy_objective, open_source=lambda prefix, config: ToySource()))


def _check_tokens(batch: Batch) -> None:
    """Every target is the token that the formula writes there."""
    for segment, position, target in zip(
        batch.target_segments.tolist(),
        batch.position_ids.flatten()[batch.target_positions].tolist(),
        batch.target_ids.tolist(),
        strict=True,
    ):
        document, offset = place_of(int(batch.sample_ids[segment]))
        assert target == token_of(document, offset + position)


def _expected_first_step(config: TrainConfig) -> tuple[float, float, float]:
    """Loss, mean squared NLL and gradient norm of the first step, computed without the program's step or schedule."""
    from megatron_dllm.data.geometry import RowGeometry
    from megatron_dllm.data.loader import BatchLoader, RowDataset
    from megatron_dllm.data.packing import RowStream
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_chunks

    (model,) = build_chunks(config, groups.initialize(config.parallel, config.run))
    stage, source = config.schedule.stages["only"], ToySource()
    geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
    noise = toy_objective(stage, config.noise).noise
    ids = config.model.mask_token_id, config.model.pad_token_id
    dataset = RowDataset(source, geometry, noise, config.run.seed, *ids)
    stream = RowStream(source.document_lengths, config.run.seed, config.data.packing_chunk)
    (batch,) = next(iter(BatchLoader(dataset, stream, global_batch_size=4, micro_batch_size=4))).micro_batches
    _check_tokens(batch)
    nll = model(batch).nll
    loss = sum(w * n + LAMBDA * n**2 for w, n in zip(batch.loss_weights, nll, strict=True)) / batch.num_maskable
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
    squares = nll.detach().square().sum() / batch.num_maskable
    return float(loss.detach()), float(squares), float(norm)


def test_a_toy_objective_and_a_toy_source_train_through_the_unchanged_loop(config: TrainConfig) -> None:
    (expected,) = run_ranks(_expected_first_step, 1, config, timeout_s=300.0)
    assert run_ranks(_train, 1, config, timeout_s=300.0) == [0]
    records = read_metrics(config)
    first = records[0]
    assert (first["loss"], first["square_nll"], first["grad_norm"]) == pytest.approx(expected, rel=1e-5)
    assert first["loss"] != pytest.approx(expected[0] - LAMBDA * expected[1], rel=1e-3), "the added term is seen"
    assert len(records) > 3 and records[-1]["loss"] < first["loss"], "and it learns"
    assert list(checkpoints_of(config).glob("step_*")), "it saves as every run does"


def test_two_ranks_come_to_what_one_comes_to(config: TrainConfig) -> None:
    both = replace(config, run=replace(config.run, name="toy_2"))
    assert run_ranks(_train, 1, config, timeout_s=300.0) == [0]
    assert run_ranks(_train, 2, both, timeout_s=300.0) == [0, 0]
    records, expected = read_metrics(both), read_metrics(config)
    assert len(records) == len(expected) > 3
    for record, reference in zip(records, expected, strict=True):
        assert record["data_fingerprint"] == reference["data_fingerprint"]
        for name in ("loss", "square_nll", "grad_norm"):
            assert record[name] == pytest.approx(reference[name], rel=1e-4), name
