"""What writing a checkpoint survives: other layouts, dead writers, full disks."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import DENSE, MODEL, checkpoints_of, read_tensors, run_config
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.manifest import payload_files
from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.run.disk_full import DiskFull
from tests.distributed.checkpoint_run import (
    OPTIMIZER_STEP,
    build,
    fill_moments,
    flip_bit,
    optimizer_parts,
    save,
    writer_of,
)

TWO_RANKS = {
    "DP2": ParallelConfig(),
    "TP2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2),
    "TP2 x EP2": ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    ),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "PP2 virtual": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "CP2": ParallelConfig(context_parallel_size=2),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
}
FOUR_RANKS = {
    "TP2 x PP2": ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        expert_tensor_parallel_size=2,
    ),
    "PP2 x EP2": ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
    "CP2 x EP4": ParallelConfig(context_parallel_size=2, expert_model_parallel_size=4),
}


def _bf16(layouts: dict[str, ParallelConfig]) -> dict[str, ParallelConfig]:
    return {name: replace(layout, precision="bf16") for name, layout in layouts.items()}


# ---- layouts -------------------------------------------------------------------------------------


def _write_reference(folder: Path, model: ModelConfig, precision: str) -> None:
    engine = build(folder, ParallelConfig(precision=precision), model)
    fill_moments(engine)
    save(writer_of(folder), 0, engine)


def _load_and_save(folder: Path, layouts: dict[str, ParallelConfig], model: ModelConfig) -> dict[str, list[str]]:
    """For each layout: load, save, and name the tensors that came out otherwise (on rank 0)."""
    from megatron_dllm.checkpoint.loading import load_run

    reference = checkpoints_of(run_config(folder, "run")) / "step_0000000"
    expected = read_tensors(reference)
    different = {}
    for number, (name, layout) in enumerate(layouts.items(), 1):
        engine = build(folder, layout, model)
        load_run(reference, engine.chunks, engine.optimizer)
        steps = {float(entry["step"]) for part in optimizer_parts(engine) for entry in part.optimizer.state.values()}
        assert steps == {OPTIMIZER_STEP}
        saved = save(writer_of(folder), number, engine)
        dist.barrier()
        if dist.get_rank() == 0:
            tensors = read_tensors(saved)
            assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
            different[name] = [key for key, tensor in tensors.items() if not torch.equal(tensor, expected[key])]
    return different


@pytest.mark.parametrize(
    ("model", "ranks", "layouts"),
    [
        pytest.param(MODEL, 2, TWO_RANKS, id="experts-2"),
        pytest.param(MODEL, 4, FOUR_RANKS, id="experts-4"),
        pytest.param(
            DENSE,
            2,
            {name: replace(TWO_RANKS[name], expert_tensor_parallel_size=None) for name in ("DP2", "TP2", "PP2")},
            id="dense-2",
        ),
        pytest.param(MODEL, 2, _bf16({name: TWO_RANKS[name] for name in ("DP2", "TP2 x EP2", "PP2")}), id="bf16-2"),
    ],
)
def test_weights_and_optimizer_state_pass_through_every_layout_bit_for_bit(
    tmp_path: Path, model: ModelConfig, ranks: int, layouts: dict[str, ParallelConfig]
) -> None:
    precision = next(iter(layouts.values())).precision
    run_ranks(_write_reference, 1, tmp_path, model, precision, timeout_s=300.0)
    different = run_ranks(_load_and_save, ranks, tmp_path, layouts, model, timeout_s=500.0)[0]
    assert different == {name: [] for name in layouts}
    tensors = read_tensors(checkpoints_of(run_config(tmp_path, "run")) / "step_0000000")
    moments = [tensor for key, tensor in tensors.items() if "exp_avg" in key]
    assert all(tensor.count_nonzero() > 0.99 * tensor.numel() for tensor in moments), "the moments were not saved"
    if precision == "bf16":
        weight, main = tensors["output_layer.weight"], tensors["optimizer.state.param.output_layer.weight"]
        assert weight.dtype == torch.bfloat16 and main.dtype == torch.float32
        assert not torch.equal(weight.float(), main), "the optimizer's own weights were not saved"


# ---- writers that fail ---------------------------------------------------------------------------


def _failing_saves(folder: Path) -> dict[str, str]:
    """What every way of failing says on this rank; rank 1 is the one that fails."""
    engine = build(folder, ParallelConfig())
    fill_moments(engine)
    save(writer_of(folder), 1, engine)
    said = {}
    is_failing = dist.get_rank() == 1
    for name, is_async, fault in (
        ("disk full", False, _limit_files),
        ("disk full, async", True, _limit_files),
        ("altered", False, _alter_written),
        ("killed", True, _kill_writer),
        ("stuck", True, _freeze_writer),
    ):
        writer = writer_of(folder, is_async=is_async, timeout_minutes=5.0)
        began = time.monotonic()
        expected = DiskFull if fault is _limit_files else RuntimeError
        with pytest.raises(expected) as caught, fault(is_failing) as after_save:
            save(writer, 2, engine)
            after_save(writer)
            writer.finish()
        said[name] = str(caught.value)
        assert time.monotonic() - began < 120
        assert folders.list_checkpoints(folder / "runs" / "run" / "checkpoints")[-1].name == "step_0000001"
    for is_async in (False, True):
        writer = writer_of(folder, is_async=is_async)
        save(writer, 3 + is_async, engine)
        writer.finish()
    return said


class _limit_files:
    """A disk that is full after some bytes of a file: writing on fails as there, with OSError."""

    def __init__(self, is_here: bool, num_bytes: int = 2000) -> None:
        self._is_here, self._num_bytes = is_here, num_bytes

    def __enter__(self) -> Callable[[Any], None]:
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self._is_here:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._num_bytes, self._limits[1]))
        return lambda writer: None

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


class _alter_written:
    """Storage that gives another rank something else than what this one has read back."""

    def __init__(self, is_here: bool) -> None:
        self._is_here, self._patch = is_here, pytest.MonkeyPatch()

    def __enter__(self) -> Callable[[Any], None]:
        from megatron_dllm.checkpoint.saving import CheckpointWriter

        def altered(writer: Any, save: Any, written: Any) -> None:
            for name in written.checksums:
                flip_bit(save.temporary / name)
            complete(writer, save, written)

        complete = CheckpointWriter._complete
        if self._is_here:
            self._patch.setattr(CheckpointWriter, "_complete", altered)
        return lambda writer: None

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


class _kill_writer:
    """The writer's process is frozen as soon as it exists, then killed."""

    number = signal.SIGKILL

    def __init__(self, is_here: bool) -> None:
        from megatron_dllm.checkpoint import background as checkpoint_process

        self._is_here, self._module, self._child = is_here, checkpoint_process, checkpoint_process._child

    def __enter__(self) -> Callable[[Any], None]:
        if self._is_here:
            self._module._child = _sleeping_child
        return self._after_save

    def _after_save(self, writer: Any) -> None:
        if self._is_here:
            os.kill(writer._background[1].pid, self.number)
            if self.number == signal.SIGSTOP:
                writer._background[1]._deadline = time.monotonic() + 2.0

    def __exit__(self, *_: object) -> None:
        self._module._child = self._child


