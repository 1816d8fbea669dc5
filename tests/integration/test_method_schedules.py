"""The schedules of the field's methods: each composes with experiment=convert and trains a tiny model for two steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_run import read_steps, run_config, train_ranks, write_corpus
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.fitting import fitted

# By schedule, what of it is not the default, on the keys that say so; `first` is the first stage, `stage` the last one.
METHODS: dict[str, dict[str, object]] = {
    "bd3lm": {"data.block_origin": "row", "stage.block_size": 16},
    "diffullama": {"noise.t_unit": "document", "stage.shift": True},
    "dream": {"noise.t_unit": "document", "stage.shift": True, "stage.loss_weight": "cart"},
    "fast_dllm": {"stage.shift": True, "stage.view_relation": "complementary", "stage.num_views": 2},
    "llada2_ar_guided": {"first.clean_block_size": 1, "first.ar_weight": 0.5, "stage.clean_block_size": None},
    "llada": {"noise.t_unit": "document", "stage.t_min": 0.001},
    "nbdiff": {"noise.t_unit": "document", "stage.shift": True, "stage.clean_block_size": 1, "stage.ar_weight": 0.5},
    "rnd1": {"stage.shift": True, "optimizer.lr_multipliers": {"*.mlp.*": 0.1, "*.mlp.router.*": 0.0}},
    "sdar": {"noise.t_unit": "document", "stage.block_size": 4},
}

ENDS = {"first": 0, "stage": -1}


def tiny(name: str, folder: Path) -> TrainConfig:
    """The method on a tiny model: contexts of 64 tokens, and stages of two batches of two rows."""
    words = f"experiment=convert schedule={name} model=tiny_moe data.train=corpus run.name=x"
    composed = compose_train_config(words.split())
    small = replace(composed.schedule, is_fitted_to_model=True, global_batch_size=2)
    config = run_config(folder, name, schedule=fitted(small, 64), noise=composed.noise)
    stages = {key: replace(stage, num_tokens=400, lr_warmup_tokens=0) for key, stage in config.schedule.stages.items()}
    return replace(
        config,
        schedule=replace(config.schedule, stages=stages),
        data=replace(config.data, block_origin=composed.data.block_origin),
        optimizer=replace(config.optimizer, lr_multipliers=composed.optimizer.lr_multipliers),
    )


def value_of(config: TrainConfig, key: str) -> object:
    """The value of a key; those of `first` and `stage` are the first and the last stage's."""
    stages = [*config.schedule.stages.values()]
    found: object = config
    for part in key.split("."):
        found = stages[ENDS[part]] if part in ENDS else getattr(found, part)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_method_composes_and_trains(name: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    config = tiny(name, tmp_path)
    assert {key: value_of(config, key) for key in METHODS[name]} == METHODS[name]
    assert train_ranks(1, config) == [0]
    steps = read_steps(config)
    assert len(steps) >= 2 and all(0.0 < step["loss"] < 100.0 for step in steps)
