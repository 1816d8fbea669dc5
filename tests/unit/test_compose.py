"""Recipes: every one composes and validates; a typo ends in one sentence that names the nearest key."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron_dllm.compose import RECIPES, compose_train_config, prepare_command_line, schema_keys
from megatron_dllm.config import TrainConfig

EXPERIMENTS = sorted(path.stem for path in (RECIPES / "experiment").glob("*.yaml"))
# Their model is that of the checkpoint they start from.
FROM_CHECKPOINT = ("cap", "convert", "sft")
RANKS = {"llada2_mini": 8, "llada2_flash": 512, "qwen3_30b_a3b": 16}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_validates(name: str) -> None:
    model = ["model=tiny_moe"] if name in FROM_CHECKPOINT else []
    config = compose_train_config(
        [f"experiment={name}", "data.train=corpus", "data.validation=held_out", "run.name=test", *model]
    )
    config.validate(RANKS.get(name, 2))


@pytest.mark.parametrize(("name", "parameters"), [("ling_mini", 16_255_638_528), ("ling_flash", 102_889_697_280)])
def test_real_models_have_the_published_sizes(name: str, parameters: int) -> None:
    """Counted from the configuration by hand; the numbers are those of the published safetensors headers."""
    m = compose_train_config([f"model={name}", "run.name=x", "data.train=x"]).model
    attention = m.hidden_size * m.kv_channels * (2 * m.num_attention_heads + 2 * m.num_query_groups) + 2 * m.kv_channels
    dense = 3 * m.hidden_size * m.ffn_hidden_size
    moe = 3 * m.hidden_size * (m.num_moe_experts * m.moe_ffn_hidden_size + m.moe_shared_expert_intermediate_size)
    router = m.num_moe_experts * m.hidden_size
    layers = m.num_layers * (attention + 2 * m.hidden_size) + m.num_dense_layers * dense
    layers += (m.num_layers - m.num_dense_layers) * (moe + router)
    assert layers + 2 * m.vocab_size * m.hidden_size + m.hidden_size == parameters


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.num_layer=3", "model.num_layers"),
        ("modle.num_layers=3", "model.num_layers"),
        ("schedule.stages.stable.block_sise=3", "block_size"),
        ("optimizer.weigth_decay=0", "optimizer.weight_decay"),
        ("experiment=tiny_convrt", "tiny_convert"),
        ("model=ling_min", "ling_mini"),
        ("shedule=tiny_wsd", "schedule"),
    ],
)
def test_a_typo_names_the_nearest_key(override: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean .*{re.escape(nearest)}"):
        compose_train_config(["run.name=x", override])


def test_the_keys_of_a_part_that_may_be_null_are_known() -> None:
    assert "schedule.stages.*.parallel.precision" in schema_keys(TrainConfig)


def test_a_value_of_a_wrong_type_says_which_and_why() -> None:
    with pytest.raises(ValueError, match=r"model\.num_layers=abc.*Integer"):
        compose_train_config(["run.name=x", "model.num_layers=abc"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"run: [1\nb: : 2\n", r"is not YAML.*experiment/mine.yaml\", line 2"),
        (b"\xff", "is not YAML.*0xff"),
        (b"run:\n  seed: 1\n", "recipe experiment/mine puts its values under experiment.*# @package _global_"),
        (b"just words\n", "recipe experiment/mine puts its values under experiment"),
    ],
)
def test_a_recipe_that_hydra_cannot_use_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    shutil.copytree(RECIPES, tmp_path / "recipes")
    (tmp_path / "recipes" / "experiment" / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        compose_train_config(["experiment=mine"], recipes=tmp_path / "recipes")
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"run\.name is required"):
        compose_train_config(["data.train=x"])


def test_the_command_line_is_checked_before_hydra_runs() -> None:
    with pytest.raises(SystemExit, match="did you mean"):
        prepare_command_line(["experiment=tiny_convert", "model.num_layer=3"])
    assert prepare_command_line(["--config-name", "own", "anything=1"]) == ["--config-name", "own", "anything=1"]
