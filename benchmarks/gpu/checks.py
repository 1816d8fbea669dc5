"""Checks whose failure ends nothing: each becomes one row, whatever happens in it."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.settings import Settings

# Lines of a traceback that a row keeps.
TRACEBACK_LINES = 12


class NotHere(Exception):
    """A check that cannot run on this device, or after what failed before it; the message says why."""


@dataclass(frozen=True)
class Found:
    """What a check found.

    Attributes:
        value: a number, or a word.
        limit: what the number may reach; None: it is only recorded.
        why: where the number comes from, or what is wrong.
        columns: more about it.
    """

    value: float | str
    limit: float | None = None
    why: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def is_failure(self) -> bool:
        """Whether the number is above its limit, or none."""
        return self.limit is not None and not (isinstance(self.value, (int, float)) and self.value <= self.limit)


Check = Callable[[], Found]


def run_checks(settings: Settings, checks: Mapping[str, Check]) -> Iterator[dict[str, Any]]:
    """One row for each check, as soon as it is done; those that the time does not reach are skipped."""
    for name, check in checks.items():
        if settings.is_over():
            yield _row(name, "skipped", why=f"the {settings.seconds:.0f} s of this part are over")
            continue
        started = time.perf_counter()
        try:
            found = check()
        except NotHere as reason:
            row = _row(name, "skipped", why=str(reason))
        except TimeoutError as reason:
            row = _row(name, "skipped", why=" ".join(str(reason).split())[:200])
        except Exception:
            row = _row(name, "failed", why="\n".join(traceback.format_exc().strip().splitlines()[-TRACEBACK_LINES:]))
        else:
            status = "failed" if found.is_failure else "ok"
            row = _row(name, status, found.value, found.limit, found.why) | found.columns
        yield row | {"seconds": round(time.perf_counter() - started, 2)}


def run_beside(
    settings: Settings, checks: Mapping[str, Check], chains: Sequence[Mapping[str, Check]]
) -> Iterator[dict[str, Any]]:
    """The rows of `checks`, and of chains that wait for processes of their own meanwhile, as they come."""
    done: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def run_chain(chain: Mapping[str, Check]) -> None:
        for row in run_checks(settings, chain):
            done.put(row)
        done.put(None)

    # Not waited for where this process is ended: its group is.
    threads = [threading.Thread(target=run_chain, args=(chain,), daemon=True) for chain in chains]
    for thread in threads:
        thread.start()
    num_left = len(threads)
    own = run_checks(settings, checks)
    while num_left:
        row = next(own, None)
        if row is not None:
            yield row
        while num_left and (row is None or not done.empty()):
            other = done.get()
            num_left -= other is None
            if other is not None:
                yield other
    yield from own


def _row(
    name: str, status: str, value: float | str | None = None, limit: float | None = None, why: str = ""
) -> dict[str, Any]:
    return {"check": name, "status": status, "value": value, "limit": limit, "seconds": 0.0, "why": why}
