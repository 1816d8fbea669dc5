"""Train: `torchrun --nproc_per_node N -m megatron_dllm.train experiment=NAME key=value ...`.

Everything a user can get wrong is refused before a process group starts. Exit codes: `exit_codes`.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

import hydra

from megatron_dllm.compose import RECIPES, prepare_command_line, register_schemas, to_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.run.exit_codes import EXIT_FENCED
from megatron_dllm.run.lease import LeaseLost
from megatron_dllm.run.place import is_rank_zero, world_size

if TYPE_CHECKING:
    from megatron_dllm.training.loop import Trainer

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> int:
    """Run one training process; returns its exit code.

    Raises:
        ValueError: for a configuration, a corpus or a checkpoint that cannot work, before training starts.
    """
    config.validate(world_size())
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    from megatron_dllm.parallel.groups import destroy, initialize
    from megatron_dllm.training.loop import Trainer
    from megatron_dllm.training.start import check_inputs, check_world_size, choose_layout

    check_inputs(config)
    check_world_size(config, world_size())
    layout = choose_layout(config)
    groups = initialize(layout, config.run)
    try:
        code = _run(Trainer(config, groups, layout))
    except LeaseLost as error:
        log.error("%s", error)
        code = EXIT_FENCED
    # After an error the groups are left as they are: taking them down may wait for a rank that has gone.
    destroy()
    return code


def _run(trainer: Trainer) -> int:
    try:
        return trainer.run()
    except ValueError as error:  # no user's mistake any more: keep the traceback
        raise RuntimeError(f"training failed: {error}") from error


@hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="train")
def _main(config: Any) -> None:
    try:
        code = train(to_train_config(config))
    except ValueError as error:
        if is_rank_zero():
            log.error("%s", error)
        else:
            time.sleep(5.0)  # torchrun ends all ranks with the first: rank 0 speaks before that
        code = 2
    if code:  # a sweep goes on after a run that has finished
        sys.exit(code)


if __name__ == "__main__":
    register_schemas()
    sys.argv[1:] = prepare_command_line(sys.argv[1:])
    _main()
