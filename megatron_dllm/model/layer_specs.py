"""megatron-core's specs of the decoder layers, with our attention, norms, experts and last layer in their places."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.distributed import ProcessGroup

from megatron_dllm.model.alignment import AlignedLayer
from megatron_dllm.model.attention.core import RoleAttention
from megatron_dllm.model.experts import BatchedExperts
from megatron_dllm.model.heads_norm import HeadsNorm
from megatron_dllm.model.last_layer import LastLayer
from megatron_dllm.model.norm import RMSNorm
from megatron_dllm.model.paths import Paths

# The local spec writes the norm before every MLP under the name of TransformerEngine's fused layer, also where the
# MLP is a mixture of experts. Said for both specs, it makes their checkpoints interchangeable.
_CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def _layer_spec(
    config: TransformerConfig, paths: Paths, is_moe: bool, skips_outputs: bool, spanning: ProcessGroup | None
) -> ModuleSpec:
    arguments = dict(
        num_experts=config.num_moe_experts if is_moe else None,
        qk_layernorm=config.qk_layernorm,
        moe_grouped_gemm=is_moe and config.moe_grouped_gemm,
    )
    if paths.uses_transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(**arguments)
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", **arguments)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
            spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
        if is_moe and paths.experts.name != "sequential":
            experts = spec.submodules.mlp.submodules.experts
            experts.module, experts.params = BatchedExperts, {"is_grouped": paths.experts.name == "grouped"}
    if spanning is not None:
        norms = spec.submodules.self_attention.submodules
        norms.q_layernorm = _spanning_norm(config.num_attention_heads, spanning)
        norms.k_layernorm = _spanning_norm(config.num_query_groups, spanning)
    spec.module = LastLayer if skips_outputs else AlignedLayer
    spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.arbitrary}
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=RoleAttention, params={"selects_rows": skips_outputs}
    )
    spec.submodules.sharded_state_dict_keys_map = dict(_CHECKPOINT_NAMES)
    return spec


def _spanning_norm(num_heads: int, tensor_group: ProcessGroup) -> ModuleSpec:
    return ModuleSpec(module=HeadsNorm, params={"num_heads": num_heads, "tensor_group": tensor_group})


def block_spec(
    config: TransformerConfig,
    paths: Paths,
    vp_stage: int | None,
    skips_outputs: bool = False,
    spanning: ProcessGroup | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage holds, and of the final norm.

    Args:
        config: of the model.
        paths: the implementations.
        vp_stage: virtual pipeline stage, with interleaved pipelines.
        skips_outputs: the last layer computes only the tokens whose output is read.
        spanning: tensor ranks that share the heads which one norm of queries, and one of keys, spans; None: each head
            has a norm of its own, or none.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    number = get_num_layers_to_build(config, vp_stage=vp_stage)
    specs = [
        _layer_spec(
            config,
            paths,
            bool(config.moe_layer_freq[layer]),
            skips_outputs and layer == config.num_layers - 1,
            spanning,
        )
        for layer in range(first, first + number)
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_final_norm(paths))


def _final_norm(paths: Paths) -> type:
    if not paths.uses_transformer_engine:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm  # importable only where it is installed

    return TENorm