class _freeze_writer(_kill_writer):
    """The writer's process stops for good, like one whose storage does not answer."""

    number = signal.SIGSTOP


def _sleeping_child(*_: Any) -> None:
    time.sleep(600)


def test_a_writer_that_fails_is_an_error_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(_failing_saves, 2, tmp_path, timeout_s=500.0)
    assert first == second, "every rank says the same"
    for name in ("disk full", "disk full, async"):
        assert re.search(r"rank 1 of 2 failed: .*writing .*/__1_0.distcp: \[Errno 27\] File too large", first[name])
        assert "make room, or choose another run.root" in first[name]
    assert re.search(r"rank 0 of 2 failed: .*__1_0.distcp does not have the checksum", first["altered"])
    assert "rank 1 of 2 failed" in first["killed"]
    assert "killed by SIGKILL" in first["killed"]
    assert "did not finish within checkpoint.timeout_minutes (5)" in first["stuck"]
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    assert [f.name for f in folders.list_checkpoints(checkpoints)] == [f"step_000000{n}" for n in (1, 3, 4)]
    expected = read_tensors(checkpoints / "step_0000001")
    for name in ("step_0000003", "step_0000004"):
        assert sorted(payload_files(checkpoints / name)) == sorted(payload_files(checkpoints / "step_0000001")), (
            "asynchronous and synchronous saves leave the same files"
        )
        assert all(torch.equal(tensor, expected[key]) for key, tensor in read_tensors(checkpoints / name).items())


