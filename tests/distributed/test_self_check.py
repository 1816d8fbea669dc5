"""A device of one rank that computes wrongly, or lacks what another has, stops all ranks with one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import run_config, write_corpus
from megatron_dllm.config import RunConfig, TrainConfig
from megatron_dllm.parallel.meeting import meet
from megatron_dllm.run.command import run_command
from megatron_dllm.run.exit_codes import EXIT_REFUSED


def _mixed_up(rows: Tensor, probs: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor]:
    """The products of experts that take each other's tokens."""
    from megatron_dllm.model.experts import grouped_experts

    return (grouped_experts(rows, probs, torch.tensor([9, 0, 5, 2]), first, second),)


def _refuse_on_rank_1() -> None:
    from megatron_dllm.training.self_check import check_experts

    if os.environ["RANK"] == "1":
        check_experts(torch.device("cpu"), torch.float32, _mixed_up)


def _build_engine(config: TrainConfig, groups: Any) -> Any:
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.self_check import check_together

    check_together(_refuse_on_rank_1)
    return build_engine(config, groups)


def _train(config: TrainConfig) -> tuple[int | str | None, str]:
    """The command's exit code on this rank, and what it says; the experts of rank 1 are mixed up."""
    from megatron_dllm.train import train
    from megatron_dllm.training.parts import Parts

    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        run_command(lambda: train(config, lambda: Parts(build_engine=_build_engine)))
    return end.value.code, said.getvalue()


def test_a_rank_that_computes_wrongly_stops_the_run_before_it_trains(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    codes, said = zip(*run_ranks(_train, 2, run_config(tmp_path, "wrong"), timeout_s=300.0), strict=True)
    assert codes == (EXIT_REFUSED, EXIT_REFUSED)
    (line,) = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank 1 of 2, on {platform.node()}: experts (grouped): the output is off by ")
    assert "Traceback" not in "".join(said)


def _lack(kind: str) -> None:
    if os.environ["RANK"] == "1" and kind:
        raise {"ValueError": ValueError, "KeyError": KeyError}[kind]("TransformerEngine is missing")


def _check_together(kind: str) -> str:
    import torch.distributed as dist

    from megatron_dllm.training.self_check import check_together

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        check_together(lambda: _lack(kind))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _agree(kind: str) -> str:
    try:
        meet(RunConfig(name="test", distributed_timeout_minutes=1.0)).agree(lambda: _lack(kind))
    except ValueError as error:
        return str(error)
    return "none"


def _agree_twice() -> list[str]:
    """What this rank is told before there are groups, and behind that."""
    return [_agree(""), _check_together(""), _check_together("KeyError"), _check_together("ValueError")]


def test_every_rank_hears_whose_device_is_refused() -> None:
    where = f"rank 1 of 2, on {platform.node()}: TransformerEngine is missing"
    broken = "RuntimeError: rank 1 of 2 failed: KeyError: 'TransformerEngine is missing'"
    assert run_ranks(_agree_twice, 2) == [["none", "none", broken, f"ValueError: {where}"]] * 2
    assert run_ranks(_agree, 3, "ValueError") == [where.replace("of 2", "of 3")] * 3
