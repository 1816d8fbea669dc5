"""Sweeps: members that would share a run folder are refused before the first of them begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from megatron_dllm.compose import prepare_command_line
from megatron_dllm.config.recipe_source import RECIPES
from megatron_dllm.hydra_command import check_sweep

BASE = ["-m", "experiment=study_direct", "data.train=corpus"]
RATES = "schedule.stages.direct.learning_rate=1.0e-3,1.0e-4"


@pytest.mark.parametrize(
    "words",
    [
        ["run.name=mr", RATES],
        ["--multirun", RATES],
        ["run.name=a,a"],
        ["run.name=x", "run.root=a,./a"],
        ["run.name=x_${optimizer.weight_decay}", RATES],
        ["run.name=x", "data.train=a/b,c/d"],
        ["run.name=x", "run.seed=range(1,4)"],
    ],
)
def test_members_that_share_a_folder_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"run\.name \(\S+\) is that of several members .*NAME_\$\{hydra"):
        check_sweep(prepare_command_line([*BASE, *words]))


@pytest.mark.parametrize(
    "words",
    [
        ["run.name=a,b"],
        ["run.name=x", "run.root=a,b"],
        ["run.name='x_${hydra:job.num}'", RATES],
        ["run.name=x_${optimizer.weight_decay}", "optimizer.weight_decay=0.1,0.2"],
        ["run.name=x"],
        ["hydra/sweeper=mine", RATES],
    ],
)
def test_members_with_folders_of_their_own_may_run(words: list[str]) -> None:
    check_sweep(prepare_command_line([*BASE, *words]))


def test_what_is_no_sweep_is_not_looked_into() -> None:
    check_sweep(["run.name=x", RATES])


def test_the_shipped_sweep_numbers_its_members() -> None:
    check_sweep([*BASE, "+sweep=slurm", "hydra.launcher.partition=p", RATES])


def test_a_sweep_of_the_user_s_own_recipes_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nrun: {name: mine}\ndata: {train: x}\n")
    with pytest.raises(ValueError, match=r"run\.name \(mine\)"):
        check_sweep(["-m", "--config-dir", str(tmp_path), "experiment=mine", "run.seed=1,2"])


def test_a_sweep_that_hydra_cannot_read_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"mismatched input|no viable") as refused:
        check_sweep([*BASE, "run.seed=choice("])
    assert "\n" not in str(refused.value)


def test_what_hydra_writes_of_a_sweep_lies_beside_its_runs() -> None:
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        config = compose("train", ["experiment=tiny_base", "run.root=/r", "data.train=x"], return_hydra_config=True)
    assert (config.hydra.sweep.dir, config.hydra.sweep.subdir, config.hydra.run.dir) == ("/r", ".", ".")
