"""Steps that must not be applied, ranks that are asked to stop or die, and the end that each of them makes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.kill import ROOT, run_test, run_with_kills
from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import (
    STAGES,
    TRAINING,
    checkpoints_of,
    read_metrics,
    run_config,
    scaled_config,
    train_here,
    write_corpus,
)
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.manifest import checksum, payload_files, read_json
from megatron_dllm.checkpoint.meta import CheckpointMeta
from megatron_dllm.config import CheckpointConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_dllm.parallel.optimizer_parts import optimizer_parts
from megatron_dllm.run.exit_codes import EXIT_FENCED, EXIT_NON_FINITE, EXIT_PREEMPTED, EXIT_REFUSED
from megatron_dllm.run.lease import LEASE_VARIABLE, Lease
from megatron_dllm.run.names import STATE
from megatron_dllm.training.replay import load_step

POISONED_STEP = 2
POISONED_TOKEN = 77


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    write_corpus(path / "corpus")
    return path


def _run_folder(config: TrainConfig) -> Path:
    return Path(config.run.root) / config.run.name


# ---- steps that are not applied ------------------------------------------------------------------


def _train_with_poison(config: TrainConfig, make_observers: Any = None) -> tuple[int, list[bool], bool]:
    """Rank 1 finds NaN in its part of one step's gradient: exit code, steps applied, whether the bad one moved."""
    from megatron_dllm.train import train
    from megatron_dllm.training.engine import Engine, build_engine
    from megatron_dllm.training.observers.observer import Observer
    from megatron_dllm.training.observers.standard import standard_observers
    from megatron_dllm.training.parts import Parts

    engines: list[Engine] = []
    applied: list[bool] = []
    is_moved = False

    def build_poisoned(config: TrainConfig, groups: Any) -> Engine:
        engine = build_engine(config, groups)
        prepare = engine.optimizer.prepare_grads

        def poisoned() -> Any:
            result = prepare()
            is_bad = len(applied) == POISONED_STEP and os.environ["RANK"] == "1"
            for part in optimizer_parts(engine.optimizer)[-1:] if is_bad else []:
                part.optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.nan
            return result

        engine.optimizer.prepare_grads = poisoned
        engines.append(engine)
        return engine

    class Watch(Observer):
        def around_step(self, is_logged: bool) -> Any:
            self.before = _local_state(engines[0])
            return super().around_step(is_logged)

        def after_withheld_step(self, report: Any) -> None:
            nonlocal is_moved
            pairs = zip(self.before, _local_state(engines[0]), strict=True)
            is_moved = is_moved or any(not torch.equal(a, b) for a, b in pairs)
            applied.append(False)

        def after_step(self, report: Any, measured: Any) -> None:
            if report.result.is_applied:
                applied.append(True)

    parts = Parts(
        build_engine=build_poisoned, make_observers=make_observers or standard_observers, extra_observers=[Watch()]
    )
    return train(config, lambda: parts), applied, is_moved


def _local_state(engine: Any) -> list[torch.Tensor]:
    """Copies of this rank's weights, buffers and moments."""
    tensors = [t for chunk in engine.chunks for t in (*chunk.parameters(), *chunk.module.buffers())]
    for part in optimizer_parts(engine.optimizer):
        tensors += [t for entry in part.optimizer.state.values() for t in entry.values()]
    return [tensor.detach().clone() for tensor in tensors]


def _short_config(folder: Path, name: str, layout: ParallelConfig, action: str) -> TrainConfig:
    """The first stage alone."""
    config = run_config(folder, name, layout, optimizer=OptimizerConfig(adam_eps=1e-3, on_non_finite=action))
    return replace(config, schedule=replace(config.schedule, stages={"warmup": STAGES["warmup"]}))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ParallelConfig(), id="DP2"),
        pytest.param(ParallelConfig(expert_model_parallel_size=2), id="EP2"),
        pytest.param(ParallelConfig(pipeline_model_parallel_size=2), id="PP2"),
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(folder: Path, layout: ParallelConfig) -> None:
    pp = layout.pipeline_model_parallel_size
    config = _short_config(folder, f"skipping_{pp}_{layout.expert_model_parallel_size}", layout, "skip")
    results = run_ranks(_train_with_poison, 2, config, timeout_s=500.0)
    records = read_metrics(config)
    for code, applied, is_moved in results:
        assert code == 0
        assert applied == [index != POISONED_STEP for index in range(len(records))]
        assert not is_moved, "a skipped step changes no weight, buffer or moment"
    state = json.loads((max(checkpoints_of(config).glob("step_*")) / STATE).read_text())
    assert state["step"] == len(records)
    assert state["optimizer_step"] == len(records) - 1
    dumped = _poisoned(config)
    ranks = load_step(dumped)
    assert len(ranks) == 2 // pp, "each data-parallel rank writes its own rows"
    assert "not finite" in json.loads((dumped / "step.json").read_text())["reason"]