class _full_at_the_end(_limit_files):
    """A disk that is full once the tensors are written."""

    def __enter__(self) -> Callable[[Any], None]:
        from megatron_dllm.checkpoint.saving import CheckpointWriter

        def limited(writer: Any, save: Any, written: Any) -> None:
            with _limit_files(self._is_here, self._num_bytes):
                complete(writer, save, written)

        self._patch, complete = pytest.MonkeyPatch(), CheckpointWriter._complete
        self._patch.setattr(CheckpointWriter, "_complete", limited)
        return lambda writer: None

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def _full_disk(folder: Path) -> tuple[str, list[str]]:
    """What is said where the checkpoint before would not fit, and where rank 0's disk is full in spite of that."""
    engine = build(folder, ParallelConfig())
    fill_moments(engine)
    writer = writer_of(folder)
    save(writer, 1, engine)
    usage = shutil.disk_usage(folder)
    with pytest.raises(DiskFull) as no_space, pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_dllm.checkpoint.saving.shutil.disk_usage", lambda path: usage._replace(free=5000))
        save(writer, 2, engine)
    said = []
    for fault in (_limit_files, _full_at_the_end):  # common.pt and .metadata, which rank 0 writes alone
        with pytest.raises(DiskFull) as quota, fault(dist.get_rank() == 0, num_bytes=10):
            save(writer, 2, engine)
        said.append(str(quota.value))
    assert [f.name for f in folders.list_checkpoints(writer._checkpoints)] == ["step_0000001"]
    return str(no_space.value), said


def test_a_full_disk_is_named_before_or_while_writing(tmp_path: Path) -> None:
    first, second = run_ranks(_full_disk, 2, tmp_path, timeout_s=300.0)
    assert first == second, "every rank says the same"
    no_space, quotas = first
    assert re.search(r"rank 0 .* as step_0000001 does, and 4.66e-06 GiB are free; make room, or choose", no_space)
    for quota in quotas:
        assert re.search(r"rank 0 of 2 failed: writing .*step_0000002.*File too large.*; make room, or", quota)


def test_a_save_that_does_not_end_ends_the_process() -> None:
    code = (
        "import time; from megatron_dllm.checkpoint.deadline import Deadline\n"
        "with Deadline(0.001, 'Saving step_7'): time.sleep(300)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "Saving step_7 did not finish within checkpoint.timeout_minutes (0.001)" in done.stderr


def _slow_write(folder: Path) -> tuple[int, bool]:
    """Number of looks while the writer was busy, and whether later changes of the weights stayed out of the files."""
    from megatron_dllm.checkpoint import background as checkpoint_process

    engine = build(folder, ParallelConfig())
    fill_moments(engine)
    child = checkpoint_process._child
    checkpoint_process._child = lambda *args: (time.sleep(1.5), child(*args))
    writer = writer_of(folder, is_async=True)
    final = save(writer, 1, engine)
    looks = 0
    weight = next(engine.chunks[0].parameters())
    with torch.no_grad():
        weight.fill_(0.125)  # training goes on
    while not final.exists():
        writer.poll()
        looks += 1
        time.sleep(0.02)
    return looks, not any(bool((tensor == 0.125).all()) for tensor in read_tensors(final).values())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    for looks, is_untouched in run_ranks(_slow_write, 2, tmp_path, timeout_s=300.0):
        assert looks > 3
        assert is_untouched
