"""Rules of the model, of training and of the other sections: what is refused, with name, value, and a remedy."""

from __future__ import annotations

import pytest

from megatron_dllm.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    NoiseConfig,
    OptimizerConfig,
    RotaryScalingConfig,
    RunConfig,
    TrainingConfig,
)
from tests.unit.config.configs import model_config, refusal_of, train_config


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
