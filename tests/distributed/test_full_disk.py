"""Rank 0 writes alone: where its disk is full, or not to be written, every rank ends with code 2 and one says why."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import run_config, train_here, write_corpus
from megatron_dllm.config import TrainConfig
from megatron_dllm.parallel.agreement import failing_together, raise_together
from megatron_dllm.run.command import run_command
from megatron_dllm.run.disk_full import DiskFull
from megatron_dllm.run.exit_codes import EXIT_REFUSED
from megatron_dllm.run.names import METRICS
from tests.full_disk import full_disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full_disk")
    write_corpus(path / "corpus")
    return path


def _train_on_a_full_disk(config: TrainConfig, num_bytes: int | None) -> tuple[int | str | None, str]:
    """The command's exit code on this rank, and what it says; no file of rank 0 can be larger than so many bytes."""
    said = io.StringIO()
    is_limited = num_bytes is not None and os.environ["RANK"] == "0"
    limit = full_disk(num_bytes) if is_limited else contextlib.nullcontext()
    with contextlib.redirect_stderr(said), limit, pytest.raises(SystemExit) as end:
        run_command(lambda: train_here(config))
    return end.value.code, said.getvalue()


@pytest.mark.parametrize(
    ("num_bytes", "name", "reason"),
    [
        pytest.param(10, "lease/generation_000001", "File too large", id="the lease"),
        pytest.param(1000, "config.yaml", "File too large", id="the configuration"),
        pytest.param(None, METRICS, "No space left on device", id="the records"),
    ],
)
def test_all_ranks_of_a_run_end_with_code_2_and_one_says_why(
    folder: Path, num_bytes: int | None, name: str, reason: str
) -> None:
    config = run_config(folder, f"full_{num_bytes}")
    if name == METRICS:
        run_folder = Path(config.run.root) / config.run.name
        run_folder.mkdir(parents=True)
        (run_folder / METRICS).symlink_to("/dev/full")
    codes, said = zip(*run_ranks(_train_on_a_full_disk, 2, config, num_bytes, timeout_s=300.0), strict=True)
    assert codes == (EXIT_REFUSED, EXIT_REFUSED)
    lines = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"{config.run.name}/{name}: {reason}" in lines[0], said
    assert "Traceback" not in "".join(said)


def _agree() -> list[tuple[str, str]]:
    """The kind and the words of what every rank raises, where rank 1 alone meets it."""
    dist.init_process_group("gloo")
    found = []
    for error in (
        DiskFull("writing x: it is full"),
        PermissionError(13, "Permission denied", "x"),
        ValueError("a mistake"),
        TimeoutError("it took too long"),
    ):
        with pytest.raises(Exception) as caught:
            raise_together(error if dist.get_rank() == 1 else None)
        found.append((type(caught.value).__name__, str(caught.value)))
    with pytest.raises(OSError, match=r"rank 1 of 2 failed: /nowhere: No such file or directory"), failing_together():
        if dist.get_rank() == 1:
            Path("/nowhere").read_text()
    raise_together(None)
    return found


def test_what_the_operating_system_refuses_to_one_rank_is_told_by_all() -> None:
    first, second = run_ranks(_agree, 2)
    assert first == second
    assert first == [
        ("DiskFull", "rank 1 of 2 failed: writing x: it is full"),
        ("OSError", "rank 1 of 2 failed: x: Permission denied"),
        ("ValueError", "a mistake"),
        ("RuntimeError", "rank 1 of 2 failed: TimeoutError: it took too long"),
    ]
