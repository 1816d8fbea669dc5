"""Training on preferences: a layout trains what one rank trains, a stopped run goes on, and all start at no margin."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from benchmarks.tiny_chats import write_pairs
from benchmarks.tiny_run import STAGES, checkpoints_of, read_steps, read_tensors, run_config, train_here, train_ranks
from megatron_dllm.config import (
    CheckpointConfig,
    ParallelConfig,
    PreferenceConfig,
    ReferenceConfig,
    SftConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED

# Two passes over 24 pairs in steps of 4 rows.
STAGE = replace(
    STAGES["warmup"],
    block_size=8,
    num_tokens=None,
    num_epochs=2.0,
    lr_warmup_tokens=0,
    num_views=2,
    sft=SftConfig(),
    preference=PreferenceConfig(beta=0.5, sft_coefficient=0.1),
)
LAYOUTS = {
    "CP2": ParallelConfig(context_parallel_size=2),
    "TP2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
}


def config_of(folder: Path, name: str, layout: ParallelConfig | None = None) -> TrainConfig:
    load = str(folder / "runs" / "start") if name != "start" else None
    config = run_config(
        folder,
        name,
        layout,
        training=TrainingConfig(),
        preference=ReferenceConfig("frozen" if load else None),
        checkpoint=CheckpointConfig(keep_last=1, timeout_minutes=10.0, load=load),
    )
    stage = STAGE if load else replace(STAGE, preference=None, num_epochs=1.0)
    schedule = replace(config.schedule, row_length=96, stages={"dpo": stage})
    return replace(config, schedule=schedule, data=replace(config.data, packing_chunk=16))


@pytest.fixture(scope="module")
def one_rank_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("preferences")
    write_pairs(folder / "corpus", 24)
    for name in ("start", "one"):
        config = config_of(folder, name)
        assert train_ranks(1, config) == [0]
    return config


def test_a_run_starts_at_no_margin_and_learns_its_pairs(one_rank_run: TrainConfig) -> None:
    first, *_, last = steps = read_steps(one_rank_run)
    assert len(steps) >= 6
    sft_loss = STAGE.preference.sft_coefficient * first["elbo_chosen"]
    assert first["loss"] == pytest.approx(math.log(2.0) + sft_loss, rel=1e-12)
    names = ("margin", "margin_per_token", "reward_chosen", "reward_rejected", "preference_accuracy", "saturated_share")
    assert all(first[name] == 0.0 for name in names)
    assert last["margin"] > 0.1 and last["preference_accuracy"] > 0.6, (
        "two passes over random pairs are learned by heart"
    )
    for step in steps:
        assert 0.0 < step["length_chosen"] < 32 and 0.0 < step["length_rejected"] < 32
        assert step["score_variance"] > 0.0
        assert step["reward_chosen"] - step["reward_rejected"] == pytest.approx(
            STAGE.preference.beta * step["margin"], rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_what_one_rank_trains(name: str, one_rank_run: TrainConfig) -> None:
    config = config_of(Path(one_rank_run.run.root).parent, name, LAYOUTS[name])
    assert train_ranks(2, config) == [0, 0]
    found, expected = read_steps(config), read_steps(one_rank_run)
    assert len(found) == len(expected) and found[0]["margin"] == 0.0
    assert [step["data_fingerprint"] for step in found] == [step["data_fingerprint"] for step in expected]
    for key in ("loss", "grad_norm", "masked_nll", "elbo_chosen", "elbo_rejected", "score_variance"):
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-5), key
    for key in ("loss", "grad_norm", "margin", "reward_chosen", "elbo_rejected"):
        assert found[1][key] == pytest.approx(expected[1][key], rel=1e-4, abs=1e-5), key
        assert found[-1][key] == pytest.approx(expected[-1][key], rel=5e-3, abs=1e-3), key


def test_a_run_that_is_stopped_ends_with_the_same_bits(one_rank_run: TrainConfig) -> None:
    """The reference is loaded again, and not what the run has made of it."""
    config = config_of(Path(one_rank_run.run.root).parent, "stopped")
    assert run_ranks(train_here, 1, config, 3, timeout_s=500.0) == [EXIT_PREEMPTED]
    assert train_ranks(1, config) == [0]
    found, expected = (read_tensors(max(checkpoints_of(c).glob("step_*"))) for c in (config, one_rank_run))
    assert found.keys() == expected.keys()
    assert all(bool((found[name] == tensor).all()) for name, tensor in expected.items())
    assert read_steps(config) == read_steps(one_rank_run)


def test_a_run_goes_on_with_its_own_reference_alone(one_rank_run: TrainConfig) -> None:
    """The run folder it was loaded from has another newest checkpoint now."""
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start

    config = config_of(Path(one_rank_run.run.root).parent, "one")
    moved = replace(config, checkpoint=replace(config.checkpoint, load=str(checkpoints_of(one_rank_run).parent)))
    assert decide_start(config, 1, Sources(config)).reference is not None
    with pytest.raises(ValueError, match=r"checkpoint\.load \(.*\) has other weights .* than the run started from"):
        decide_start(moved, 1, Sources(moved))
