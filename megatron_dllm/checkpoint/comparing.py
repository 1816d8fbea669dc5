"""Compares the files of checkpoints with their manifests while other threads read tensors from them.

Whoever converts or merges a checkpoint reads all of its weights anyway. Threads of their own sum up the same files
beside it: what one side has read, the other finds in the page cache, so the disk is read once and the sums take a core
that mostly waits. The files of a training checkpoint also hold the optimizer's state, which is summed up too: a file
has one checksum.

Pure standard library.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_dllm.checkpoint.manifest import damaged_files, read_manifest

# Of one checkpoint: enough for a fast disk (each sums up 1.4 GB/s), few enough to leave cores to the work itself.
_MAX_THREADS = 4


@contextmanager
def compared(folders: Sequence[Path]) -> Iterator[None]:
    """Compare every file of some checkpoints with its manifest while the block reads them.

    Args:
        folders: complete checkpoints, see `check_complete`.

    Raises:
        ValueError: at the end of the block, naming the files that are not as they were written. A ValueError of the
            block itself gives way to it: damaged bytes look like anything, NaN for instance.
    """
    stop = threading.Event()
    manifests = {folder: read_manifest(folder) for folder in folders}
    with ThreadPoolExecutor(max(len(folders), min(_MAX_THREADS, os.cpu_count() or 1), 1)) as pool:
        jobs = [
            pool.submit(damaged_files, folder, manifests[folder], [name], stop=stop)
            for folder, name in _in_order(manifests)
        ]
        try:
            yield
        except ValueError as error:
            _raise_problems(jobs, error)
            raise
        except BaseException:
            stop.set()
            raise
        _raise_problems(jobs)


def _in_order(manifests: Mapping[Path, Iterable[str]]) -> list[tuple[Path, str]]:
    """Files in the order in which they are read: as they are numbered (__0_2 before __0_10), of all folders in step.

    A merge reads its inputs together. A sum that ran far ahead in one of them would have the disk read it twice: what
    it has read would be gone from the page cache once the merge comes there.
    """
    files = [(len(name), name, folder) for folder, names in manifests.items() for name in names]
    return [(folder, name) for _, name, folder in sorted(files)]


def _raise_problems(jobs: list[Future[list[str]]], cause: Exception | None = None) -> None:
    problems = [problem for job in jobs for problem in job.result()]
    if problems:
        raise ValueError(f"a checkpoint is damaged: {'; '.join(problems)}; choose another one.") from cause
