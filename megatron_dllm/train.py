"""Train: `torchrun --nproc_per_node N -m megatron_dllm.train experiment=NAME key=value ...`.

Everything a user can get wrong is refused before a process group starts. Exit codes: `exit_codes`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import hydra

from megatron_dllm.compose import prepare_command_line, register_schemas, to_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.recipe_source import RECIPES
from megatron_dllm.run.exit_codes import EXIT_FENCED
from megatron_dllm.run.lease import LeaseLost
from megatron_dllm.run.place import is_rank_zero, world_size

if TYPE_CHECKING:
    from megatron_dllm.training.loop import Trainer
    from megatron_dllm.training.parts import Parts

log = logging.getLogger(__name__)


def train(config: TrainConfig, make_parts: Callable[[], Parts] | None = None) -> int:
    """Run one training process; returns its exit code.

    Args:
        config: of the run.
        make_parts: what the run is put together from, called once the host is prepared; None: the program's own
            parts.

    Raises:
        ValueError: for a configuration, a corpus or a checkpoint that cannot work, before training starts. What lies
            on disk is looked at on rank 0 alone, and the others hear its refusal before a process group starts.
    """
    config.validate(world_size())
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts
    from megatron_dllm.parallel.groups import destroy, initialize
    from megatron_dllm.parallel.meeting import meet
    from megatron_dllm.training.parts import Parts
    from megatron_dllm.training.set_up import set_up
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start

    parts = make_parts() if make_parts is not None else Parts()
    sources = Sources(config, parts.open_source)
    meeting = meet(config.run)
    start = meeting.decide(lambda: decide_start(config, world_size(), sources))
    # Refuses what cannot run here.
    choose_paths(config.model, start.layout, DeviceFacts.here(), config.training.attention_backend, is_training=True)
    groups = initialize(start.layout, config.run, meeting)
    try:
        code = _run(set_up(config, groups, start, sources, parts))
    except LeaseLost as error:
        log.error("%s", error)
        code = EXIT_FENCED
    # After an error the groups are left as they are: taking them down may wait for a rank that has gone.
    destroy()
    return code


def _run(trainer: Trainer) -> int:
    try:
        return trainer.train()
    except ValueError as error:  # no user's mistake any more: keep the traceback
        raise RuntimeError(f"training failed: {error}") from error


def main(make_parts: Callable[[], Parts] | None = None) -> None:
    """Run the command: read the configuration, train, exit with its code.

    Args:
        make_parts: what the run is put together from, once the host is prepared; None: the program's own parts.
    """
    register_schemas()
    sys.argv[1:] = prepare_command_line(sys.argv[1:])

    @hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="train")
    def command(config: Any) -> None:
        _train_and_exit(config, make_parts)

    command()


def _train_and_exit(config: Any, make_parts: Callable[[], Parts] | None) -> None:
    try:
        code = train(to_train_config(config), make_parts)
    except ValueError as error:
        if is_rank_zero():
            log.error("%s", error)
        else:
            time.sleep(5.0)  # torchrun ends all ranks with the first: rank 0 speaks before that
        code = 2
    if code:  # a sweep goes on after a run that has finished
        sys.exit(code)


if __name__ == "__main__":
    main()
