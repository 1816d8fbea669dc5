"""A user's recipes add to the shipped ones; numbers in them may be written with an exponent."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dllm.compose import RECIPES, compose_train_config, prepare_command_line
from megatron_dllm.config.recipe_source import recipe_names, whole_numbers

MINE = """# @package _global_
defaults:
  - override /schedule: mine
run:
  name: mine
data:
  train: x
optimizer:
  weight_decay: 1e0
"""
SCHEDULE = """context_length: 64
stages:
  only: {block_size: 64, num_tokens: 1e9, global_batch_size: 2_000, learning_rate: 1e-4}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    for name, text in (("experiment/mine.yaml", MINE), ("schedule/mine.yaml", SCHEDULE)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_folder_of_recipes_adds_to_the_shipped_ones(mine: Path) -> None:
    config = compose_train_config(["experiment=mine", "model=ling_mini"], recipes=mine)
    stage = config.schedule.stages["only"]
    assert (stage.num_tokens, stage.global_batch_size, stage.learning_rate) == (10**9, 2000, 1e-4)
    assert list(config.schedule.stages) == ["only"] and config.model.num_layers == 20
    assert isinstance(config.optimizer.weight_decay, float) and config.optimizer.weight_decay == 1.0


def test_a_recipe_of_the_users_goes_before_a_shipped_one_of_its_name(mine: Path) -> None:
    (mine / "optimizer").mkdir()
    (mine / "optimizer" / "adamw.yaml").write_text("adam_beta1: 0.5\n")
    assert compose_train_config(["experiment=mine"], recipes=mine).optimizer.adam_beta1 == 0.5
    assert compose_train_config(["run.name=x", "data.train=x"]).optimizer.adam_beta1 == 0.9


def test_an_unknown_recipe_lists_both(mine: Path) -> None:
    with pytest.raises(ValueError, match=r"experiment \(min\) is not a recipe; did you mean mine\?.*tiny_convert"):
        compose_train_config(["experiment=min"], recipes=mine)
    assert {"mine", "tiny_convert"} <= set(recipe_names("experiment", [mine]))


@pytest.mark.parametrize("flag", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_the_command_line_names_the_folder(mine: Path, flag: list[str]) -> None:
    words = [word.format(mine) for word in flag]
    assert prepare_command_line([*words, "experiment=mine", "run.name=7_7"])[-1] == "run.name='7_7'"
    with pytest.raises(ValueError, match="did you mean"):
        prepare_command_line([*words, "experiment=mine", "model.num_layer=3"])
    with pytest.raises(ValueError, match="must be a folder of recipes"):
        prepare_command_line([word.format(mine / "none") for word in flag])


def test_only_integral_fractions_change() -> None:
    content = {"a": 1e9, "b": [2.0, 0.5, "1e9", True, None], "c": {"d": 1e-3, "e": float("inf"), "f": 0.0}}
    assert whole_numbers(content) == content
    assert isinstance(whole_numbers(content)["a"], int) and isinstance(whole_numbers(content)["c"]["f"], float)


def test_the_shipped_recipes_are_found() -> None:
    assert (RECIPES / "train.yaml").is_file()
