"""Commands that Hydra reads: words as they were typed, sweeps whose members do not meet, errors in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dllm.compose import SWEEP_FLAGS, compose_dict, prepare_command_line, register_schemas
from megatron_dllm.config.recipe_source import RECIPES, split_folder
from megatron_dllm.run.exit_codes import EXIT_REFUSED


def hydra_command(task: Callable[[Any], int]) -> None:
    """Compose what the command line asks for and do the task, or each member of a sweep.

    Args:
        task: given the composed configuration, returns an exit code; a sweep goes on after a member that ends with 0.

    Raises:
        ValueError: the command line or a recipe is wrong.
        SystemExit: with the code of a task that did not end with 0.
    """
    register_schemas()
    sys.argv[1:] = prepare_command_line(sys.argv[1:])
    check_sweep(sys.argv[1:])
    # Hydra would shorten its own errors and add lines to ours; so the former come out as they are, and the latter are
    # carried past it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    refused: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="train")
    def command(config: Any) -> None:
        try:
            code = task(config)
        except (ValueError, OSError) as error:
            refused.append(error)
            code = EXIT_REFUSED
        if code:
            sys.exit(code)

    try:
        command()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except SystemExit:
        if refused:
            raise refused[0] from None
        raise


def check_sweep(words: Sequence[str]) -> None:
    """Refuse a sweep two of whose members would write one run folder.

    Args:
        words: the command line. What Hydra alone understands of it (a sweeper or a primary recipe of the user's own) is
            not looked into.

    Raises:
        ValueError: naming the folder and two members that share it.
    """
    if not any(word in SWEEP_FLAGS for word in words):
        return
    folder, rest = split_folder([word for word in words if word not in SWEEP_FLAGS])
    if any(word.startswith("-") or "hydra/sweeper" in word for word in rest):
        return
    try:
        overrides = OverridesParser.create().parse_overrides(rest)
    except HydraException as error:
        raise ValueError(" ".join(str(error).split())) from error
    found: dict[Path, list[str]] = {}
    for members in BasicSweeper.split_arguments(overrides, None):
        for member in members:
            place = _run_folder(member, folder)
            if place is None:
                continue
            if place in found:
                raise ValueError(
                    f"run.name ({place.name}) is that of several members of the sweep ({' '.join(found[place])} and "
                    f"{' '.join(member)}), which would share the folder {place}; give each its own, for example "
                    "'run.name=NAME_${hydra:job.num}'."
                )
            found[place] = member


def _run_folder(words: list[str], recipes: Path) -> Path | None:
    """The run folder of one member; None where Hydra's own numbers, which differ, are part of it."""
    run: Any = compose_dict(words, recipes=recipes).run
    texts = OmegaConf.to_container(run, resolve=False)
    assert isinstance(texts, dict)
    if any("${hydra:" in str(texts[name]) for name in ("root", "name")):
        return None
    return Path(str(run.root)) / str(run.name)
