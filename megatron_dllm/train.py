"""Train: `torchrun --nproc_per_node N -m megatron_dllm.train experiment=NAME key=value ...`.

Everything a user can get wrong is refused before a process group starts. Exit codes: `exit_codes`.
"""

from __future__ import annotations

from megatron_dllm.run.command import leaving_at_once, listen, run_command

if __name__ == "__main__":
    listen()

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_dllm.compose import to_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.hydra_command import hydra_command
from megatron_dllm.run.exit_codes import EXIT_FENCED
from megatron_dllm.run.lease import LeaseLost
from megatron_dllm.run.place import world_size

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
    with leaving_at_once():
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
        from megatron_dllm.training.stop import StopRequest

        parts = make_parts() if make_parts is not None else Parts()
        sources = Sources(config, parts.open_source)
        meeting = meet(config.run)
        start = meeting.decide(lambda: decide_start(config, world_size(), sources))
        backend = config.training.attention_backend
        meeting.agree(
            lambda: choose_paths(config.model, start.layout, DeviceFacts.here(), backend, True, config.optimizer)
        )
        stop = StopRequest()  # from here on the ranks stop together
    groups = initialize(start.layout, config.run, meeting)
    try:
        code = _run(set_up(config, groups, start, sources, parts, stop))
    except LeaseLost as error:
        log.error("%s", error)
        code = EXIT_FENCED
    # After an error the groups are left as they are: taking them down may wait for a rank that has gone.
    destroy()
    return code


def _run(trainer: Trainer) -> int:
    from megatron_dllm.training.weighing import StartRefused

    try:
        return trainer.train()
    except StartRefused:
        raise
    except ValueError as error:  # no user's mistake any more: keep the traceback
        raise RuntimeError(f"training failed: {error}") from error


def main(make_parts: Callable[[], Parts] | None = None) -> None:
    """Run the command: read the configuration, train, exit with its code.

    Args:
        make_parts: what the run is put together from, once the host is prepared; None: the program's own parts.
    """
    hydra_command(lambda config: train(to_train_config(config), make_parts))


if __name__ == "__main__":
    run_command(main)
