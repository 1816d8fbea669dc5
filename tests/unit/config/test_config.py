"""Every rule of the configuration: what is refused, with name, value, and a remedy in the message."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config import (
    AlignmentConfig,
    AttentionAnnealConfig,
    CapConfig,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    LoggingConfig,
    NoiseConfig,
    OptimizerConfig,
    PreferenceConfig,
    ReferenceConfig,
    RotaryScalingConfig,
    RunConfig,
    ScheduleConfig,
    SftConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from tests.unit.config.configs import layout_config, model_config, refusal_of, stage_config, train_config


def stretched(**changes: object) -> RotaryScalingConfig:
    return RotaryScalingConfig(**{"factor": 2.0, "original_max_position_embeddings": 256, **changes})


# ---- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(family="gpt2"), ("model.family (gpt2)", "bailing_moe")),
        (dict(hidden_size=0), ("model.hidden_size (0)", "positive")),
        (dict(num_query_groups=3), ("model.num_query_groups (3)", "num_attention_heads (8)")),
        (dict(rotary_percent=0.0), ("model.rotary_percent (0.0)", "partial_rotary_factor")),
        (dict(mask_token_id=192), ("model.mask_token_id (192)", "[0, 192)", "tokenizer")),
        (dict(mask_token_id=0), ("model.mask_token_id (0)", "token of its own")),
        (dict(moe_router_dtype="bf16"), ("model.moe_router_dtype (bf16)", "fp32, fp64")),
        (dict(layernorm_epsilon=0.0), ("model.layernorm_epsilon (0.0)", "between 0 and 0.1")),
        (dict(rotary_base=float("inf")), ("model.rotary_base (inf)", "finite number")),
        (dict(init_method_std=-0.1), ("model.init_method_std (-0.1)", "at least 0")),
        (dict(num_layers=10**9), ("model.num_layers (1000000000)", "1024")),
        (dict(num_moe_experts=-1), ("model.num_moe_experts (-1)", "negative")),
        (dict(moe_router_score_function="tanh"), ("moe_router_score_function (tanh)", "sigmoid, softmax")),
        (dict(num_dense_layers=12), ("model.num_dense_layers (12)", "set num_moe_experts to 0")),
        (dict(moe_ffn_hidden_size=0), ("model.moe_ffn_hidden_size (0)", "positive")),
        (dict(moe_router_topk=17), ("model.moe_router_topk (17)", "[1, 16]")),
        (dict(moe_router_num_groups=5), ("model.moe_router_num_groups (5)", "num_moe_experts (16)")),
        (dict(moe_router_group_topk=5), ("model.moe_router_group_topk (5)", "[1, 4]")),
        (dict(moe_router_topk=8), ("model.moe_router_topk (8)", "twice moe_router_group_topk (2)", "only this ratio")),
        (
            dict(max_position_embeddings=128),
            ("context_length (256)", "max_position_embeddings (128)", "model.rotary_scaling"),
        ),
        (
            dict(rotary_scaling=RotaryScalingConfig(factor=2.0)),
            ("model.rotary_scaling.original_max_position_embeddings (0)", "[8, 4096]", "before it is stretched"),
        ),
        (dict(rotary_scaling=stretched(kind="linear")), ("rotary_scaling.kind (linear)", "yarn, ntk, llama3")),
        (dict(rotary_scaling=stretched(factor=0.5)), ("rotary_scaling.factor (0.5)", "[1, 10000]")),
        (dict(rotary_scaling=stretched(original_max_position_embeddings=8192)), ("(8192)", "[8, 4096]")),
        (dict(rotary_scaling=stretched(beta_slow=40.0)), ("rotary_scaling.beta_slow (40)", "below beta_fast (32)")),
        (dict(rotary_scaling=stretched(factor=1.0, attention_factor=1.2)), ("attention_factor (1.2)", "above 1")),
        (dict(rotary_scaling=stretched(attention_factor=-1.0)), ("attention_factor (-1.0)", "positive")),
        (
            dict(rotary_scaling=stretched(kind="llama3", low_freq_factor=5.0)),
            ("low_freq_factor (5)", "high_freq_factor"),
        ),
        (dict(rotary_scaling=stretched(kind="ntk", distance_ahead=300)), ("distance_ahead (300)", "[0, 256]")),
        (
            dict(rotary_scaling=stretched(distance_ahead=32)),
            ("rotary_scaling.distance_ahead (32)", "no effect with kind yarn", "rotary_scaling.kind to ntk"),
        ),
        (dict(rotary_scaling=stretched(kind="ntk", beta_fast=16.0)), ("beta_fast (16.0)", "with kind ntk", "yarn.")),
        (dict(rotary_scaling=stretched(kind="llama3", attention_factor=1.1)), ("attention_factor (1.1)", "llama3;")),
        (dict(rotary_scaling=stretched(high_freq_factor=8.0)), ("high_freq_factor (8.0)", "kind yarn", "to llama3.")),
    ],
)
def test_models_that_contradict_themselves_are_refused(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    message = refusal_of(lambda: train_config(model=model_config(**changes)).validate(1))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(attention_backend="magic"), ("training.attention_backend (magic)", "dense")),
        (dict(mask_embedding_noise=-0.1), ("training.mask_embedding_noise (-0.1)", "0 turns it off")),
        (dict(moe_aux_loss_coeff=-1.0), ("training.moe_aux_loss_coeff (-1.0)", "0 turns it off")),
        (dict(moe_z_loss_coeff=float("inf")), ("training.moe_z_loss_coeff (inf)", "finite number")),
        (
            dict(mask_embedding_noise=0.5),
            ("training.mask_embedding_noise_steps (0)", "mask_embedding_noise (0.5)", "give"),
        ),
    ],
)
def test_training_that_cannot_be_is_refused(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    message = refusal_of(lambda: train_config(training=TrainingConfig(**changes)).validate(1))
    for part in parts:
        assert part in message


# ---- the schedule ------------------------------------------------------------------------------


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


# ---- the rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        (dict(run=RunConfig(name="../x")), ("run.name ('../x')", "names a folder")),
        (dict(run=RunConfig(name="x", seed=-1)), ("run.seed (-1)", "[0, 2^63)")),
        (dict(run=RunConfig(name="x", distributed_backend="mpi")), ("distributed_backend (mpi)", "gloo")),
        (
            dict(run=RunConfig(name="x", distributed_timeout_minutes=0.0)),
            ("distributed_timeout_minutes (0.0)", "positive"),
        ),
        (dict(data=DataConfig(train="x", block_origin="page")), ("data.block_origin (page)", "document, row")),
        (dict(data=DataConfig(train="x", packing_chunk=0)), ("data.packing_chunk (0)", "positive")),
        (dict(data=DataConfig(train="x", num_workers=-1)), ("data.num_workers (-1)", "0 builds rows")),
        (dict(noise=NoiseConfig(t_unit="token")), ("noise.t_unit (token)", "block, document, row")),
        (dict(optimizer=OptimizerConfig(adam_beta2=1.0)), ("optimizer.adam_beta2 (1.0)", "[0, 1)")),
        (dict(optimizer=OptimizerConfig(adam_eps=0.0)), ("optimizer.adam_eps (0.0)", "positive")),
        (dict(optimizer=OptimizerConfig(offload="disk")), ("optimizer.offload (disk)", "none, cpu")),
        (dict(optimizer=OptimizerConfig(offload_adam="apex")), ("offload_adam (apex)", "torch, deepspeed")),
        (dict(optimizer=OptimizerConfig(moments="fp8")), ("optimizer.moments (fp8)", "fp32, bf16")),
        (
            dict(optimizer=OptimizerConfig(moments="bf16", offload="cpu")),
            ("optimizer.moments (bf16)", "offload cpu", "set one of the two back"),
        ),
        (dict(optimizer=OptimizerConfig(offload_fraction=0.0)), ("offload_fraction (0.0)", "(0, 1]")),
        (dict(optimizer=OptimizerConfig(gradients="fp16")), ("optimizer.gradients (fp16)", "fp32, bf16")),
        (dict(optimizer=OptimizerConfig(gradients="bf16", offload="cpu")), ("gradients (bf16)", "offload cpu")),
        (dict(optimizer=OptimizerConfig(gradients="bf16")), ("gradients (bf16)", "use parallel.precision=bf16")),
        (dict(optimizer=OptimizerConfig(on_non_finite="pray")), ("on_non_finite (pray)", "stop, skip")),
        (dict(optimizer=OptimizerConfig(clip_grad=-1.0)), ("optimizer.clip_grad (-1.0)", "0 turns it off")),
        (dict(optimizer=OptimizerConfig(weight_decay=-0.1)), ("optimizer.weight_decay (-0.1)", "0 turns it off")),
        (
            dict(optimizer=OptimizerConfig(lr_multipliers={"*.router.*": -1.0})),
            ("optimizer.lr_multipliers (*.router.*: -1)", "0 leaves weights"),
        ),
        (dict(optimizer=OptimizerConfig(spike_factor=-2.0)), ("optimizer.spike_factor (-2.0)", "0 turns it off")),
        (
            dict(optimizer=OptimizerConfig(overlap_param_gather=True)),
            ("overlap_param_gather (true)", "overlap_grad_reduce", "set both to true"),
        ),
        (dict(checkpoint=CheckpointConfig(keep_last=0)), ("checkpoint.keep_last (0)", "at least 1")),
        (dict(checkpoint=CheckpointConfig(keep_best=-1)), ("checkpoint.keep_best (-1)", "0 turns it off")),
        (dict(checkpoint=CheckpointConfig(timeout_minutes=0.0)), ("checkpoint.timeout_minutes (0.0)", "positive")),
        (dict(evaluation=EvaluationConfig(block_sizes=[48])), ("evaluation.block_sizes (48)", "use 32 or 64")),
        (dict(evaluation=EvaluationConfig(num_tokens=-1)), ("evaluation.num_tokens (-1)", "0 turns validation off")),
        (dict(evaluation=EvaluationConfig(micro_batch_size=0)), ("evaluation.micro_batch_size (0)", "positive")),
        (
            dict(evaluation=EvaluationConfig(block_sizes=[32, 8], clean_block_size=16)),
            ("evaluation.clean_block_size (16)", "block_sizes (8)"),
        ),
        (dict(evaluation=EvaluationConfig(block_sizes=[])), ("evaluation.block_sizes ([])", "target block size")),
        (dict(logging=LoggingConfig(interval_steps=0)), ("logging.interval_steps (0)", "positive")),
        (dict(logging=LoggingConfig(wandb_mode="on")), ("logging.wandb_mode (on)", "offline")),
    ],
)
def test_other_sections_are_checked(sections: dict[str, object], parts: tuple[str, ...]) -> None:
    message = refusal_of(lambda: train_config(**sections).validate(1))
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
