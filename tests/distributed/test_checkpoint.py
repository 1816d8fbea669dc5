"""What a checkpoint survives: other layouts, dead writers, full disks, damage, and strangers' pickles."""

from __future__ import annotations

import logging
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dllm import checkpoint_folder as folders
from megatron_dllm.config import ModelConfig, ParallelConfig
from tests.distributed.ranks import run_ranks
from tests.tiny_run import DENSE, MODEL, checkpoints_of, read_tensors, run_config

TWO_RANKS = {
    "DP2": ParallelConfig(),
    "TP2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2),
    "TP2 x EP2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2,
                                expert_tensor_parallel_size=1),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "PP2 virtual": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "CP2": ParallelConfig(context_parallel_size=2),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
}
FOUR_RANKS = {
    "TP2 x PP2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2,
                                expert_tensor_parallel_size=2),
    "PP2 x EP2": ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
    "CP2 x EP4": ParallelConfig(context_parallel_size=2, expert_model_parallel_size=4),
}
OPTIMIZER_STEP = 7


def _engine(folder: Path, layout: ParallelConfig, model: ModelConfig = MODEL) -> Any:
    from megatron.core import parallel_state

    from megatron_dllm import parallel
    from megatron_dllm.training.engine import build_engine

    parallel_state.destroy_model_parallel()
    config = run_config(folder, "run", layout, model=model)
    parallel.initialize(config.parallel, config.run)
    return build_engine(config)


def _bf16(layouts: dict[str, ParallelConfig]) -> dict[str, ParallelConfig]:
    return {name: replace(layout, precision="bf16") for name, layout in layouts.items()}


def _writer(folder: Path, **options: Any) -> Any:
    from megatron_dllm.checkpoint import CheckpointWriter

    return CheckpointWriter(folder / "runs" / "run" / "checkpoints", **options)


def _save(writer: Any, step: int, engine: Any) -> Path:
    layout = {"precision": "fp32"}
    contract = {"format": 1, "model": asdict(MODEL), "step": step, "layout": layout, "stage": "stable",
                "contract": {"shift": False, "block_size": 32,
                             "block_origin": "document", "mask_token_id": MODEL.mask_token_id, "context_length": 32}}
    return writer.save(step, engine.chunks, engine.optimizer, contract,
                       {"optimizer_step": OPTIMIZER_STEP, "step": step})


def _parts(engine: Any) -> list[Any]:
    return [part for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
            if not getattr(part, "is_stub_optimizer", False)]


def _fill_moments(engine: Any) -> None:
    """Numbers of their own in every element of the optimizer's state."""
    generator = torch.Generator().manual_seed(3)
    for part in _parts(engine):
        part._init_optimizer_states_with_dummy_values()
        for entry in part.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                entry[name].copy_(torch.rand(entry[name].shape, generator=generator))
            entry["step"] = torch.tensor(float(OPTIMIZER_STEP))
        for group in getattr(part, "shard_fp32_from_float16_groups", []):
            for main in group:  # the fp32 weights behind bf16 ones: close to them, not equal
                main.mul_(1 + 1e-4 * torch.rand(main.shape, generator=generator))


# ---- layouts -------------------------------------------------------------------------------------


def _write_reference(folder: Path, model: ModelConfig, precision: str) -> None:
    engine = _engine(folder, ParallelConfig(precision=precision), model)
    _fill_moments(engine)
    _save(_writer(folder), 0, engine)


def _load_and_save(folder: Path, layouts: dict[str, ParallelConfig], model: ModelConfig) -> dict[str, list[str]]:
    """For each layout: load, save, and name the tensors that came out otherwise (on rank 0)."""
    from megatron_dllm.checkpoint import load_run

    reference = checkpoints_of(run_config(folder, "run")) / "step_0000000"
    expected = read_tensors(reference)
    different = {}
    for number, (name, layout) in enumerate(layouts.items(), 1):
        engine = _engine(folder, layout, model)
        load_run(reference, engine.chunks, engine.optimizer)
        steps = {float(entry["step"]) for part in _parts(engine) for entry in part.optimizer.state.values()}
        assert steps == {OPTIMIZER_STEP}
        saved = _save(_writer(folder), number, engine)
        dist.barrier()
        if dist.get_rank() == 0:
            tensors = read_tensors(saved)
            assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
            different[name] = [key for key, tensor in tensors.items() if not torch.equal(tensor, expected[key])]
    return different


