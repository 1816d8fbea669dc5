"""Checkpoints of other models and of other semantics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.checkpoint.identity import check_identity, check_start
from megatron_dllm.checkpoint.meta import RunSemantics, read_meta
from megatron_dllm.config import RotaryScalingConfig, ScheduleConfig, StageConfig, TrainConfig
from tests.unit.checkpoint.small_checkpoint import MODEL, make_checkpoint


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    ours = RunSemantics(block_origin="document", mask_token_id=2, context_length=64)
    assert check_identity(folder, MODEL, ours) == read_meta(folder)
    with pytest.raises(ValueError, match=r"model.hidden_size \(16\) differs from the checkpoint .* \(8\)"):
        check_identity(folder, replace(MODEL, hidden_size=16))
    with pytest.raises(ValueError, match=r"block_origin \(row\) differs from the checkpoint .* \(document\)"):
        check_identity(folder, MODEL, replace(ours, block_origin="row"))
    with pytest.raises(ValueError, match=r"contract: mask_token_id \(3\) differs from the checkpoint .* \(2\)"):
        check_identity(folder, MODEL, replace(ours, mask_token_id=3))
    with pytest.raises(ValueError, match=r"contract: context_length \(32\) differs from the checkpoint .* \(64\)"):
        check_identity(folder, MODEL, replace(ours, context_length=32))


def _run(**stage: object) -> TrainConfig:
    schedule = ScheduleConfig(context_length=64, row_length=64, stages={"first": StageConfig(**stage)})
    return TrainConfig(model=MODEL, schedule=schedule)


def test_diffusion_weights_start_what_they_were_trained_for(tmp_path: Path) -> None:
    autoregressive, diffusion = (
        make_checkpoint(tmp_path / "ar", 1, shift=True, block_size=1),
        make_checkpoint(tmp_path / "diffusion", 1),
    )
    to_diffusion, to_ar = _run(objective="block_diffusion", block_size=4), _run(objective="ar", block_size=1)
    for folder, config in ((autoregressive, to_diffusion), (autoregressive, to_ar), (diffusion, to_diffusion)):
        check_start(folder, config)
    with pytest.raises(ValueError, match=r"stages.first.objective \(ar\) cannot start from the diffusion weights"):
        check_start(diffusion, to_ar)
    to_diffusion.data.block_origin = "row"
    check_start(autoregressive, to_diffusion)
    with pytest.raises(ValueError, match=r"data.block_origin \(row\) differs .* \(document\)"):
        check_start(diffusion, to_diffusion)


def test_rotary_angles_change_where_it_is_said(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    config = _run(objective="block_diffusion", block_size=4)
    config.model = replace(MODEL, rotary_scaling=RotaryScalingConfig(factor=2.0, original_max_position_embeddings=64))
    with pytest.raises(ValueError, match=r"model.rotary_scaling \(.*\) differs .* \(None\); .*change_rotary=true"):
        check_start(folder, config)
    config.checkpoint.change_rotary = True
    assert check_start(folder, config) == read_meta(folder)
    config.model.hidden_size = 16
    with pytest.raises(ValueError, match=r"model.hidden_size \(16\)"):
        check_start(folder, config)


def test_a_shift_stays_what_it_is(tmp_path: Path) -> None:
    folders = {shift: make_checkpoint(tmp_path / str(shift), 1, shift=shift) for shift in (True, False)}
    for stored, folder in folders.items():
        for shift in (True, False):
            config = _run(objective="block_diffusion", block_size=4, shift=shift)
            if shift == stored:
                assert check_start(folder, config).is_diffusion
                continue
            with pytest.raises(ValueError, match=rf"first.shift \({str(shift).lower()}\) differs from .* set shift to"):
                check_start(folder, config)
    # Blocks of one token with a shift are an autoregressive model, which may start anything.
    check_start(make_checkpoint(tmp_path / "one", 1, shift=True, block_size=1), _run(block_size=4))
