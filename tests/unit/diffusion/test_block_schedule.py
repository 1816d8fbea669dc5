"""Stages, boundaries and learning rates, against values worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dllm.config import ScheduleConfig, SftConfig, StageConfig
from megatron_dllm.diffusion.block_schedule import (
    BlockSchedule,
    RowEstimate,
    format_table,
    max_batch_tokens,
    stage_table,
)


def stage(num_tokens: int, **changes) -> StageConfig:
    """A stage whose global batch holds at most 4 rows x 16 tokens = 64 document tokens."""
    values = {"block_size": 4, "num_tokens": num_tokens, "global_batch_size": 4, "learning_rate": 1e-3} | changes
    return StageConfig(**values)


def schedule_of(**stages: StageConfig) -> BlockSchedule:
    config = ScheduleConfig(context_length=8, row_length=16, stages=stages)
    config.validate()
    return BlockSchedule.from_config(config)


WSD = {
    "warmup": stage(1000, block_size=1, learning_rate=4e-4, lr_warmup_tokens=400),
    "stable": stage(2000, block_size=8, learning_rate=4e-4),
    "decay": stage(1000, block_size=2, learning_rate=4e-4, final_learning_rate=1e-4, lr_shape="linear"),
}


def test_stages_lie_end_to_end():
    schedule = schedule_of(**WSD)
    assert [(s.name, s.index, s.start, s.end) for s in schedule.stages] == [
        ("warmup", 0, 0, 1000),
        ("stable", 1, 1000, 3000),
        ("decay", 2, 3000, 4000),
    ]
    assert schedule.total_tokens == 4000


@pytest.mark.parametrize(
    "consumed, name",
    [
        (0, "warmup"),
        (999, "warmup"),
        (1000, "stable"),
        (1001, "stable"),
        (2999, "stable"),
        (3000, "decay"),
        (3999, "decay"),
    ],
)
def test_a_step_belongs_to_the_stage_in_which_it_starts(consumed, name):
    assert schedule_of(**WSD).stage_at(consumed).name == name


@pytest.mark.parametrize("consumed", [-1, 4000, 5000])
def test_no_step_starts_outside_the_schedule(consumed):
    with pytest.raises(AssertionError, match="consumed"):
        schedule_of(**WSD).stage_at(consumed)


def test_progress_and_remaining():
    schedule = schedule_of(**WSD)
    stable = schedule.stages[1]
    assert [stable.progress(c) for c in (0, 1000, 1500, 3000, 3050)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert [stable.remaining(c) for c in (0, 1000, 1500, 3000, 3050)] == [2000, 2000, 1500, 0, 0]
    assert [schedule.remaining(c) for c in (0, 1500, 4000, 4050)] == [4000, 2500, 0, 0]
    assert [schedule.is_finished(c) for c in (0, 3999, 4000, 4050)] == [False, False, True, True]


@pytest.mark.parametrize(
    "before, after, name",
    [
        (0, 60, None),
        (940, 999, None),
        (940, 1000, "warmup"),
        (950, 1010, "warmup"),
        (1000, 1060, None),
        (2990, 3050, "stable"),
        (3990, 4050, "decay"),
    ],
)
def test_the_step_that_reaches_the_end_finishes_the_stage(before, after, name):
    finished = schedule_of(**WSD).finished_stage(before, after)
    assert (finished and finished.name) == name


def test_walk_with_uneven_steps():
    """Every step knows its stage, every stage ends once, and a resume needs nothing but the consumed tokens."""
    schedule, consumed, owners, finished = schedule_of(**WSD), 0, [], []
    while not schedule.is_finished(consumed):
        owners.append(schedule_of(**WSD).stage_at(consumed).name)
        before, consumed = consumed, consumed + 64 - len(owners) % 3
        done = schedule.finished_stage(before, consumed)
        finished += [done.name] if done else []
    # Three steps take 63 + 62 + 64 = 189 tokens: after 15 steps 945, after 16 1008 >= 1000; and so on.
    assert (owners.count("warmup"), owners.count("stable"), owners.count("decay")) == (16, 32, 16)
    assert finished == ["warmup", "stable", "decay"]


@pytest.mark.parametrize(
    "consumed, expected",
    [
        # Warmup: 0 -> 4e-4 over 400 tokens, then constant.
        (0, 0.0),
        (100, 1e-4),
        (200, 2e-4),
        (400, 4e-4),
        (999, 4e-4),
        # Stable: constant.
        (1000, 4e-4),
        (2999, 4e-4),
        # Decay: 4e-4 -> 1e-4 over 1000 tokens.
        (3000, 4e-4),
        (3250, 3.25e-4),
        (3500, 2.5e-4),
        (3900, 1.3e-4),
    ],
)
def test_learning_rate_of_the_stages(consumed, expected):
    assert schedule_of(**WSD).learning_rate(consumed) == pytest.approx(expected)


@pytest.mark.parametrize(
    "shape, expected",
    [
        # Warmup over 200 of 1000 tokens, then 800 tokens from 1.0 to 0.2; shares 0, 1/4, 1/2, 3/4, 1.
        # Cosine at shares 1/4 and 3/4: (1 - cos(pi/4)) / 2 = 0.1464466, so 1 - 0.8 * 0.1464466 and
        # 0.2 + 0.8 * 0.1464466.
        ("linear", [0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.0, 0.5, 1.0, 0.88284271, 0.6, 0.31715729, 0.2]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_shapes(shape, expected):
    final = None if shape == "constant" else 0.2
    only = schedule_of(
        only=stage(1000, learning_rate=1.0, final_learning_rate=final, lr_shape=shape, lr_warmup_tokens=200)
    ).stages[0]
    rates = [only.learning_rate(c) for c in (0, 100, 200, 400, 600, 800, 1000)]
    assert rates == pytest.approx(expected)
    # An overshooting step does not carry the rate past its final value.
    assert only.learning_rate(1063) == pytest.approx(expected[-1])


def test_warmup_of_a_later_stage_starts_where_the_stage_starts():
    schedule = schedule_of(first=stage(1000), second=stage(1000, learning_rate=2e-3, lr_warmup_tokens=100))
    assert [schedule.learning_rate(c) for c in (999, 1000, 1050, 1100)] == pytest.approx([1e-3, 0.0, 1e-3, 2e-3])


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_stage_shorter_than_its_own_batch_is_refused():
    schedule_of(short=stage(64))
    with pytest.raises(ValueError, match=r"stages\.short\.num_tokens \(63\).*64, its own.*lower global_batch_size"):
        schedule_of(long=stage(100), short=stage(63))


def test_two_views_halve_what_a_batch_can_hold():
    config = ScheduleConfig(
        context_length=8,
        row_length=24,
        stages={"pair": stage(48, t_min=0.2, t_max=0.8, num_views=2, view_relation="complementary")},
    )
    # 4 rows x 24 / 2 views.
    assert BlockSchedule.from_config(config).total_tokens == 48


def test_a_stage_that_the_preceding_batch_could_jump_over_is_refused():
    with pytest.raises(ValueError, match=r"stages\.small\.num_tokens \(200\).*256, the preceding stage's"):
        schedule_of(big=stage(1000, global_batch_size=16), small=stage(200))


@pytest.mark.parametrize("warmup", [-1, 1000])
def test_a_warmup_that_does_not_fit_is_refused(warmup):
    with pytest.raises(ValueError, match=r"stages\.only\.lr_warmup_tokens"):
        schedule_of(only=stage(1000, lr_warmup_tokens=warmup))


def test_a_schedule_without_stages_is_refused():
    with pytest.raises(ValueError, match="at least one stage"):
        BlockSchedule.from_config(ScheduleConfig(context_length=8))


def test_a_final_rate_without_effect_is_told():
    (text,) = schedule_of(only=stage(1000, final_learning_rate=1e-5)).warnings()
    assert text.startswith("schedule.stages.only.final_learning_rate (1e-05) has no effect with lr_shape constant")
    assert schedule_of(only=stage(1000, final_learning_rate=1e-3)).warnings() == []
    assert schedule_of(only=stage(1000, lr_shape="linear", final_learning_rate=1e-5)).warnings() == []


def test_the_schedule_cannot_change():
    config = ScheduleConfig(context_length=8, row_length=16, stages={"only": stage(1000)})
    schedule = BlockSchedule.from_config(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.stages[0].end = 5
    config.stages["only"].learning_rate = 9.0
    assert schedule.learning_rate(0) == 1e-3


# --- the table --------------------------------------------------------------------------------------------------


def test_table_by_hand():
    schedule = schedule_of(**WSD)
    # 4 rows x 7.5 = 30 tokens a step in block stages, 4 x 15 = 60 in MDLM.
    estimates = {"warmup": RowEstimate(7.5, 15.0), "stable": RowEstimate(15.0, 15.0), "decay": RowEstimate(7.5, 14.0)}
    rows = stage_table(schedule, estimates)
    # warmup: ceil(1000 / 30) = 34 steps reach 1020; stable: ceil(1980 / 60) = 33 reach 3000; decay: again 34.
    assert [(row.stage.name, row.steps, row.forward_tokens) for row in rows] == [
        ("warmup", 34, 34 * 4 * 15),
        ("stable", 33, 33 * 4 * 15),
        ("decay", 34, 34 * 4 * 14),
    ]


def test_table_without_estimates():
    assert [(row.steps, row.forward_tokens) for row in stage_table(schedule_of(**WSD))] == [(None, None)] * 3


def test_table_as_text():
    ar = stage(1000, objective="ar", learning_rate=1e-5)
    pair = stage(
        1000,
        t_min=0.2,
        t_max=0.8,
        num_views=2,
        view_relation="complementary",
        final_learning_rate=1e-6,
        lr_shape="cosine",
        learning_rate=1e-5,
    )
    config = ScheduleConfig(context_length=8, row_length=24, stages={"start": ar, "tune": pair})
    schedule = BlockSchedule.from_config(config)
    lines = format_table(stage_table(schedule)).splitlines()
    assert [line.split() for line in lines] == [
        [
            "stage",
            "objective",
            "block_size",
            "tokens",
            "start",
            "end",
            "learning_rate",
            "batch",
            "t",
            "steps",
            "forward_tokens",
        ],
        ["start", "ar", "4", "1,000", "0", "1,000", "1e-05", "4", "-", "?", "?"],
        [
            "tune",
            "block_diffusion",
            "4",
            "1,000",
            "1,000",
            "2,000",
            "1e-05",
            "->",
            "1e-06",
            "cosine",
            "4",
            "0.2..0.8",
            "x2",
            "complementary",
            "?",
            "?",
        ],
    ]
    assert len({line.index(cell) for line, cell in zip(lines, ["tokens", "1,000", "1,000"], strict=True)}) == 1


# --- epochs -----------------------------------------------------------------------------------------------------


def test_epochs_and_a_share_of_warmup_become_tokens():
    stages = {
        "text": stage(1000),
        "chats": stage(None, num_epochs=2.5, lr_warmup_share=0.1, final_learning_rate=0.0, lr_shape="linear"),
    }
    config = ScheduleConfig(context_length=8, row_length=16, stages=stages)
    config.validate()
    schedule = BlockSchedule.from_config(config, {"chats": 800})
    chats = schedule.stages[1]
    assert (chats.start, chats.end, chats.config.num_tokens, chats.config.lr_warmup_tokens) == (1000, 3000, 2000, 200)
    assert schedule.learning_rate(1100) == pytest.approx(5e-4) and schedule.learning_rate(1200) == 1e-3
    assert schedule.learning_rate(2100) == pytest.approx(5e-4)
    lines = format_table(stage_table(schedule)).splitlines()
    assert "1,000  " in lines[1] and "2,000 = 2.5 epochs" in lines[2] and "epochs" not in lines[1]


def test_clean_blocks_and_the_ar_loss_stand_in_the_table():
    guided = stage(1000, block_size=4, clean_block_size=1, ar_weight=0.5)
    plain, line = format_table(stage_table(schedule_of(plain=stage(1000), guided=guided))).splitlines()[1:]
    assert "block_diffusion + ar 0.5" in line and "4, clean 1" in line
    assert "ar" not in plain and "clean" not in plain


def test_ar_rows_hold_as_many_tokens_as_they_are_long():
    pair = {"num_views": 2, "view_relation": "complementary", "t_min": 0.2, "t_max": 0.8, "ar_weight": 0.5}
    assert max_batch_tokens(stage(1000, **pair, ar_row_share=0.25), 16, has_prompts=False) == 64
    assert max_batch_tokens(stage(1000, **pair), 16, has_prompts=False) == 32


def test_a_batch_of_chats_may_be_all_prompts():
    """Of text with two views a batch holds at most 4 x 8 tokens; prompts have no noisy copies."""
    pair = {"num_views": 2, "view_relation": "complementary", "t_min": 0.2, "t_max": 0.8}
    assert max_batch_tokens(stage(1000, **pair), 16, has_prompts=False) == 32
    assert max_batch_tokens(stage(1000, **pair), 16, has_prompts=True) == 64
    for short, prompted in ((stage(40, **pair), ["short"]), (stage(40, sft=SftConfig(), **pair), [])):
        config = ScheduleConfig(context_length=8, row_length=16, stages={"short": short})
        if prompted:
            BlockSchedule.from_config(config)
        with pytest.raises(ValueError, match=r"short\.num_tokens \(40\) must be at least .* \(64, its own\)"):
            BlockSchedule.from_config(config, prompted=prompted)
