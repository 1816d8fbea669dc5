"""megatron_dllm.train that waits where a test asks it to, so that no test depends on the machine's speed.

While RUN/slow_steps exists every step takes half a second more; while RUN/hold_save exists a checkpoint whose files
have all been written is not renamed into place.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from launch.rank import RUN_VARIABLE
from megatron_dllm.train import main

RUN = Path(os.environ[RUN_VARIABLE])


def publish_when_told() -> None:
    # Called when a save begins, too; only one whose files are all there is held.
    while (RUN / "hold_save").exists() and any((RUN / "checkpoints").glob(".*step_*/manifest.json")):
        time.sleep(0.1)


def paced_parts() -> Any:
    from megatron_dllm.training.observers.observer import Observer
    from megatron_dllm.training.parts import Parts

    class Pace(Observer):
        def around_step(self, is_logged: bool) -> Any:
            if (RUN / "slow_steps").exists():
                time.sleep(0.5)
            return nullcontext()

    return Parts(extra_observers=[Pace()], before_publish=publish_when_told)


if __name__ == "__main__":
    main(paced_parts)
