"""Stages of preferences: what they need, what is refused, and the noise that they have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config import (
    CapConfig,
    CheckpointConfig,
    DataConfig,
    NoiseConfig,
    PreferenceConfig,
    ReferenceConfig,
    ScheduleConfig,
    SftConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from tests.unit.config.configs import refusal_of, stage_config, train_config

PREFERENCE = dict(sft=SftConfig(), preference=PreferenceConfig())


def preference_config(stage: dict[str, object] | None = None, **sections: object) -> TrainConfig:
    """A run of preferences, with what is to be refused."""
    changed = stage_config(**{**PREFERENCE, **(stage or {})})
    schedule = ScheduleConfig(context_length=256, row_length=1024, stages={"one": changed})
    fields = dict(
        schedule=schedule, checkpoint=CheckpointConfig(load="sft"), preference=ReferenceConfig(reference="frozen")
    )
    return train_config(**{**fields, **sections})


@pytest.mark.parametrize(
    ("stage", "sections", "parts"),
    [
        (dict(preference=PreferenceConfig(beta=0.0)), {}, ("one.preference.beta (0.0)", "positive")),
        (dict(preference=PreferenceConfig(sft_coefficient=-1.0)), {}, ("sft_coefficient (-1.0)", "not be negative")),
        (dict(objective="ar", sft=None), {}, ("one.preference needs the block_diffusion objective", "is ar", "null")),
        (dict(sft=None), {}, ("one.sft must be given with schedule.stages.one.preference",)),
        (dict(sft=SftConfig(loss_per="answer")), {}, ("one.sft must be given", "loss_per token")),
        (dict(sft=SftConfig(fill_weight=0.5)), {}, ("one.sft must be given", "fill_weight 1")),
        (dict(cap=CapConfig(2.0)), {}, ("one.cap.coefficient (2)", "must be 0")),
        (dict(loss_weight="uniform"), {}, ("one.loss_weight (uniform)", "must be elbo")),
        (dict(t_min=0.2), {}, ("t_min, t_max (0.2, 1.0) have no effect", "is_count to false")),
        (dict(global_batch_size=1), {}, ("global_batch_size (1)", "at least 2")),
        (
            dict(preference=PreferenceConfig(share_noise=False), num_views=2),
            {},
            ("share_noise (false) needs an even number of independent views", "num_views 2, view_relation stratified"),
        ),
        (
            dict(preference=PreferenceConfig(share_noise=False), num_views=2, view_relation="independent"),
            dict(preference=ReferenceConfig("pairs.scores")),
            ("share_noise (false) needs preference.reference=frozen",),
        ),
        ({}, dict(checkpoint=CheckpointConfig()), ("checkpoint.load (null)", "schedule.stages.one.preference")),
        ({}, dict(preference=ReferenceConfig()), ("preference.reference (null)", "frozen")),
        (
            {},
            dict(training=TrainingConfig(mask_embedding_noise=0.1, mask_embedding_noise_steps=9)),
            ("training.mask_embedding_noise (0.1) must be 0",),
        ),
        (
            {},
            dict(training=TrainingConfig(moe_router_bias_update_rate=0.1)),
            ("training.moe_router_bias_update_rate (0.1) must be 0",),
        ),
    ],
)
def test_preferences_that_cannot_be_trained_are_refused(
    stage: dict[str, object], sections: dict[str, object], parts: tuple[str, ...]
) -> None:
    preference_config().validate(1)
    message = refusal_of(lambda: preference_config(stage, **sections).validate(1))
    for part in parts:
        assert part in message


def test_preferences_are_a_run_of_their_own() -> None:
    stages = {"sft": stage_config(sft=SftConfig()), "dpo": stage_config(**PREFERENCE)}
    schedule = ScheduleConfig(context_length=256, row_length=1024, stages=stages)
    message = refusal_of(lambda: preference_config(schedule=schedule).validate(1))
    assert "schedule.stages.dpo.preference needs a run of its own" in message and "and sft would train it" in message


def test_the_noise_of_preferences_covers_the_whole_range_by_counts() -> None:
    stage = stage_config(sft=SftConfig(), preference=PreferenceConfig(share_levels=True), num_views=4)
    spec = NoiseSpec.for_stage(NoiseConfig(), stage)
    assert (spec.is_count, spec.share_levels, spec.t_min, spec.t_max, spec.num_views) == (True, True, 0.0, 1.0, 4)
    by_level = replace(stage, t_min=0.1, preference=PreferenceConfig(is_count=False))
    spec = NoiseSpec.for_stage(NoiseConfig(), by_level)
    assert (spec.is_count, spec.share_levels, spec.t_min) == (False, False, 0.1)
    assert RowGeometry.of_stage(stage, ScheduleConfig(256, 2048), DataConfig()).rows_of_pairs == 16
