"""Rules of the stages and of what is constant through them: what is refused, and what may stand together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config import (
    AlignmentConfig,
    AttentionAnnealConfig,
    CapConfig,
    DataConfig,
    DistillConfig,
    ScheduleConfig,
    SftConfig,
    TrainingConfig,
)
from tests.unit.config.configs import layout_config, refusal_of, stage_config, train_config


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(objective="gan"), ("stages.one.objective (gan)", "ar, block_diffusion")),
        (dict(lr_shape="step"), ("stages.one.lr_shape (step)", "cosine")),
        (dict(num_tokens=0), ("stages.one.num_tokens (0)", "positive")),
        (dict(clean_block_size=24), ("stages.one.clean_block_size (24)", "block_size (32)", "use 16 or 32")),
        (dict(clean_block_size=0), ("stages.one.clean_block_size (0)", "positive")),
        (dict(objective="ar", block_size=4, clean_block_size=2), ("clean_block_size (2)", "null with objective ar")),
        (dict(ar_weight=0.5), ("stages.one.ar_weight (0.5)", "blocks of 32", "set clean_block_size=1")),
        (dict(ar_weight=0.5, block_size=256, clean_block_size=1), ("block_size (256) equal to context_length",)),
        (dict(ar_weight=0.5, objective="ar", block_size=1), ("ar_weight (0.5)", "AR loss already")),
        (dict(ar_weight=-1.0), ("ar_weight (-1.0)", "not negative")),
        (dict(ar_share=0.5), ("ar_share (0.5)", "no effect without ar_weight")),
        (dict(ar_weight=0.5, clean_block_size=1, ar_share=1.5), ("ar_share (1.5)", "[0, 1]")),
        (dict(ar_weight=0.5, clean_block_size=1, ar_share=0.0), ("ar_share (0)", "give ar_row_share")),
        (dict(ar_weight=0.5, ar_row_share=0.5, ar_share=0.5), ("ar_share (0.5)", "clean blocks of 32")),
        (
            dict(block_size=4, t_min=0.3, t_max=0.45, resample_masks=True),
            ("t_min, t_max (0.3, 0.45)", "block of 4", "widen them"),
        ),
        (dict(resample_masks=True, order_bias=1.0), ("resample_masks (true)", "order_bias (1.0)", "leave one out")),
        (dict(resample_masks=True, objective="ar", block_size=1), ("resample_masks (true)", "masks nothing")),
        (dict(ar_row_share=0.5), ("ar_row_share (0.5)", "no effect without ar_weight")),
        (dict(ar_weight=0.5, ar_row_share=1.0), ("ar_row_share (1.0)", "take objective ar")),
        (dict(ar_weight=0.5, ar_row_share=0.5, num_tokens=None, num_epochs=1.0), ("num_epochs (1.0)", "null")),
        (dict(ar_weight=0.5, clean_block_size=1, cap=CapConfig(0.1)), ("ar_weight (0.5)", "cap.coefficient")),
        (dict(ar_weight=0.5, clean_block_size=1, sft=SftConfig(loss_per="answer")), ("sft.loss_per (answer)",)),
        (dict(ar_weight=0.5, clean_block_size=1, sft=SftConfig(turn_boundary="last")), ("turn_boundary (last)",)),
        (dict(block_size=48), ("stages.one.block_size (48)", "context_length (256)", "use 32 or 64")),
        (dict(micro_batch_size=3), ("stages.one.micro_batch_size (3)", "global_batch_size (16)")),
        (dict(t_min=0.5, t_max=0.4), ("t_min, t_max (0.5, 0.4)", "0 <= t_min < t_max <= 1")),
        (dict(objective="ar", num_views=2), ("one.num_views (2)", "masks nothing")),
        (dict(num_views=0), ("one.num_views (0)", "positive")),
        (dict(num_views=3, view_relation="complementary"), ("one.num_views (3)", "must be even", "use 4")),
        (dict(view_relation="paired"), ("one.view_relation (paired)", "independent, stratified, complementary")),
        (dict(loss_weight="none"), ("one.loss_weight (none)", "elbo")),
        (dict(cap=CapConfig(coefficient=-1.0)), ("one.cap.coefficient (-1.0)", "not be negative", "0 turns")),
        (dict(cap=CapConfig(temperature=0.0)), ("one.cap.temperature (0.0)", "positive", "1 is")),
        (dict(cap=CapConfig(normalise="correct")), ("one.cap.normalise (correct)", "masked", "divide the coefficient")),
        (dict(objective="ar", cap=CapConfig(2.0)), ("one.cap.coefficient (2)", "block_diffusion", "set it to 0")),
        (dict(alignment=AlignmentConfig(source="self")), ("one.alignment.source (self)", "clean, teacher")),
        (dict(alignment=AlignmentConfig(1.0, "teacher")), ("teacher.checkpoint (null)", "name an autoregressive")),
        (dict(distill=DistillConfig(weight=-1.0)), ("one.distill.weight (-1.0)", "not be negative", "0 turns")),
        (dict(distill=DistillConfig(source="self")), ("one.distill.source (self)", "clean, teacher")),
        (dict(distill=DistillConfig(top_k=0)), ("one.distill.top_k (0)", "positive", "null")),
        (dict(objective="ar", distill=DistillConfig(1.0)), ("one.distill.weight (1)", "is ar", "set it to 0")),
        (
            dict(block_size=32, distill=DistillConfig(1.0)),
            ("one.distill.weight (1)", "one.clean_block_size 1", "(32)", "source teacher"),
        ),
        (
            dict(distill=DistillConfig(1.0, "teacher"), cap=CapConfig(2.0)),
            ("one.distill.weight (1)", "one.cap.coefficient 0 (2)", "one after the other"),
        ),
        (
            dict(distill=DistillConfig(1.0, "teacher")),
            ("teacher.checkpoint (null)", "schedule.stages.one, whose alignment or distill", "source clean"),
        ),
        (dict(alignment=AlignmentConfig(weight=-1.0)), ("one.alignment.weight (-1.0)", "not be negative", "0 turns")),
        (dict(alignment=AlignmentConfig(masked_layers=0.0)), ("one.alignment.masked_layers (0.0)", "masked to false")),
        (
            dict(objective="ar", alignment=AlignmentConfig(1.0)),
            ("one.alignment.weight (1)", "block_diffusion", "set it to 0"),
        ),
        (
            dict(block_size=256, alignment=AlignmentConfig(1.0)),
            ("one.alignment.weight (1)", "clean copies", "source teacher"),
        ),
        (
            dict(alignment=AlignmentConfig(1.0, visible=False, masked=False)),
            ("one.alignment.weight (1)", "no tokens to align", "set one of them to true"),
        ),
        (
            dict(sft=SftConfig(loss_per="answer"), alignment=AlignmentConfig(1.0)),
            ("one.alignment.weight (1)", "a loss of tokens", "set it to 0"),
        ),
        (dict(objective="ar", shift=False), ("one.shift (false)", "predicts token i + 1")),
        (dict(attention_anneal=AttentionAnnealConfig(5)), ("one.attention_anneal", "block_size 256", "set it to null")),
        (
            dict(objective="ar", block_size=256, attention_anneal=AttentionAnnealConfig(5)),
            ("one.attention_anneal", "not ar with 256", "set it to null"),
        ),
        (
            dict(block_size=256, attention_anneal=AttentionAnnealConfig(0)),
            ("one.attention_anneal.steps (0)", "positive"),
        ),
        (
            dict(block_size=256, attention_anneal=AttentionAnnealConfig(5, "linear")),
            ("attention_anneal.kind (linear)", "window"),
        ),
        (
            dict(num_views=2, view_relation="complementary", t_min=0.2, t_max=0.7),
            ("t_min, t_max (0.2, 0.7)", "use t_max = 0.8"),
        ),
        (dict(lr_shape="linear"), ("final_learning_rate (null)", "give the last value")),
        (dict(num_tokens=None), ("one.num_tokens (None) and num_epochs (None) must not both be null", "give one")),
        (dict(num_epochs=2.0), ("num_epochs (2.0) must not both be given", "give one of them")),
        (dict(num_tokens=None, num_epochs=-1.0), ("one.num_epochs (-1.0)", "positive")),
        (dict(num_tokens=None, num_epochs=1.0, world_size=1), ("num_epochs (1.0)", "world_size (1)", "num_tokens")),
        (dict(lr_warmup_share=1.0), ("one.lr_warmup_share (1.0)", "[0, 1)")),
        (dict(lr_warmup_share=0.1, lr_warmup_tokens=5), ("lr_warmup_tokens (5)", "lr_warmup_share (0.1)", "to 0")),
        (dict(sft=SftConfig(fill="pad")), ("one.sft.fill (pad)", "eos, none")),
        (dict(sft=SftConfig(fill_weight=0.0)), ("one.sft.fill_weight (0.0)", "positive")),
        (dict(sft=SftConfig(turn_boundary="first")), ("one.sft.turn_boundary (first)", "split_views, mask_later")),
        (dict(sft=SftConfig(loss_per="chat")), ("one.sft.loss_per (chat)", "token, answer")),
        (dict(objective="ar", sft=SftConfig()), ("one.sft needs the block_diffusion objective", "is ar", "null")),
        (
            dict(sft=SftConfig(loss_per="answer"), cap=CapConfig(2.0)),
            ("one.cap.coefficient (2)", "sft.loss_per answer", "use loss_per token"),
        ),
        (dict(lr_shape="linear", final_learning_rate=-1e-4), ("final_learning_rate (-0.0001)", "not be negative")),
    ],
)
def test_stages_that_cannot_run_are_refused(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    schedule = ScheduleConfig(context_length=256, row_length=1024, stages={"one": stage_config(**changes)})
    message = refusal_of(lambda: train_config(schedule=schedule).validate(1))
    for part in parts:
        assert part in message


def test_all_stages_or_none_give_their_ranks() -> None:
    halves = layout_config(tp=2, sequence_parallel=True)
    stages = {"warmup": stage_config(), "stable": stage_config(parallel=halves, world_size=2), "decay": stage_config()}
    config = train_config(
        parallel=layout_config(tp=4, sequence_parallel=True), schedule=ScheduleConfig(context_length=256, stages=stages)
    )
    message = refusal_of(lambda: config.validate(8))
    assert "schedule.stages.warmup.world_size (null)" in message and "stable: 2" in message
    stages |= {name: replace(stages[name], world_size=8) for name in ("warmup", "decay")}
    for world_size in (8, 2):  # every start is checked with each stage's own number
        config.validate(world_size)


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        (ScheduleConfig(context_length=0), ("context_length (0)", "positive")),
        (ScheduleConfig(context_length=256), ("stages ({})", "choose a schedule group")),
        (
            ScheduleConfig(context_length=256, row_length=400, stages={"one": stage_config()}),
            ("row_length (400)", "take 480 tokens", "raise row_length"),
        ),
        (
            ScheduleConfig(context_length=256, row_length=1200, stages={"one": stage_config(num_views=4)}),
            ("row_length (1200)", "4 view(s)", f"take {4 * 256 + 256 - 32} tokens"),
        ),
    ],
)
def test_schedules_that_cannot_run_are_refused(schedule: ScheduleConfig, parts: tuple[str, ...]) -> None:
    message = refusal_of(lambda: train_config(schedule=schedule).validate(1))
    for part in parts:
        assert part in message


def test_tokens_per_row_defaults_to_two_contexts() -> None:
    assert ScheduleConfig(context_length=256).tokens_per_row == 512
    assert ScheduleConfig(context_length=256, row_length=300).tokens_per_row == 300


def test_stages_of_blocks_agree_on_their_shift() -> None:
    stages = {
        "ar": stage_config(objective="ar", block_size=1),
        "one": stage_config(block_size=1, shift=True),
        "two": stage_config(block_size=32, shift=True),
    }
    schedule = ScheduleConfig(context_length=256, stages=stages)
    train_config(schedule=schedule).validate(1)
    stages["three"] = stage_config(block_size=64)
    message = refusal_of(lambda: train_config(schedule=schedule).validate(1))
    assert "stages.two.shift (true)" in message and "stage three (false)" in message


def test_a_mask_opens_in_documents_of_one_block() -> None:
    stage = stage_config(block_size=256, attention_anneal=AttentionAnnealConfig(5))
    schedule = ScheduleConfig(context_length=256, stages={"one": stage})
    train_config(schedule=schedule).validate(1)
    by_row = DataConfig(train="x", block_origin="row")
    message = refusal_of(lambda: train_config(schedule=schedule, data=by_row).validate(1))
    assert "data.block_origin (row)" in message and "attention_anneal" in message
    stage.attention_anneal = AttentionAnnealConfig(5, "random")
    message = refusal_of(lambda: train_config(schedule=schedule).validate(1))
    assert "training.attention_backend (auto) must be one of dense, flex" in message and "kind random" in message
    for backend in ("dense", "flex"):
        train_config(schedule=schedule, training=TrainingConfig(attention_backend=backend)).validate(1)
    stage.ar_weight, stage.ar_row_share = 0.5, 0.25  # whose tokens see no later ones, however far it is open
    train_config(schedule=schedule, training=TrainingConfig(attention_backend="dense")).validate(1)


def test_chats_need_the_block_grid_of_documents() -> None:
    schedule = ScheduleConfig(context_length=256, row_length=1024, stages={"one": stage_config(sft=SftConfig())})
    train_config(schedule=schedule).validate(1)
    message = refusal_of(
        lambda: train_config(schedule=schedule, data=DataConfig(train="x", block_origin="row")).validate(1)
    )
    assert "data.block_origin (row) must be document for schedule.stages.one.sft" in message
