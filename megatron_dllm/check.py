"""Check what a run would read, as training does before it starts, without starting it.

    python -m megatron_dllm.check FOLDER ... [--without_inputs FOLDER ...]

Each folder holds a resolved config.yaml, as the launcher freezes it. One line a problem; exit code 2 if there is one.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
from pathlib import Path

from megatron_dllm.compose import compose_train_config


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


def main() -> int:
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
    arguments = parser.parse_args()
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
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
