"""Check what a run would read, as training does before it starts, without starting it.

    python -m megatron_dllm.check FOLDER ... [--without_inputs FOLDER ...]
    python -m megatron_dllm.check --paths experiment=NAME [key=value ...] [--on cuda]

Each folder holds a resolved config.yaml, as the launcher freezes it. One line a problem; exit code 2 if there is one.
With --paths: which implementation of each part a run would take on this machine (or a GPU, --on cuda), why, and what
would be faster; on this machine those that are fast are compared with the plain ones.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_dllm.checkpoint.brought import fill
from megatron_dllm.compose import compose_dict, compose_train_config, to_train_config
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.config.rules import check


def problem_of(folder: Path, has_inputs: bool) -> str | None:
    """What is wrong with a run's schedule and, with `has_inputs`, with its corpora and start checkpoint; or None."""
    from megatron_dllm.diffusion.block_schedule import BlockSchedule
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start

    try:
        config = compose_train_config([], "config", folder.absolute())
        if has_inputs:
            decide_start(config, None, Sources(config))
        elif all(stage.num_tokens is not None for stage in config.schedule.stages.values()):
            BlockSchedule.from_config(config.schedule)
    except ValueError as error:
        return str(error)
    return None


def show_paths(words: Sequence[str], device: str) -> None:
    """Print what a run of these settings takes on a device: this process's, or cuda anywhere.

    Raises:
        ValueError: a setting that is none, what cannot run there, or a fast path whose numbers are not the plain one's.
    """
    from megatron_dllm.parallel.device import DeviceFacts
    from megatron_dllm.training.paths_table import paths_report

    folder, rest = split_folder(words)
    composed = compose_dict(rest, recipes=folder)
    # What runs does not depend on them.
    fill(composed.run, name="check")
    fill(composed.data, train="none")
    config = to_train_config(composed)
    config.parallel.validate_choices()
    config.optimizer.validate()
    print(paths_report(config, DeviceFacts.as_cuda(has_transformer_engine=False) if device == "cuda" else None))


def main(words: Sequence[str] | None = None) -> int:
    """Check every folder and print the problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders with a config.yaml whose inputs are there")
    parser.add_argument(
        "--without_inputs",
        nargs="*",
        type=Path,
        default=[],
        help="folders whose corpora or start checkpoint have yet to be made",
    )
    parser.add_argument("--paths", nargs="*", metavar="KEY=VALUE", help="settings of a run whose paths are shown")
    parser.add_argument("--on", choices=("here", "cuda"), default="here", help="the device that --paths speaks of")
    arguments = parser.parse_args(words)
    folders = [*arguments.folders, *arguments.without_inputs]
    check(
        arguments.paths is None or not folders,
        f"--paths looks at settings, and {', '.join(map(str, folders))} are folders of runs; ask for one at a time.",
    )
    check(
        arguments.paths is not None or arguments.on == "here",
        f"--on ({arguments.on}) has no effect without --paths; give --paths with the settings of a run.",
    )
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    if arguments.paths is not None:
        show_paths(arguments.paths, arguments.on)
        return 0
    found = [
        (folder, problem_of(folder, has_inputs))
        for folders, has_inputs in ((arguments.folders, True), (arguments.without_inputs, False))
        for folder in folders
    ]
    for folder, problem in found:
        if problem:
            print(f"{folder.name}: {problem}")
    return 2 if any(problem for _, problem in found) else 0


if __name__ == "__main__":
    run_command(main)
