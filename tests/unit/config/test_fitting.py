"""A schedule that is fitted to a model, and what is said once for all of its stages."""

from __future__ import annotations

import pytest

from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import ScheduleConfig, StageConfig
from megatron_dllm.config.fitting import fitted

WSD = compose_train_config(["schedule=llada2_wsd", "model=ling_mini", "run.name=x", "data.train=x"]).schedule


def _wsd(**changes: object) -> ScheduleConfig:
    return ScheduleConfig(**{**vars(WSD), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("longest", "context_length", "blocks"),
    [
        (40960, 4096, [1, 4, 32, 64, 4096, 2048, 1024, 512, 128, 32]),
        (4096, 4096, [1, 4, 32, 64, 4096, 2048, 1024, 512, 128, 32]),
        (3000, 2048, [1, 4, 32, 64, 2048, 1024, 512, 128, 32]),
        (512, 512, [1, 4, 32, 64, 512, 128, 32]),
        (64, 64, [1, 4, 32, 64, 32]),
    ],
)
def test_blocks_that_a_short_model_cannot_hold_are_left_out(
    longest: int, context_length: int, blocks: list[int]
) -> None:
    schedule = fitted(_wsd(is_fitted_to_model=True), longest)
    assert schedule.context_length == context_length
    assert schedule.tokens_per_row == 2 * context_length
    assert [stage.block_size for stage in schedule.stages.values()] == blocks
    schedule.validate()
    assert fitted(schedule, longest) == schedule


def test_a_schedule_that_is_not_fitted_stays_as_it_is() -> None:
    assert fitted(WSD, 64) == WSD


@pytest.mark.parametrize("budget", [10**9, 999_999_937, 1234])
def test_a_budget_is_shared_out_as_the_stages_say(budget: int) -> None:
    schedule = fitted(_wsd(num_tokens=budget), 4096)
    total = sum(stage.num_tokens for stage in WSD.stages.values())
    assert sum(stage.num_tokens for stage in schedule.stages.values()) == budget
    for name, stage in schedule.stages.items():
        assert abs(stage.num_tokens - WSD.stages[name].num_tokens * budget / total) <= 1
    first, expected = schedule.stages["warmup_1"], WSD.stages["warmup_1"]
    expected_warmup = first.num_tokens * expected.lr_warmup_tokens / expected.num_tokens
    assert first.lr_warmup_tokens == pytest.approx(expected_warmup, abs=1)
    assert fitted(schedule, 4096) == schedule


def test_what_is_said_of_all_stages_goes_into_each() -> None:
    schedule = fitted(_wsd(learning_rate=2e-5, global_batch_size=8, micro_batch_size=2), 4096)
    values = [(s.learning_rate, s.global_batch_size, s.micro_batch_size) for s in schedule.stages.values()]
    assert values == [(2e-5, 8, 2)] * len(WSD.stages)


@pytest.mark.parametrize("key", ["num_tokens", "learning_rate", "global_batch_size", "micro_batch_size"])
def test_a_value_for_all_stages_must_be_positive(key: str) -> None:
    schedule = ScheduleConfig(
        8, stages={"a": StageConfig(num_tokens=8, global_batch_size=1, learning_rate=1e-4)}, **{key: 0}
    )  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"schedule\.{key} \(0\) must be positive"):
        fitted(schedule, 8).validate()


def test_tokens_are_not_shared_out_among_stages_in_epochs() -> None:
    stages = {"sft": StageConfig(block_size=4, num_epochs=2.0, global_batch_size=4, learning_rate=1e-3)}
    schedule = ScheduleConfig(context_length=64, stages=stages, num_tokens=1000)
    with pytest.raises(ValueError, match=r"schedule.num_tokens \(1000\).*stage sft gives num_epochs \(2.0\)"):
        fitted(schedule, 64)
