"""Where the ranks of a run find each other, and hear what rank 0 has decided, before any process group exists."""

from __future__ import annotations

import os
import pickle
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistNetworkError, DistStoreError, HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from megatron_dllm.config import RunConfig
from megatron_dllm.run.place import read_place

T = TypeVar("T")

_DECISION, _NUM_HEARD = "decision", "num_heard"
_NUM_CHECKED, _ALL_CHECKED, _REFUSAL, _NUM_REFUSED = "num_checked", "all_checked", "refusal", "num_refused"
# Seconds that rank 0, whose process may hold the store, waits for the others to hear a refusal.
_HEARD_SECONDS = 30.0


@dataclass(frozen=True)
class Meeting:
    """A key-value store that all ranks can reach.

    Attributes:
        store: of the launcher, or of rank 0.
        rank: this process.
        world_size: ranks of the run.
    """

    store: Store
    rank: int
    world_size: int

    def decide(self, decide: Callable[[], T]) -> T:
        """Decide on rank 0 and tell the others, who wait for it.

        Args:
            decide: called on rank 0 alone; what it returns or refuses is pickled.

        Raises:
            ValueError: on every rank, where `decide` refuses with one.
            RuntimeError: on the other ranks, where it fails otherwise.
        """
        if self.world_size == 1:
            return decide()
        store: Any = PrefixStore("start", self.store)  # torch's types know of texts only; bytes pass unchanged
        if self.rank:
            found: T | Exception = pickle.loads(store.get(_DECISION))
            store.add(_NUM_HEARD, 1)
            if isinstance(found, Exception):
                raise found
            return found
        try:
            value = decide()
        except Exception as error:
            refusal = error if isinstance(error, ValueError) else RuntimeError(f"rank 0 failed: {error!r}")
            store.set(_DECISION, pickle.dumps(type(refusal)(str(refusal))))
            self._wait_until_heard(store)
            raise
        store.set(_DECISION, pickle.dumps(value))
        return value

    def agree(self, check: Callable[[], object]) -> None:
        """Have every rank look at its own machine, and none go on where one refuses it.

        A rank asks the store five times, however many ranks there are: the last one to look says that all have.

        Args:
            check: of this rank.

        Raises:
            ValueError: on every rank, where `check` refuses with one on some rank; it names the last that did.
        """
        if self.world_size == 1:
            check()
            return
        store: Any = PrefixStore("start", self.store)
        try:
            check()
        except ValueError as error:
            store.set(_REFUSAL, pickle.dumps(f"rank {self.rank} of {self.world_size}, on {platform.node()}: {error}"))
            store.add(_NUM_REFUSED, 1)
        if store.add(_NUM_CHECKED, 1) == self.world_size:
            store.set(_ALL_CHECKED, b"")
        store.get(_ALL_CHECKED)
        if not store.add(_NUM_REFUSED, 0):
            return
        refusal = pickle.loads(store.get(_REFUSAL))
        if self.rank:
            store.add(_NUM_HEARD, 1)
        else:
            self._wait_until_heard(store)
        raise ValueError(refusal)

    def _wait_until_heard(self, store: Any) -> None:
        deadline = time.monotonic() + _HEARD_SECONDS
        while store.add(_NUM_HEARD, 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)


def meet(run: RunConfig) -> Meeting:
    """Find the other ranks by the launcher's environment variables; without a launcher the run is one rank.

    Raises:
        ValueError: the variables are nonsense, or nobody answers where they point to.
    """
    place = read_place()
    if place.world_size == 1:
        return Meeting(HashStore(), 0, 1)
    timeout = timedelta(minutes=run.distributed_timeout_minutes)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except (DistNetworkError, DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"MASTER_ADDR, MASTER_PORT ({where}) must be where rank 0 of {place.world_size} can be reached: "
            f"{' '.join(str(error).split())}"
        ) from error
    store.set_timeout(timeout)
    return Meeting(store, rank, world_size)
