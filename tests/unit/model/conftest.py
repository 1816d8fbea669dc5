"""One-rank process groups for the tests of the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_dllm.config import ParallelConfig, RunConfig
from megatron_dllm.host import prepare_host


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """megatron-core on this process alone."""
    prepare_host()
    from megatron_dllm import parallel

    parallel.initialize(ParallelConfig(), RunConfig(name="test"))
    yield
    parallel.destroy()
