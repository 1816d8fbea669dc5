"""What rank 0 decides reaches every rank before there is a process group, and so does a refusal."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.ranks import run_ranks
from megatron_dllm.config import RunConfig
from megatron_dllm.parallel.meeting import Meeting, meet

RUN = RunConfig(name="test", distributed_timeout_minutes=1.0)


def _decide() -> dict[str, Any]:
    assert os.environ["RANK"] == "0", "only rank 0 decides"
    return {"pid": os.getpid()}


def _decided() -> tuple[int, int, bool]:
    """The process that decided, this one, and whether a group was needed for it."""
    meeting = meet(RUN)
    found = meeting.decide(_decide)
    return found["pid"], os.getpid(), dist.is_initialized()


def test_every_rank_hears_what_rank_0_decided() -> None:
    results = run_ranks(_decided, 3)
    assert [pid for pid, _, _ in results] == [results[0][1]] * 3
    assert not any(has_group for _, _, has_group in results)


def _fail(kind: type[Exception]) -> None:
    raise kind("block_size (3) must divide context_length (8); use 4.")


def _refused(kind: type[Exception]) -> tuple[str, str]:
    try:
        meet(RUN).decide(lambda: _fail(kind))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_refusal_is_the_same_sentence_on_every_rank() -> None:
    sentence = "block_size (3) must divide context_length (8); use 4."
    assert run_ranks(_refused, 2, ValueError) == [("ValueError", sentence)] * 2


def test_another_failure_of_rank_0_leaves_nobody_waiting() -> None:
    first, second = run_ranks(_refused, 2, KeyError)
    assert first[0] == "KeyError"
    assert second[0] == "RuntimeError" and second[1].startswith("rank 0 failed: KeyError(")


def test_one_rank_meets_nobody() -> None:
    meeting = Meeting(store=None, rank=0, world_size=1)  # type: ignore[arg-type]
    assert meeting.decide(lambda: 3) == 3
    with pytest.raises(ValueError, match="block_size"):
        meeting.decide(lambda: _fail(ValueError))


def test_a_decision_can_be_handed_on() -> None:
    from megatron_dllm.config import ParallelConfig
    from megatron_dllm.diffusion.block_schedule import BlockSchedule
    from megatron_dllm.training.start import Start
    from megatron_dllm.training.wandb_mode import WandBMode

    start = Start(
        schedule=BlockSchedule(()),
        layout=ParallelConfig(),
        resume=None,
        weights=None,
        reference=None,
        teacher=None,
        passed_over={},
        table=(),
        num_corpus_tokens=7,
        changes=(),
        warnings=("careful",),
        wandb=WandBMode("disabled"),
    )
    assert pickle.loads(pickle.dumps(start)) == start