def _train_with_a_slow_disk(config: TrainConfig) -> tuple[int, list[str]]:
    """Exit code, and the batches in the dump of the poisoned step when this rank is done; rank 1 writes late."""
    from safetensors.torch import save_file

    from megatron_dllm.training.observers.standard import standard_observers
    from megatron_dllm.training.observers.step_dump import StepDump

    def slow(*args: Any) -> None:
        time.sleep(0.5 if os.environ["RANK"] == "1" else 0.0)
        save_file(*args)

    def with_slow_dump(setting: Any) -> list[Any]:
        observers = standard_observers(setting)
        return [replace(each, write=slow) if isinstance(each, StepDump) else each for each in observers]

    code, _, _ = _train_with_poison(config, with_slow_dump)
    return code, sorted(path.name for path in _poisoned(config).glob("data_*"))


def _poisoned(config: TrainConfig) -> Path:
    return _run_folder(config) / "replay" / f"step_{POISONED_STEP:07d}"


def test_a_step_that_is_not_finite_stops_all_ranks_when_its_batch_is_written(folder: Path) -> None:
    config = _short_config(folder, "stopping", ParallelConfig(), "stop")
    dumped = _poisoned(config)
    dumped.mkdir(parents=True)
    (dumped / "data_00002.safetensors").write_text("of an earlier start with three ranks")
    files = ["data_00000.safetensors", "data_00001.safetensors"]
    assert run_ranks(_train_with_a_slow_disk, 2, config, timeout_s=500.0) == [(EXIT_NON_FINITE, files)] * 2
    assert len(read_metrics(config)) == POISONED_STEP
    assert len(load_step(dumped)) == 2
    (dumped / files[1]).unlink()
    with pytest.raises(ValueError, match="the rows of 1 data-parallel ranks instead of 2"):
        load_step(dumped)


# ---- replay --------------------------------------------------------------------------------------


def _write_poisoned_start(config: TrainConfig) -> None:
    """A checkpoint in which the embedding of one token is not a number."""
    from megatron_dllm.checkpoint.saving import CheckpointWriter
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.start import semantics_of

    made = groups.initialize(config.parallel, config.run)
    engine = build_engine(config, made)
    with torch.no_grad():
        engine.chunks[0].module.embedding.word_embeddings.weight[POISONED_TOKEN] = math.nan
    meta = CheckpointMeta(
        asdict(config.model), replace(semantics_of(config, config.schedule.stages["stable"]), shift=True, block_size=1)
    )
    CheckpointWriter(checkpoints_of(config), made.data_context).save(0, engine.chunks, None, meta, {})


def _replay(folder: Path) -> tuple[dict[str, Any], Path, Any]:
    from megatron_dllm.replay import replay

    return replay(folder, None)


def _replay_command(*words: str) -> tuple[int, str]:
    """Exit code and output of `python -m megatron_dllm.replay`."""
    from megatron_dllm.replay import main

    with contextlib.redirect_stdout(io.StringIO()) as output, mock.patch.dict(os.environ, COLUMNS="300"):
        return main(list(words)), output.getvalue()


def test_replay_names_the_rows_that_are_not_finite(folder: Path) -> None:
    training = replace(TRAINING, mask_embedding_noise=0.0)  # its scale is a mean over all embeddings
    start = run_config(folder, "poisoned_start", training=training)
    run_ranks(_write_poisoned_start, 1, start, timeout_s=300.0)
    config = run_config(
        folder, "poisoned", training=training, checkpoint=CheckpointConfig(load=str(_run_folder(start)))
    )
    assert run_ranks(train_here, 2, config, timeout_s=500.0) == [EXIT_NON_FINITE] * 2
    (dumped,) = (_run_folder(config) / "replay").iterdir()
    record, checkpoint, result = run_ranks(_replay, 1, dumped, timeout_s=300.0)[0]
    assert "not finite" in record["reason"]
    assert checkpoint.parent == checkpoints_of(start)
    ranks = load_step(dumped)
    expected = {
        (rank, index, row)
        for rank, batches in enumerate(ranks)
        for index, batch in enumerate(batches)
        for row in range(len(batch.input_ids))
        if bool((batch.input_ids[row] == POISONED_TOKEN).any())
    }
    bad = {(row.data_rank, row.micro_batch, row.row) for row in result.rows if not math.isfinite(row.badness)}
    assert bad == expected
    assert 0 < len(expected) < len(result.rows), "some rows read the token and some do not"
    assert all("embedding" in row.first_bad for row in result.rows[: len(bad)])
    assert all(row.first_bad == "" and row.sample_ids for row in result.rows[len(bad) :])
    code, text = run_ranks(_replay_command, 1, str(dumped), "--rows", "1", timeout_s=300.0)[0]
    assert code == 0
    assert re.search(r"step 1 of stage warmup: .*not finite", text)
    assert f"weights of {checkpoint} (not a checkpoint of this run)" in text
    assert f"{len(bad)} of {len(result.rows)} rows are not finite" in text
    assert text.count(result.rows[0].first_bad) == 1, "one row is asked for"


