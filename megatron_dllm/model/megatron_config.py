"""From our configuration to megatron-core's TransformerConfig."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dllm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dllm.model.paths import Paths
from megatron_dllm.model.rotary import temperature_options


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, paths: Paths, training: TrainingConfig | None = None
) -> TransformerConfig:
    """megatron-core's configuration of the model on this layout, with these implementations."""
    with warnings.catch_warnings():
        # Meant for TransformerEngine's attention, which is not in use.
        warnings.filterwarnings("ignore", message="(?s).*core_attn is from transformer_engine.*")
        config = TransformerConfig(**_arguments(model, parallel, paths, training or TrainingConfig()))
    for name, value in temperature_options(model.rotary_scaling).items():
        setattr(config, name, value)  # megatron-core looks for them, and has no fields of these names
    return config


def _arguments(model: ModelConfig, parallel: ParallelConfig, paths: Paths, training: TrainingConfig) -> dict[str, Any]:
    is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    dtype = torch.float32 if parallel.precision == "fp32" else torch.bfloat16
    return dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        init_method_std=model.init_method_std,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The rotary angles differ from row to row, which the fused kernel does not take.
        apply_rope_fusion=False,
        bias_dropout_fusion=paths.fusions.name == "compiled",
        # On CPU it is not compiled, but keeps only its input for the backward pass.
        bias_activation_fusion=True,
        persist_layer_norm=paths.norms.name == "te",
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=parallel.precision != "fp32",
        fp8="e4m3" if parallel.precision == "fp8" else None,
        fp8_recipe="blockwise",
        # Losses are summed over targets and divided once, by the global batch's count.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        # With virtual stages one rank may be both the previous and the next of another (two ranks: always). Batched
        # sends would then mix up activations and gradients; one by one they have an order and groups of their own.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # An overlapped send of gloo reads the tensor while it is on its way; of NCCL, in the stream's order.
        deallocate_pipeline_outputs=parallel.pipeline_model_parallel_size > 1
        and (paths.collectives.name == "nccl" or not is_interleaved),
        context_parallel_size=parallel.context_parallel_size,
        # megatron-core's names of the two methods; RoleAttention gets them as its cp_comm_type.
        cp_comm_type={"gather": "all_gather", "ulysses": "a2a"}[parallel.context_parallel_method],
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        # A list also for models whose layers are all alike: checkpoints then name every layer by itself.
        moe_layer_freq=[int(model.is_moe and layer >= model.num_dense_layers) for layer in range(model.num_layers)],
        cuda_graph_scope=[],
        **_moe_arguments(model, parallel, paths, training),
        **_recompute_arguments(parallel.recompute),
    )


def _moe_arguments(
    model: ModelConfig, parallel: ParallelConfig, paths: Paths, training: TrainingConfig
) -> dict[str, Any]:
    if not model.is_moe:
        return {}
    return dict(
        num_moe_experts=model.num_moe_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size or None,
        moe_router_topk=model.moe_router_topk,
        moe_router_num_groups=model.moe_router_num_groups or None,
        moe_router_group_topk=(model.moe_router_group_topk or None) if model.moe_router_num_groups else None,
        moe_router_topk_scaling_factor=model.moe_router_topk_scaling_factor,
        moe_router_score_function=model.moe_router_score_function,
        moe_router_pre_softmax=model.moe_router_pre_softmax,
        moe_router_enable_expert_bias=model.moe_router_enable_expert_bias,
        moe_router_bias_update_rate=training.moe_router_bias_update_rate,
        moe_router_dtype=model.moe_router_dtype,
        moe_router_load_balancing_type="aux_loss" if training.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=training.moe_aux_loss_coeff,
        moe_z_loss_coeff=training.moe_z_loss_coeff or None,
        moe_token_dispatcher_type=paths.dispatcher.name,
        moe_flex_dispatcher_backend=parallel.moe_flex_dispatcher_backend,
        moe_grouped_gemm=paths.experts.name == "te_grouped",
        moe_permute_fusion=paths.experts.name == "te_grouped",
    )


def _recompute_arguments(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return {}
