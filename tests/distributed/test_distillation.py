"""Distillation over ranks: a divided vocabulary changes nothing, and a layout trains what one rank trains."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import STAGES, checkpoints_of, read_steps, run_config, train_ranks, write_corpus
from megatron_dllm.checkpoint.meta import read_state
from megatron_dllm.config import (
    CheckpointConfig,
    DistillConfig,
    ParallelConfig,
    TeacherConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_dllm.model.distillation import Teacher, distilled_cross_entropy
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED

NUM_TARGETS, HIDDEN, VOCAB = 40, 12, 50
OF_NLL, OF_KL = torch.linspace(0.0, 2.0, NUM_TARGETS), torch.linspace(3.0, 0.0, NUM_TARGETS)


def _head(rank: int, size: int, group: torch.distributed.ProcessGroup | None, top_k: int | None) -> dict[str, Tensor]:
    """Outputs and gradients on this rank's part of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden, states = torch.randn(2, NUM_TARGETS, HIDDEN, generator=generator)
    weight, teacher_weight = torch.randn(2, VOCAB, HIDDEN, generator=generator).chunk(size, dim=1)[rank].clone()
    targets = torch.randint(VOCAB, (NUM_TARGETS,), generator=generator)
    teacher = Teacher(states, torch.arange(NUM_TARGETS) % 4 > 0, teacher_weight)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    outputs = distilled_cross_entropy(hidden, weight, targets, teacher, group, top_k, chunk_elements=7 * len(weight))
    of_hidden, of_weight = torch.autograd.grad((outputs.nll * OF_NLL + outputs.kl * OF_KL).sum(), (hidden, weight))
    return {"nll": outputs.nll.detach(), "kl": outputs.kl.detach(), "hidden": of_hidden, "weight": of_weight}


def _head_of_rank(top_k: int | None) -> dict[str, Tensor]:
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    result = _head(rank, size, torch.distributed.group.WORLD, top_k)
    torch.distributed.all_reduce(result["hidden"])
    return result


@pytest.mark.parametrize("top_k", [None, 6])
def test_a_divided_vocabulary_changes_no_output_and_no_gradient(top_k: int | None) -> None:
    expected, results = _head(0, 1, None, top_k), run_ranks(_head_of_rank, 2, top_k)
    for result in results:
        for name in ("nll", "kl", "hidden"):
            torch.testing.assert_close(result[name], expected[name], rtol=1e-5, atol=1e-5)
    weight = torch.cat([result["weight"] for result in results])
    torch.testing.assert_close(weight, expected["weight"], rtol=1e-5, atol=1e-5)


# ---- training ----------------------------------------------------------------------------------

STAGE = replace(STAGES["warmup"], num_tokens=400, lr_warmup_tokens=0)
LAYOUTS = {
    "CP2": ParallelConfig(context_parallel_size=2),
    "TP2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2),
    "interleaved": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
}
SOURCES = {
    "teacher": replace(STAGE, distill=DistillConfig(1.0, "teacher", top_k=5)),
    "clean": replace(STAGE, clean_block_size=1, distill=DistillConfig(1.0)),
}


def config_of(folder: Path, name: str, source: str, layout: ParallelConfig | None = None) -> TrainConfig:
    start = str(folder / "runs" / "start")
    is_start = name == "start"
    config = run_config(
        folder,
        name,
        layout,
        training=TrainingConfig(),
        teacher=TeacherConfig(start if source == "teacher" and not is_start else None),
        checkpoint=CheckpointConfig(keep_last=1, timeout_minutes=10.0, load=None if is_start else start),
    )
    stage = replace(STAGE, objective="ar", block_size=1) if is_start else SOURCES[source]
    return replace(config, schedule=replace(config.schedule, row_length=96, stages={"only": stage}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distillation")
    write_corpus(folder / "corpus", 60)
    assert train_ranks(1, config_of(folder, "start", "clean")) == [0]
    for source in SOURCES:
        assert train_ranks(1, config_of(folder, source, source)) == [0]
    return folder


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_comes_closer_to_its_teacher(source: str, folder: Path) -> None:
    steps = read_steps(config_of(folder, source, source))
    for step in steps:
        assert 0.0 < step["distill_loss"] < step["loss"] and step["distill_kl"] > 0.0
    assert steps[-1]["distill_kl"] < steps[0]["distill_kl"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_what_one_rank_trains(name: str, source: str, folder: Path) -> None:
    config = config_of(folder, f"{name}_{source}", source, LAYOUTS[name])
    assert train_ranks(2, config) == [0, 0]
    found, expected = read_steps(config), read_steps(config_of(folder, source, source))
    assert len(found) == len(expected) >= 2
    for key in ("loss", "grad_norm", "distill_loss", "distill_kl"):
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-5), key
        assert found[1][key] == pytest.approx(expected[1][key], rel=1e-4), key


def test_a_teacher_that_cannot_teach_is_refused(folder: Path) -> None:
    from megatron_dllm.training.teacher_needed import find_teacher, teacher_warnings

    config = config_of(folder, "other", "teacher")
    diffusion = replace(config, teacher=TeacherConfig(str(checkpoints_of(config_of(folder, "clean", "clean")).parent)))
    with pytest.raises(ValueError, match=r"teacher\.checkpoint \(.*\) holds diffusion weights, .* autoregressive"):
        find_teacher(diffusion)
    wide = replace(config, model=replace(config.model, hidden_size=64))
    with pytest.raises(ValueError, match=r"teacher\.checkpoint .*model\.hidden_size \(64\) differs"):
        find_teacher(wide)
    unused = replace(config, schedule=replace(config.schedule, stages={"only": STAGE}))
    assert find_teacher(unused) is None
    (warning,) = teacher_warnings(unused)
    assert "has no effect" in warning


def test_a_run_goes_on_with_its_own_teacher_alone(folder: Path) -> None:
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start, find_same_teacher

    config = config_of(folder, "teacher", "teacher")
    start = decide_start(config, 1, Sources(config))
    assert start.teacher is not None and start.resume is not None
    state = start.resume.state
    assert state.teacher == start.teacher.fingerprint, "what the run has written"
    earlier, other = (replace(start.resume, state=replace(state, teacher=value)) for value in ("", "f" * 64))
    assert find_same_teacher(config, earlier) == start.teacher, "a version that did not write it"
    with pytest.raises(ValueError, match=r"teacher\.checkpoint \(.*start\) has other weights .* taught this run \(f"):
        find_same_teacher(config, other)


def test_a_run_remembers_its_teacher_through_a_start_that_needs_none(folder: Path) -> None:
    taught, config = (config_of(folder, name, "teacher") for name in ("teacher", "taught_before"))
    shutil.copytree(checkpoints_of(taught).parent, checkpoints_of(config).parent)
    stages = {"only": STAGE, "more": STAGE}
    assert train_ranks(1, replace(config, schedule=replace(config.schedule, stages=stages)), 1) == [EXIT_PREEMPTED]
    before, after = (read_state(max(checkpoints_of(run).glob("step_*"))) for run in (taught, config))
    assert after["step"] == before["step"] + 1
    assert after["teacher"] == before["teacher"] != ""