def _train_with_short_window(config: TrainConfig) -> int:
    from megatron_dllm.train import train
    from megatron_dllm.training.parts import Parts
    from megatron_dllm.training.spikes import SpikeRule

    rule = SpikeRule(config.optimizer.spike_factor, window=6, max_skipped=3)
    return train(config, lambda: Parts(spike_rule=lambda _: rule))


def test_a_spike_stops_the_run_and_is_replayed_exactly(folder: Path) -> None:
    """Two ranks in a layout of their own; one process gets their loss and gradient norm from the dump."""
    config = run_config(
        folder,
        "spiking",
        ParallelConfig(pipeline_model_parallel_size=2),
        optimizer=OptimizerConfig(spike_factor=0.01),
        checkpoint=CheckpointConfig(save_interval_tokens=1),
    )
    assert run_ranks(_train_with_short_window, 2, config, timeout_s=500.0) == [EXIT_NON_FINITE] * 2
    dumped = _run_folder(config) / "replay" / "step_0000003"
    record, checkpoint, result = run_ranks(_replay, 1, dumped, timeout_s=300.0)[0]
    assert re.match(r"gradient norm .* above the limit", record["reason"])
    assert checkpoint == folders.step_folder(checkpoints_of(config), 3)
    assert result.loss == pytest.approx(record["loss"], rel=1e-5)
    assert result.grad_norm == pytest.approx(record["grad_norm"], rel=1e-5)
    assert len(result.rows) == 4
    assert all(math.isfinite(row.badness) and row.first_bad == "" for row in result.rows)
    norms = [row.grad_norm for row in result.rows]
    assert norms == sorted(norms, reverse=True)


def test_spikes_are_judged_anew_in_every_stage_and_too_many_in_a_row_end_the_run(folder: Path) -> None:
    """Every step is a spike as soon as three norms are known; a stage's end has them forgotten."""
    config = run_config(folder, "skipping_spikes", optimizer=OptimizerConfig(spike_factor=0.01, on_non_finite="skip"))
    assert run_ranks(_train_with_short_window, 1, config, timeout_s=500.0) == [EXIT_NON_FINITE]
    stages = [record["stage"] for record in read_metrics(config)]
    warmup, stable = stages.index("stable"), stages.index("decay")
    assert 3 < warmup < 6 and 3 < stable - warmup < 6, "these skip some steps, and too few to end the run"
    skipped = [int(path.name.removeprefix("step_")) for path in sorted((_run_folder(config) / "replay").iterdir())]
    assert skipped == [*range(3, warmup), *range(warmup + 3, stable), *range(stable + 3, stable + 6)]
    assert len(stages) == skipped[-1]


# ---- signals and dead ranks ----------------------------------------------------------------------