@pytest.mark.parametrize(("model", "ranks", "layouts"), [
    pytest.param(MODEL, 2, TWO_RANKS, id="experts-2"),
    pytest.param(MODEL, 4, FOUR_RANKS, id="experts-4"),
    pytest.param(DENSE, 2, {name: replace(TWO_RANKS[name], expert_tensor_parallel_size=None)
                            for name in ("DP2", "TP2", "PP2")}, id="dense-2"),
    pytest.param(MODEL, 2, _bf16({name: TWO_RANKS[name] for name in ("DP2", "TP2 x EP2", "PP2")}), id="bf16-2"),
])
def test_weights_and_optimizer_state_pass_through_every_layout_bit_for_bit(
        tmp_path: Path, model: ModelConfig, ranks: int, layouts: dict[str, ParallelConfig]) -> None:
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
    engine = _engine(folder, ParallelConfig())
    _fill_moments(engine)
    _save(_writer(folder), 1, engine)
    said = {}
    is_failing = dist.get_rank() == 1
    for name, is_async, fault in (("disk full", False, _limit_files), ("disk full, async", True, _limit_files),
                                  ("altered", False, _alter_written),
                                  ("killed", True, _kill_writer), ("stuck", True, _freeze_writer)):
        writer = _writer(folder, is_async=is_async, timeout_minutes=5.0)
        began = time.monotonic()
        with pytest.raises(RuntimeError) as caught, fault(is_failing) as after_save:
            _save(writer, 2, engine)
            after_save(writer)
            writer.finish()
        said[name] = str(caught.value)
        assert time.monotonic() - began < 120
        assert folders.list_checkpoints(folder / "runs" / "run" / "checkpoints")[-1].name == "step_0000001"
    for is_async in (False, True):
        writer = _writer(folder, is_async=is_async)
        _save(writer, 3 + is_async, engine)
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
        from megatron_dllm.checkpoint import CheckpointWriter

        def altered(writer: Any, save: Any, written: Any) -> None:
            for name in written.checksums:
                _flip(save.temporary / name)
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
        from megatron_dllm import checkpoint_process

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
        assert sorted(folders.payload_files(checkpoints / name)) == sorted(folders.payload_files(
            checkpoints / "step_0000001")), "asynchronous and synchronous saves leave the same files"
        assert all(torch.equal(tensor, expected[key]) for key, tensor in read_tensors(checkpoints / name).items())


def _full_disk(folder: Path) -> tuple[str, str]:
    """What is said where the checkpoint before would not fit, and where rank 0's disk is full in spite of that."""
    engine = _engine(folder, ParallelConfig())
    _fill_moments(engine)
    writer = _writer(folder)
    _save(writer, 1, engine)
    usage = shutil.disk_usage(folder)
    with pytest.raises(RuntimeError) as no_space, pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_dllm.checkpoint.shutil.disk_usage", lambda path: usage._replace(free=5000))
        _save(writer, 2, engine)
    # Less than common.pt, which rank 0 writes alone; the other hears of it when that process is gone.
    with pytest.raises(RuntimeError) as quota, _limit_files(dist.get_rank() == 0, num_bytes=10):
        _save(writer, 2, engine)
    assert [f.name for f in folders.list_checkpoints(writer._checkpoints)] == ["step_0000001"]
    return str(no_space.value), str(quota.value)


def test_a_full_disk_is_named_before_or_while_writing(tmp_path: Path) -> None:
    for no_space, quota in run_ranks(_full_disk, 2, tmp_path, timeout_s=300.0):
        assert re.search(r"rank 0 .* as step_0000001 does, and 4.66e-06 GiB are free; make room, or choose", no_space)
        assert re.search(r"writing .*step_0000002.*if the disk is full, make room, or choose another run.root", quota)


