"""Processes that turn raw documents into tokens; the results come in the order of the documents."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from megatron_dllm.data.encoding import EncodedBatch, Encoder, Encoding
from megatron_dllm.data.reading import RawBatch, RawDocument
from megatron_dllm.run.command import STOP_SIGNALS


class _Worker:
    """What a worker process needs, loaded once when it starts."""

    encoder: Encoder

    @classmethod
    def start(cls, encoding: Encoding) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism
        for number in STOP_SIGNALS:  # the process that started this one is asked to stop, and ends it
            signal.signal(number, signal.SIG_IGN)
        cls.encoder = encoding.load()

    @classmethod
    def encode(cls, documents: list[RawDocument]) -> EncodedBatch:
        return cls.encoder.encode(documents)


@contextmanager
def encoding_processes(num_workers: int, encoding: Encoding) -> Iterator[ProcessPoolExecutor]:
    """Processes that tokenize; an error or a stop leaves what they have not begun undone.

    Raises:
        ValueError: one of them died.
    """
    executor = ProcessPoolExecutor(num_workers, get_context("fork"), _Worker.start, (encoding,))
    try:
        yield executor
    except BrokenProcessPool:
        raise ValueError(
            f"num_workers ({num_workers}): one of these processes was killed, perhaps for want of memory; use fewer."
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def encode_in_order(
    executor: ProcessPoolExecutor, batches: Iterable[RawBatch], num_ahead: int
) -> Iterator[tuple[RawBatch, EncodedBatch]]:
    """Results in the order of the batches, reading at most `num_ahead` batches ahead of the slowest."""
    pending: deque[tuple[RawBatch, Future[EncodedBatch]]] = deque()
    for batch in batches:
        pending.append((batch, executor.submit(_Worker.encode, batch.documents)))
        if len(pending) > num_ahead:
            raw, future = pending.popleft()
            yield raw, future.result()
    for raw, future in pending:
        yield raw, future.result()