def test_torchrun_is_stopped_in_order_and_continues(folder: Path) -> None:
    config = scaled_config(folder, "torchrun", 20.0)
    log = folder / "torchrun.log"
    words = ["--standalone", "--nproc-per-node=2", "-m", "benchmarks.tiny_run", str(folder), "torchrun", "20", "0"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        _wait_for(lambda: len(read_metrics(config)) >= 2, process)
        process.terminate()
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    saved = re.findall(r"asked to stop: saved at step (\d+)", log.read_text())
    assert len(saved) == 1
    expected = folders.step_folder(checkpoints_of(config), int(saved[0]))
    assert folders.latest_checkpoint(checkpoints_of(config)) == expected
    assert read_metrics(config)[-1]["step"] == int(saved[0])


def test_a_process_says_by_its_exit_code_how_it_ended(folder: Path) -> None:
    """The command itself: stopped by a signal, out of disk space, then continued to the end."""
    run = folder / "runs" / "command"
    words = [
        "experiment=tiny_base",
        f"run.root={run.parent}",
        "run.name=command",
        f"data.train={folder}/corpus",
        "data.validation=null",
        "data.tokenizer=null",
        "evaluation.num_tokens=0",
        "evaluation.block_sizes=[32]",
        "schedule.context_length=32",
        "schedule.stages.ar.lr_warmup_tokens=0",
        "model.hidden_size=32",
        "model.num_layers=2",
        "logging.interval_steps=1",
        "logging.tensorboard=false",
    ]

    def start(num_tokens: int, **settings: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_dllm.train", *words, f"schedule.stages.ar.num_tokens={num_tokens}"],
            cwd=ROOT,
            **settings,
        )

    metrics = run / "metrics.jsonl"
    process = start(10**9)
    try:
        _wait_for(lambda: len(metrics.read_bytes().splitlines()) >= 2, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == EXIT_PREEMPTED
        saved = folders.latest_checkpoint(run / "checkpoints")
        assert saved is not None
        before = {name: checksum(saved / name) for name in payload_files(saved)}
        num_tokens = read_json(saved / STATE)["consumed_tokens"] + 1000
        # Room for the records of the run, and not for its weights.
        limit = max((saved / name).stat().st_size for name in before) // 2
        assert metrics.stat().st_size < limit / 2
        process = start(num_tokens, stderr=subprocess.PIPE, preexec_fn=lambda: _limit_files(limit))
        said = process.communicate(timeout=300)[1].decode()
        assert process.returncode == EXIT_REFUSED
        last = said.splitlines()[-1]
        assert re.match(rf"error: rank 0 of 1 failed: writing {run}/checkpoints/.*File too large .*; make room", last)
        assert "Traceback" not in said
        assert folders.list_checkpoints(run / "checkpoints") == [saved]
        assert {name: checksum(saved / name) for name in payload_files(saved)} == before
        process = start(num_tokens)
        assert process.wait(300) == 0
    finally:
        process.kill()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [*range(1, len(steps) + 1)]
    assert steps[-1] > read_json(saved / STATE)["step"]


def _limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def _train_as_generation_one(config: TrainConfig) -> int:
    os.environ[LEASE_VARIABLE] = "1"
    return train_here(config)


def test_a_start_that_was_superseded_before_it_began_says_so_on_all_ranks(folder: Path) -> None:
    config = run_config(folder, "superseded")
    for _ in range(2):
        Lease.take_next(_run_folder(config))
    assert run_ranks(_train_as_generation_one, 2, config, timeout_s=300.0) == [EXIT_FENCED] * 2
    assert not checkpoints_of(config).exists(), "nothing is written"


def _wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        assert process.poll() is None, "the process ended before its time"
        time.sleep(0.02)
    raise TimeoutError("nothing happened within 300 s")


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
def test_killed_ranks_leave_no_trace(tmp_path: Path, is_async: bool) -> None:
    """The short form of `python -m benchmarks.kill`: between steps, in a save, in a start."""
    report, problems = run_test(tmp_path, kills=3, ranks=2, scale=2.0, seed=int(is_async), is_async=is_async)
    assert problems == []
    assert report.other_samples == 0
    assert (report.kills, report.attempts) == (3, 4)
    assert report.in_saves >= 1


class _CrashingAttempt:
    """An attempt whose rank fails by itself."""

    def pids(self) -> list[int]:
        return []

    def poll(self) -> bool | None:
        return False

    def stop(self) -> None:
        pass


def test_an_attempt_that_fails_by_itself_fails_the_kill_test(folder: Path) -> None:
    for kills in (0, 1, 3):
        with pytest.raises(AssertionError, match="an attempt that nobody killed has failed"):
            run_with_kills(_CrashingAttempt, run_config(folder, "crashing"), kills, seed=0, say=lambda text: None)


def test_replay_refuses_what_is_not_there(folder: Path) -> None:
    from megatron_dllm.replay import find_checkpoint

    config = run_config(folder, "nothing")
    with pytest.raises(ValueError, match="holds no checkpoint at or before step 3"):
        find_checkpoint(_run_folder(config) / "replay" / "step_0000003", 3, config)
    with pytest.raises(ValueError, match=r"holds no batch"):
        load_step(folder)
    with pytest.raises(ValueError):
        _replay_command(str(folder))
