"""How a stage's noise levels may be drawn, and what of it is refused or said to be without effect."""

from __future__ import annotations

import pytest

from megatron_dllm.config import PreferenceConfig, ScheduleConfig, SftConfig
from megatron_dllm.config.levels import warn_levels
from megatron_dllm.diffusion.block_schedule import BlockSchedule, format_table, stage_table
from tests.unit.config.configs import refusal_of, stage_config, train_config

PAIR = dict(num_views=2, view_relation="complementary", t_min=0.2, t_max=0.8)
COUNTS = dict(sft=SftConfig(), preference=PreferenceConfig())
LEVELS = dict(sft=SftConfig(), preference=PreferenceConfig(is_count=False))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(t_density="normal"), ("one.t_density (normal)", "uniform, bell")),
        (dict(t_density="bell", t_bell_center=0.7, t_max=0.6), ("t_bell_center (0.7)", "[0.001, 0.6]", "use 0.3005")),
        (dict(t_density="bell", t_bell_width=0.01), ("one.t_bell_width (0.01)", "at least 0.05", "use 0.05")),
        (dict(t_density="bell", objective="ar"), ("one.t_density (bell)", "block_diffusion")),
        (dict(t_max_start=0.3), ("one.t_max_start (0.3) and t_max_ramp_share (0)", "both or neither")),
        (dict(t_max_ramp_share=0.3), ("one.t_max_start (null) and t_max_ramp_share (0.3)", "both or neither")),
        (dict(t_max_start=0.3, t_max_ramp_share=1.5), ("one.t_max_ramp_share (1.5)", "[0, 1]")),
        (dict(t_max_start=0.9, t_max=0.8, t_max_ramp_share=0.5), ("one.t_max_start (0.9)", "(0.001, 0.8]")),
        (dict(t_max_start=0.4, t_max_ramp_share=0.5, **PAIR), ("one.t_max_start (0.4)", "symmetric", "null")),
        (dict(t_max_start=0.4, t_max_ramp_share=0.5, **LEVELS), ("one.t_max_start (0.4)", "preference")),
        (dict(loss_weight="cart", cart_p=1.0), ("one.cart_p (1)", "(0, 1)", "0.3 is common")),
        (dict(order_bias=1.0, loss_weight="cart"), ("one.order_bias (1)", "is cart")),
        (dict(order_bias=11.0), ("one.order_bias (11)", "[-10, 10]")),
        (dict(order_bias=1.0, **PAIR), ("one.order_bias (1)", "tilted the other way", "independent or stratified")),
        (dict(order_bias=1.0, loss_weight="uniform"), ("one.order_bias (1)", "loss_weight elbo", "is uniform")),
        (dict(order_bias=1.0, objective="ar"), ("one.order_bias (1.0)", "block_diffusion")),
        (dict(order_bias=1.0, **COUNTS), ("one.order_bias (1.0)", "preference.is_count", "false")),
        (dict(t_density="bell", **COUNTS), ("one.t_density (bell)", "preference.is_count", "false")),
    ],
)
def test_levels_that_cannot_be_are_refused(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    schedule = ScheduleConfig(context_length=256, row_length=1024, stages={"one": stage_config(**changes)})
    message = refusal_of(lambda: train_config(schedule=schedule).validate(1))
    for part in parts:
        assert part in message


def test_all_of_it_together_is_a_stage_and_stands_in_the_table() -> None:
    noise = dict(t_density="bell", t_max_start=0.3, t_max_ramp_share=0.5, order_bias=-1.0)
    stage = stage_config(num_tokens=100_000, **noise)
    schedule = ScheduleConfig(context_length=256, row_length=1024, stages={"one": stage})
    train_config(schedule=schedule).validate(1)
    assert "0.001..0.3->1 bell order -1" in format_table(stage_table(BlockSchedule.from_config(schedule)))


def test_a_bell_without_effect_is_said() -> None:
    (warning,) = warn_levels("one", stage_config(t_bell_width=0.3))
    assert "one.t_bell_width (0.3) has no effect" in warning and "use bell" in warning
    (warning,) = warn_levels("one", stage_config(cart_p=0.2))
    assert "one.cart_p (0.2) has no effect with loss_weight elbo; use cart" in warning
    assert not warn_levels("one", stage_config(t_bell_width=0.3, t_density="bell")) + warn_levels("one", stage_config())