def test_a_save_that_does_not_end_ends_the_process() -> None:
    code = ("import time; from megatron_dllm.checkpoint import _Deadline\n"
            "with _Deadline(0.001, 'Saving step_7'): time.sleep(300)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "Saving step_7 did not finish within checkpoint.timeout_minutes (0.001)" in done.stderr


def _slow_write(folder: Path) -> tuple[int, bool]:
    """Number of looks while the writer was busy, and whether later changes of the weights stayed out of the files."""
    from megatron_dllm import checkpoint_process

    engine = _engine(folder, ParallelConfig())
    _fill_moments(engine)
    child = checkpoint_process._child
    checkpoint_process._child = lambda *args: (time.sleep(1.5), child(*args))
    writer = _writer(folder, is_async=True)
    final = _save(writer, 1, engine)
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


# ---- damage --------------------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    os.truncate(folder / "__1_0.distcp", 1000)


def _alter(folder: Path) -> None:
    _flip(folder / "__0_0.distcp")


def _flip(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.seek(5000)
        byte = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([byte[0] ^ 1]))


def _alter_state(folder: Path) -> None:
    path = folder / folders.STATE
    path.write_text(path.read_text().replace(f": {OPTIMIZER_STEP}", ": 8"))


def _lose(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def _half(folder: Path) -> None:
    for name in (folders.MANIFEST, folders.STATE, ".metadata"):
        (folder / name).unlink()


class _Payload:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(_Payload.where),)

    where = Path()


def _poison(folder: Path) -> None:
    _Payload.where = folder.parent / "pickle_ran"
    (folder / ".metadata").write_bytes(pickle.dumps(_Payload()))
    manifest = folders.read_json(folder / folders.MANIFEST)
    manifest[".metadata"] = folders.checksum(folder / ".metadata")  # a careful stranger
    folders.write_json(folder / folders.MANIFEST, manifest)


DAMAGES = {_truncate: "__1_0.distcp has 1000 bytes instead of", _alter: "__0_0.distcp does not have the checksum",
           _alter_state: "state.json does not have the checksum", _lose: "__1_0.distcp is missing",
           _half: "manifest.json is missing",
           _poison: ".metadata is not the metadata of a torch_dist checkpoint"}


def _load_damaged(folder: Path) -> dict[str, tuple[str, str, list[str]]]:
    """For each damage of the newest: what an explicit load says, where a resume starts, and its warnings."""
    from megatron_dllm.checkpoint import load_weights
    from megatron_dllm.training.resume import load_newest

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_dllm.training.resume").addHandler(handler)
    config = run_config(folder, "run")
    engine = _engine(folder, ParallelConfig())
    _fill_moments(engine)
    _save(_writer(folder), 1, engine)
    results = {}
    for damage in DAMAGES:
        newest = _save(_writer(folder), 2, engine)
        dist.barrier()
        if dist.get_rank() == 0:
            damage(newest)
        dist.barrier()
        with pytest.raises(ValueError) as caught:
            load_weights(newest, engine.chunks)
        warnings.clear()
        found = load_newest(config, engine.chunks, engine.optimizer)
        assert found is not None
        results[damage.__name__] = (str(caught.value), found[0].name, list(warnings))
        dist.barrier()
    if dist.get_rank() == 0:
        _alter(folders.step_folder(checkpoints_of(config), 1))
    dist.barrier()
    with pytest.raises(ValueError, match=r"holds no whole checkpoint: all of \['step_0000001'\] are damaged"):
        load_newest(config, engine.chunks, engine.optimizer)
    return results


def test_damage_is_named_and_a_resume_falls_back_aloud(tmp_path: Path) -> None:
    first, second = run_ranks(_load_damaged, 2, tmp_path, timeout_s=500.0)
    for damage, words in DAMAGES.items():
        for results in (first, second):
            message, found, warnings = results[damage.__name__]
            assert words in message
            assert found == "step_0000001"
            assert words in warnings[0]
            assert "passed over step_0000002" in warnings[0]
        assert "renamed to damaged-step_0000002; the run continues from step_0000001" in first[damage.__name__][2][1]
    assert not (checkpoints_of(run_config(tmp_path, "run")) / "pickle_ran").exists()


def _other_identity(folder: Path) -> list[str]:
    from megatron_dllm.training.resume import load_newest

    engine = _engine(folder, ParallelConfig())
    _fill_moments(engine)
    _save(_writer(folder), 1, engine)
    config = run_config(folder, "run")
    others = [replace(config, model=replace(MODEL, hidden_size=64)),
              replace(config, data=replace(config.data, block_origin="row")),
              replace(config, model=replace(MODEL, mask_token_id=3)),
              replace(config, parallel=ParallelConfig(precision="bf16")),
              replace(config, schedule=replace(config.schedule, stages={
                  **config.schedule.stages, "stable": replace(config.schedule.stages["stable"], block_size=16)})),
              replace(config, schedule=replace(config.schedule, stages={"other": config.schedule.stages["stable"]}))]
    said = []
    for other in others:
        with pytest.raises(ValueError) as caught:
            load_newest(other, engine.chunks, engine.optimizer)
        said.append(str(caught.value))
    return said


def test_a_checkpoint_of_another_model_or_contract_is_refused(tmp_path: Path) -> None:
    model, grid, mask, precision, block, stages = run_ranks(_other_identity, 1, tmp_path, timeout_s=300.0)[0]
    assert "model.hidden_size (64) differs from the checkpoint" in model
    assert "block_origin (row) differs from the checkpoint" in grid
    assert "model.mask_token_id (3) differs from the checkpoint" in mask
    assert "parallel.precision (bf16) differs from the checkpoint" in precision
    assert "schedule.stages.stable: block_size (16) differs from the checkpoint" in block
    assert "schedule.stages has no stable, the stage of the checkpoint" in stages
