"""megatron_dllm.train that waits where a test asks it to, so that no test depends on the machine's speed.

While RUN/slow_steps exists every step takes half a second more; while RUN/hold_save exists a checkpoint whose files
have all been written is not renamed into place.
"""

from __future__ import annotations

import os
import runpy
import time
from pathlib import Path
from typing import Any

from launch.rank import RUN_VARIABLE
from megatron_dllm import host
from megatron_dllm.checkpoint import folder as checkpoint_folder

RUN = Path(os.environ[RUN_VARIABLE])


def publish_when_told(temporary: Path, final: Path, publish: Any = checkpoint_folder.publish) -> None:
    while (RUN / "hold_save").exists():
        time.sleep(0.1)
    publish(temporary, final)


def prepare_host_and_pace(prepare_host: Any = host.prepare_host) -> None:
    prepare_host()
    from megatron_dllm.training.loop import Trainer

    step = Trainer._step

    def paced_step(self: Trainer, *arguments: Any) -> int | None:
        if (RUN / "slow_steps").exists():
            time.sleep(0.5)
        return step(self, *arguments)

    Trainer._step = paced_step  # type: ignore[method-assign]


if __name__ == "__main__":
    checkpoint_folder.publish = publish_when_told
    host.prepare_host = prepare_host_and_pace
    runpy.run_module("megatron_dllm.train", run_name="__main__")
