"""Every rule of the configuration: what is refused, with name, value, and a remedy in the message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import yaml

from megatron_dllm.config import (
    CapConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GenerateConfig,
    LoggingConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SftConfig,
    StageConfig,
    TrainConfig,
    TrainingConfig,
)


def _model(**changes: object) -> ModelConfig:
    """12 layers, 8 heads in 4 groups, 16 experts in 4 groups."""
    fields = dict(
        num_layers=12,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=16,
        vocab_size=192,
        max_position_embeddings=4096,
        num_dense_layers=1,
        num_moe_experts=16,
        moe_ffn_hidden_size=32,
        moe_shared_expert_intermediate_size=32,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        mask_token_id=2,
        eos_token_id=0,
        pad_token_id=1,
    )
    return ModelConfig(**{**fields, **changes})


def _stage(**changes: object) -> StageConfig:
    fields = dict(block_size=32, num_tokens=1000, global_batch_size=16, learning_rate=1e-3)
    return StageConfig(**{**fields, **changes})


def _config(**sections: object) -> TrainConfig:
    fields = dict(
        run=RunConfig(name="run"),
        model=_model(),
        data=DataConfig(train="corpus"),
        schedule=ScheduleConfig(context_length=256, stages={"one": _stage()}),
    )
    return TrainConfig(**{**fields, **sections})


def _layout(**sizes: object) -> ParallelConfig:
    names = dict(
        tp="tensor_model_parallel_size",
        pp="pipeline_model_parallel_size",
        cp="context_parallel_size",
        ep="expert_model_parallel_size",
        vpp="virtual_pipeline_model_parallel_size",
        etp="expert_tensor_parallel_size",
        first="num_layers_in_first_pipeline_stage",
        last="num_layers_in_last_pipeline_stage",
    )
    return ParallelConfig(**{names.get(name, name): size for name, size in sizes.items()})


def _refusal(validate: Callable[[], None]) -> str:
    with pytest.raises(ValueError) as raised:
        validate()
    return str(raised.value)


# ---- layouts -----------------------------------------------------------------------------------

ACCEPTED_LAYOUTS = [
    (1, _layout()),
    (8, _layout(tp=2, sequence_parallel=True, pp=2, cp=2)),
    (2, _layout(tp=2, sequence_parallel=True, etp=2)),
    (2, _layout(tp=2, sequence_parallel=True, ep=2, etp=1)),
    (4, _layout(ep=2, etp=2)),
    (8, _layout(tp=8, sequence_parallel=True)),
    (2, _layout(pp=2, first=5, last=7)),
    (3, _layout(pp=3, first=2, last=2)),
    (2, _layout(pp=2, vpp=3)),
    (2, _layout(pp=2, vpp=2, first=4)),
    (8, _layout(cp=8, context_parallel_method="ulysses")),
    (4, _layout(tp=2, sequence_parallel=True, cp=2, context_parallel_method="ulysses")),
    (16, _layout(ep=16)),
]


@pytest.mark.parametrize(("world_size", "layout"), ACCEPTED_LAYOUTS)
def test_layouts_that_train_are_accepted(world_size: int, layout: ParallelConfig) -> None:
    _config(parallel=layout).validate(world_size)


def test_dense_models_need_no_sequence_parallelism() -> None:
    model = _model(num_moe_experts=0, num_dense_layers=0, moe_shared_expert_intermediate_size=0)
    _config(model=model, parallel=_layout(tp=2)).validate(2)


# World size, layout, changes to the model, and what the message must say: the name with its value, and the remedy.
REFUSED_LAYOUTS = [
    (
        2,
        _layout(tp=2, sequence_parallel=True, etp=1),
        {},
        ("expert_tensor_parallel_size (1)", "train wrongly", "set it to 2 or use expert parallelism"),
    ),
    (2, _layout(etp=2), {}, ("expert_tensor_parallel_size (2)", "train wrongly", "set it to 1")),
    (2, _layout(tp=2), {}, ("sequence_parallel (false)", "mixture of experts", "set it to true")),
    (1, _layout(sequence_parallel=True), {}, ("sequence_parallel (true)", "above 1", "set it to false")),
    (
        3,
        _layout(tp=3),
        dict(num_moe_experts=0),
        ("tensor_model_parallel_size (3)", "num_attention_heads (8)", "tensor_model_parallel_size=1"),
    ),
    (
        4,
        _layout(tp=4, sequence_parallel=True),
        dict(ffn_hidden_size=90),
        ("tensor_model_parallel_size (4)", "ffn_hidden_size (90)", "works: parallel.tensor_model_parallel_size=2"),
    ),
    (
        4,
        _layout(tp=4, sequence_parallel=True),
        dict(vocab_size=190),
        ("tensor_model_parallel_size (4)", "vocab_size (190)", "works: parallel.tensor_model_parallel_size=2"),
    ),
    (
        4,
        _layout(tp=4, sequence_parallel=True),
        dict(moe_shared_expert_intermediate_size=30),
        (
            "tensor_model_parallel_size (4)",
            "moe_shared_expert_intermediate_size (30)",
            "works: parallel.tensor_model_parallel_size=2",
        ),
    ),
    (
        4,
        _layout(tp=4, sequence_parallel=True),
        dict(num_attention_heads=24, num_query_groups=6),
        ("tensor_model_parallel_size (4)", "num_query_groups (6)", "works: parallel.tensor_model_parallel_size=2"),
    ),
    (
        2,
        _layout(tp=2, sequence_parallel=True, etp=2),
        dict(moe_ffn_hidden_size=33),
        ("expert_tensor_parallel_size (2)", "moe_ffn_hidden_size (33)", "expert_tensor_parallel_size=1"),
    ),
    (5, _layout(pp=5), {}, ("pipeline_model_parallel_size (5", "12 of 12", "num_layers_in_first_pipeline_stage=3")),
    (2, _layout(pp=2, vpp=4), {}, ("virtual 4", "12 of 12", "virtual_pipeline_model_parallel_size=3")),
    (2, _layout(pp=2, first=5, last=6), {}, ("(5, 6)", "add up to model.num_layers (12)")),
    (2, _layout(pp=2, first=0), {}, ("num_layers_in_first_pipeline_stage (0)", "positive", "null")),
    (2, _layout(pp=2, vpp=2, last=3), {}, ("num_layers_in_last_pipeline_stage (3)", "virtual stages (2)", "null")),
    (
        2,
        _layout(pp=2, vpp=2, first=4, last=8),
        {},
        ("num_layers_in_last_pipeline_stage (8)", "virtual stages (2)", "null", "takes the rest"),
    ),
    (1, _layout(first=3), {}, ("num_layers_in_first_pipeline_stage (3)", "above 1", "null")),
    (1, _layout(vpp=2), {}, ("virtual_pipeline_model_parallel_size (2)", "above 1", "null")),
    (2, _layout(pp=2, vpp=1), {}, ("virtual_pipeline_model_parallel_size (1)", "above 1", "null")),
    (3, _layout(ep=3), {}, ("expert_model_parallel_size (3)", "num_moe_experts (16)", "expert_model_parallel_size=1")),
    (2, _layout(ep=2), dict(num_moe_experts=0), ("expert_model_parallel_size (2)", "experts", "set it to 1")),
    (2, _layout(ep=4), {}, ("expert x expert-tensor x pipeline (4 x 1 x 1 = 4)", "ranks (2)", "multiple of 4")),
    (2, _layout(ep=2, etp=0), {}, ("expert_tensor_parallel_size (0)", "positive")),
    (6, _layout(cp=4), {}, ("(1 x 1 x 4 = 4)", "ranks (6)", "multiple of 4")),
    (1, _layout(tp=0), {}, ("tensor_model_parallel_size (0)", "positive")),
    (
        16,
        _layout(cp=16, context_parallel_method="ulysses"),
        {},
        ("context_parallel_size (16)", "8 attention heads", "or gather", "context_parallel_size=8"),
    ),
    (1, _layout(context_parallel_method="ring"), {}, ("context_parallel_method (ring)", "gather, ulysses")),
    (1, _layout(moe_token_dispatcher="flex"), {}, ("moe_token_dispatcher (flex)", "alltoall")),
    (1, _layout(precision="fp8"), {}, ("precision (fp8)", "fp32, bf16")),
    (1, _layout(recompute="some"), {}, ("recompute (some)", "none, selective, full")),
]


@pytest.mark.parametrize(("world_size", "layout", "model", "parts"), REFUSED_LAYOUTS)
def test_layouts_that_do_not_train_are_refused(
    world_size: int, layout: ParallelConfig, model: dict[str, object], parts: tuple[str, ...]
) -> None:
    message = _refusal(lambda: _config(model=_model(**model), parallel=layout).validate(world_size))
    for part in parts:
        assert part in message
    if "is not known" not in message:  # a choice by name: the message lists them
        _config(model=_model(**model), parallel=_suggested(message, layout)).validate(world_size)


def _suggested(message: str, layout: ParallelConfig) -> ParallelConfig:
    """The layout with what a message says to change."""
    words = message.split(" ranks this works: ")[1].split()
    changes = dict(word.removeprefix("parallel.").split("=") for word in words)
    return replace(layout, **{name: yaml.safe_load(value) for name, value in changes.items()})


def test_a_suggested_layout_suits_every_stage_that_shares_it() -> None:
    stages = {"one": _stage(global_batch_size=8), "two": _stage(global_batch_size=4), "own": _stage(parallel=_layout())}
    config = _config(
        model=_model(ffn_hidden_size=90),
        parallel=_layout(tp=4, sequence_parallel=True),
        schedule=ScheduleConfig(context_length=256, stages=stages),
    )
    message = _refusal(lambda: config.validate(8))
    assert message.endswith("On 8 ranks this works: parallel.tensor_model_parallel_size=2"), message
    assert "On 13 ranks no layout works" in _refusal(lambda: config.validate(13))


def test_row_must_divide_among_tensor_and_context_ranks() -> None:
    schedule = ScheduleConfig(context_length=256, row_length=516, stages={"one": _stage()})
    layout = _layout(tp=2, sequence_parallel=True, cp=4)
    message = _refusal(lambda: _config(schedule=schedule, parallel=layout).validate(8))
    assert "row_length (516)" in message and "(8)" in message and "use 520" in message
    assert message.endswith("On 8 ranks this works: parallel.context_parallel_size=2")


@pytest.mark.parametrize(
    ("layout", "world_size", "stage", "parts"),
    [
        (_layout(), 3, _stage(), ("global_batch_size (16)", "3 x 1 = 3", "use 15 or 18")),
        (_layout(), 2, _stage(micro_batch_size=3), ("micro_batch_size (3)", "global_batch_size (16)")),
        (_layout(pp=2, vpp=2), 2, _stage(global_batch_size=3), ("global_batch_size (3)", "gives 3", "use 2 or 4")),
    ],
)
def test_batches_must_divide_among_ranks(
    layout: ParallelConfig, world_size: int, stage: StageConfig, parts: tuple[str, ...]
) -> None:
    schedule = ScheduleConfig(context_length=256, stages={"one": stage})
    message = _refusal(lambda: _config(schedule=schedule, parallel=layout).validate(world_size))
    for part in parts:
        assert part in message


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
        (dict(max_position_embeddings=128), ("context_length (256)", "max_position_embeddings (128)")),
    ],
)
def test_models_that_contradict_themselves_are_refused(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    message = _refusal(lambda: _config(model=_model(**changes)).validate(1))
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
    message = _refusal(lambda: _config(training=TrainingConfig(**changes)).validate(1))
    for part in parts:
        assert part in message


# ---- the schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(objective="gan"), ("stages.one.objective (gan)", "ar, block_diffusion")),
        (dict(lr_shape="step"), ("stages.one.lr_shape (step)", "cosine")),
        (dict(num_tokens=0), ("stages.one.num_tokens (0)", "positive")),
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
        (dict(shift=True), ("one.shift (true)", "block_diffusion", "leave it null")),
        (dict(objective="ar", shift=False), ("one.shift (false)", "predicts token i + 1")),
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
    schedule = ScheduleConfig(context_length=256, row_length=1024, stages={"one": _stage(**changes)})
    message = _refusal(lambda: _config(schedule=schedule).validate(1))
    for part in parts:
        assert part in message


def test_all_stages_or_none_give_their_ranks() -> None:
    halves = _layout(tp=2, sequence_parallel=True)
    stages = {"warmup": _stage(), "stable": _stage(parallel=halves, world_size=2), "decay": _stage()}
    config = _config(
        parallel=_layout(tp=4, sequence_parallel=True), schedule=ScheduleConfig(context_length=256, stages=stages)
    )
    message = _refusal(lambda: config.validate(8))
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
            ScheduleConfig(context_length=256, row_length=400, stages={"one": _stage()}),
            ("row_length (400)", "take 480 tokens", "raise row_length"),
        ),
        (
            ScheduleConfig(context_length=256, row_length=1200, stages={"one": _stage(num_views=4)}),
            ("row_length (1200)", "4 view(s)", f"take {4 * 256 + 256 - 32} tokens"),
        ),
    ],
)
def test_schedules_that_cannot_run_are_refused(schedule: ScheduleConfig, parts: tuple[str, ...]) -> None:
    message = _refusal(lambda: _config(schedule=schedule).validate(1))
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
        (dict(optimizer=OptimizerConfig(on_non_finite="pray")), ("on_non_finite (pray)", "stop, skip")),
        (dict(optimizer=OptimizerConfig(clip_grad=-1.0)), ("optimizer.clip_grad (-1.0)", "0 turns it off")),
        (dict(optimizer=OptimizerConfig(weight_decay=-0.1)), ("optimizer.weight_decay (-0.1)", "0 turns it off")),
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
        (dict(evaluation=EvaluationConfig(block_sizes=[])), ("evaluation.block_sizes ([])", "target block size")),
        (dict(logging=LoggingConfig(interval_steps=0)), ("logging.interval_steps (0)", "positive")),
        (dict(logging=LoggingConfig(wandb_mode="on")), ("logging.wandb_mode (on)", "offline")),
    ],
)
def test_other_sections_are_checked(sections: dict[str, object], parts: tuple[str, ...]) -> None:
    message = _refusal(lambda: _config(**sections).validate(1))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(checkpoint=""), ("checkpoint (not given)", "name an HF or a run folder")),
        (dict(prompt=None), ("none is given", "exactly one of the four")),
        (dict(prompt=""), ("prompt ('')", "at least one token")),
        (dict(prompts_file="x"), ("(prompt, prompts_file)", "exactly one of the four")),
        (dict(threshold=0.0), ("threshold (0.0)", "(0, 1]")),
        (dict(max_new_tokens=0), ("max_new_tokens (0)", "positive")),
        (dict(temperature=-1.0), ("temperature (-1.0)", "0 takes the most probable")),
        (dict(top_p=0.0), ("top_p (0.0)", "(0, 1]")),
        (dict(top_k=-1), ("top_k (-1)", "0 keeps")),
        (dict(seed=-1), ("seed (-1)", "[0, 2^63)")),
        (dict(block_size=0), ("block_size (0)", "null takes the checkpoint's")),
        (dict(precision="fp8"), ("precision (fp8)", "fp32, bf16")),
        (dict(attention_backend="magic"), ("attention_backend (magic)", "dense")),
    ],
)
def test_generation_is_checked(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    right = GenerateConfig(checkpoint="runs/x", prompt="hello")
    right.validate()
    message = _refusal(replace(right, **changes).validate)
    for part in parts:
        assert part in message


def test_tokens_per_row_defaults_to_two_contexts() -> None:
    assert ScheduleConfig(context_length=256).tokens_per_row == 512
    assert ScheduleConfig(context_length=256, row_length=300).tokens_per_row == 300


def test_sizes_of_a_layout() -> None:
    layout = _layout(tp=2, pp=2, cp=2)
    assert layout.model_parallel_size == 8
    assert layout.data_parallel_size(32) == 4


def test_chats_need_the_block_grid_of_documents() -> None:
    schedule = ScheduleConfig(context_length=256, row_length=1024, stages={"one": _stage(sft=SftConfig())})
    _config(schedule=schedule).validate(1)
    message = _refusal(lambda: _config(schedule=schedule, data=DataConfig(train="x", block_origin="row")).validate(1))
    assert "data.block_origin (row) must be document for schedule.stages.one.sft" in message
