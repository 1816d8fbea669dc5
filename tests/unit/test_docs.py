"""Every module, command, flag, key, recipe and file that README, docs and comments name exists."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest

from launch.chain import compose_chain
from megatron_dllm.compose import compose_dict
from tests.house.existing import Existing
from tests.house.mentions import FOLDERS, ROOT, Mention, command_lines, in_docstrings, in_markdown, in_yaml_comments

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SOURCES = [file for folder in FOLDERS if folder != "tests" for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def existing() -> Existing:
    return Existing(ROOT)


def _problems(existing: Existing, mentions: set[Mention], text: Path) -> list[str]:
    problems = [existing.problem(mention, text) for mention in sorted(mentions)]
    return [f"{text.relative_to(ROOT)}: {problem}" for problem in dict.fromkeys(problems) if problem]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(existing: Existing, page: Path) -> None:
    assert not _problems(existing, in_markdown(page.read_text()), page)


def test_what_the_comments_of_recipes_name_exists(existing: Existing) -> None:
    problems = [_problems(existing, in_yaml_comments(recipe.read_text()), recipe) for recipe in RECIPES]
    assert not list(chain.from_iterable(problems))


def test_the_commands_in_docstrings_exist(existing: Existing) -> None:
    problems = [_problems(existing, in_docstrings(source.read_text()), source) for source in SOURCES]
    assert not list(chain.from_iterable(problems))


# Commands with recipes that the reader writes, or with two runs in one.
_NOT_HERE = ("experiment=mine", "=CHAIN", "=NAME", "--multirun")


def _composed(program: str) -> list[list[str]]:
    """Words of a program's commands in all pages, but for what stands for something else."""
    lines = [line for page in PAGES for line in command_lines(page.read_text())]
    # "..." is what the reader adds; cluster=mine is a copy of the example (docs/slurm.md).
    changes = {"...": "data.train=x", "--dry_run": "", "cluster=mine": "cluster=example"}
    words = [[changes.get(word, word) for word in words] for name, words in lines if name == program]
    return [[*filter(None, line)] for line in words if not any(word.endswith(_NOT_HERE) for word in line)]


@pytest.mark.parametrize("words", _composed("megatron_dllm.train"), ids=" ".join)
def test_the_training_commands_of_the_pages_compose(words: list[str]) -> None:
    assert compose_dict(words).schedule.stages


def test_the_guide_s_experiment_composes(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "first_conversion.md").read_text(), re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(recipe)
    config = compose_dict(["experiment=mine"], recipes=tmp_path)
    assert (config.run.name, config.schedule.num_tokens) == ("mine", 5 * 10**9)
    assert config.schedule.is_fitted_to_model and config.parallel.expert_model_parallel_size == 8


@pytest.mark.parametrize("words", _composed("launch/submit.py") + _composed("launch/local.py"), ids=" ".join)
def test_the_launching_commands_of_the_pages_compose(words: list[str]) -> None:
    assert compose_chain(words).jobs


@pytest.mark.parametrize(
    "text",
    [
        "    python -m megatron_dllm.trian experiment=llada2_mini",
        "    torchrun --nproc_per_node 2 -m megatron_dllm.train experiment=llada2_minni",
        "    torchrun --nproc_per_node 2 -m megatron_dllm.train modle.num_layers=3",
        "    python -m megatron_dllm.generate checkpoint=DIR promt=x",
        "    python -m checkpoints_tools.{inspect, compair} DIR",
        "    python -m checkpoints_tools.merge_topk --run DIR \\\n        --kk 5",
        "    python -m megatron_dllm.evaluation.answers --checkpoint DIR --chat FILE",
        "    python launch/submitt.py experiment=llada2_mini",
        "    python launch/submit.py experiment=llada2_mini cluster=h100x9",
        "    python launch/submit.py experiment=tiny_demo --dry_runs",
        "    make demmo        # the whole pipeline",
        "    make demo TORCHE=x",
        "    schedule:\n      stages:\n        stable: {blocksize: 32}",
        "    schedule:\n      stages:\n        stable:\n          parallel: {tensor_parallel_size: 2}",
        "    megatron_dllm/\n      diffusion/\n        role.py    the mask",
        "```\nmake demmo\n```",
        "text `make demmo` text",
        "text `--no_such_flag` text",
        "text `data.block_orign` text",
        "text `diffusion/role.py` text",
        "text `tests/unit/test_docs.py::test_no_such` text",
        "text `no_such_file.py` text",
        "see [runs](docs/rums.md)",
    ],
)
def test_a_wrong_name_is_found(existing: Existing, text: str) -> None:
    assert len(_problems(existing, in_markdown(text), ROOT / "README.md")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "    torchrun --nproc_per_node 2 -m megatron_dllm.train experiment=NAME schedule.stages.any.block_size=4",
        "    python launch/submit.py experiment=llada2_mini_full cluster=h100x8 inputs.hf=/data/x nodes=4 data.train=x",
        "    python -m pytest -k anything --no-header",
        "    schedule:\n      stages:\n        any: {parallel: {tensor_model_parallel_size: 2}}",
        "text `runs/NAME/checkpoints/step_0000100` and `launch/STAGE/job.sh`, `data/batch.py`, `roles.py`",
    ],
)
def test_a_right_name_or_a_placeholder_passes(existing: Existing, text: str) -> None:
    assert not _problems(existing, in_markdown(text), ROOT / "README.md")


def test_comments_and_docstrings_are_read(existing: Existing) -> None:
    comment, docstring = (
        "# (make demmo) reads\n#   python -m megatron_dllm.trian\n",
        '"""python -m megatron_dllm.trian"""',
    )
    assert len(_problems(existing, in_yaml_comments(comment), ROOT / "recipes" / "x.yaml")) == 2
    assert len(_problems(existing, in_docstrings(docstring), ROOT / "x.py")) == 1
