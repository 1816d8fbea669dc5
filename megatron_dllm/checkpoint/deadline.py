"""The end of a process that waits for a dead writer."""

from __future__ import annotations

import logging
import os
import threading

log = logging.getLogger(__name__)


class Deadline:
    """Ends the process when a block of code does not finish in time: a dead writer must not hang the job."""

    def __init__(self, minutes: float, what: str) -> None:
        self._timer = threading.Timer(60.0 * minutes, self._expire)
        self._timer.daemon = True
        self._message = (
            f"{what} did not finish within checkpoint.timeout_minutes ({minutes:g}); a rank or its "
            "storage is taken for dead."
        )

    def _expire(self) -> None:
        log.critical(self._message)
        logging.shutdown()
        os._exit(1)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
