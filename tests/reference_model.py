"""The Ling-2.0 / LLaDA2 architecture in plain PyTorch, by the semantics of its HF code and with HF's tensor names.

Independent of megatron-core on purpose: no parallelism, an explicit mask, one expert after the other. It is the
expected side of the tests of the model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dllm.config import ModelConfig

Weights = dict[str, Tensor]


def tiny_model(**changes: object) -> ModelConfig:
    """A model of the Ling kind that runs in milliseconds: one dense layer, two with experts."""
    fields = dict(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=96,
        max_position_embeddings=512,
        num_dense_layers=1,
        num_moe_experts=8,
        moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=40,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        mask_token_id=95,
        eos_token_id=94,
        pad_token_id=93,
    )
    model = ModelConfig(**{**fields, **changes})
    model.validate()
    return model


def random_weights(model: ModelConfig, seed: int = 0) -> Weights:
    """Weights large enough that every part of the architecture shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.15, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    h, d, heads, groups = model.hidden_size, model.kv_channels, model.num_attention_heads, model.num_query_groups
    weights = {
        "model.word_embeddings.weight": draw(model.vocab_size, h, std=0.5),
        "model.norm.weight": draw(h, mean=1.0),
    }
    if not model.tie_word_embeddings:
        weights["lm_head.weight"] = draw(model.vocab_size, h)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": draw(h, mean=1.0),
            prefix + "attention.query_key_value.weight": draw((heads + 2 * groups) * d, h),
            prefix + "attention.query_layernorm.weight": draw(d, mean=1.0),
            prefix + "attention.key_layernorm.weight": draw(d, mean=1.0),
            prefix + "attention.dense.weight": draw(h, heads * d),
            prefix + "post_attention_layernorm.weight": draw(h, mean=1.0),
        }
        if not model.is_moe or layer < model.num_dense_layers:
            weights |= _mlp_weights(prefix + "mlp.", h, model.ffn_hidden_size, draw)
            continue
        weights[prefix + "mlp.gate.weight"] = draw(model.num_moe_experts, h, std=0.3)
        weights[prefix + "mlp.gate.expert_bias"] = draw(model.num_moe_experts, std=0.05)
        for expert in range(model.num_moe_experts):
            weights |= _mlp_weights(f"{prefix}mlp.experts.{expert}.", h, model.moe_ffn_hidden_size, draw)
        if model.moe_shared_expert_intermediate_size:
            weights |= _mlp_weights(prefix + "mlp.shared_experts.", h, model.moe_shared_expert_intermediate_size, draw)
    return weights


def _mlp_weights(prefix: str, hidden: int, inner: int, draw: object) -> Weights:
    return {
        prefix + "gate_proj.weight": draw(inner, hidden),
        prefix + "up_proj.weight": draw(inner, hidden),
        prefix + "down_proj.weight": draw(hidden, inner),
    }


def expected_logits(
    model: ModelConfig,
    weights: Weights,
    input_ids: Tensor,
    position_ids: Tensor,
    mask: Tensor,
    embeddings: Tensor | None = None,
) -> Tensor:
    """Logits [b, s, v] under an explicit mask [b, s, s] (true = visible); embeddings [b, s, h] replace input_ids."""
    hidden = F.embedding(input_ids, weights["model.word_embeddings.weight"]) if embeddings is None else embeddings
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        normed = _rms_norm(hidden, weights[prefix + "input_layernorm.weight"], model.layernorm_epsilon)
        hidden = hidden + _attention(model, weights, prefix + "attention.", normed, position_ids, mask)
        normed = _rms_norm(hidden, weights[prefix + "post_attention_layernorm.weight"], model.layernorm_epsilon)
        is_dense = not model.is_moe or layer < model.num_dense_layers
        hidden = hidden + (_mlp if is_dense else _moe)(model, weights, prefix + "mlp.", normed)
    hidden = _rms_norm(hidden, weights["model.norm.weight"], model.layernorm_epsilon)
    return hidden @ weights.get("lm_head.weight", weights["model.word_embeddings.weight"]).t()


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def expected_rotation(states: Tensor, position_ids: Tensor, model: ModelConfig) -> Tensor:
    """HF's rotary embedding of states [b, n, s, d]: the first features turn, the others pass."""
    dim = int(model.kv_channels * model.rotary_percent)
    inverse = 1.0 / (model.rotary_base ** (torch.arange(0, dim, 2).float() / dim))
    temperature = 1.0
    if model.rotary_scaling is not None:
        assert model.rotary_scaling.kind == "yarn", "the reference knows YaRN alone"
        inverse, temperature = _yarn(inverse, model)
    angles = position_ids[:, None, :, None].float() * inverse
    cos, sin = (torch.cat([part, part], -1) * temperature for part in (angles.cos(), angles.sin()))
    turned, passed = states[..., :dim], states[..., dim:]
    half = torch.cat([-turned[..., dim // 2 :], turned[..., : dim // 2]], -1)
    return torch.cat([turned * cos + half * sin, passed], -1)


def _yarn(inverse: Tensor, model: ModelConfig) -> tuple[Tensor, float]:
    """Frequencies by how often a pair turns in the original context (YaRN, section 3.2), and its temperature."""
    scaling = model.rotary_scaling
    length, pairs = scaling.original_max_position_embeddings, torch.arange(len(inverse)).float()

    def pair_that_turns(times: float) -> float:
        return 2 * len(inverse) * math.log(length / (2 * math.pi * times)) / (2 * math.log(model.rotary_base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), 2 * len(inverse) - 1)
    ramp = torch.clamp((pairs - low) / (high - low), 0, 1)
    return inverse * (1 - ramp) + inverse / scaling.factor * ramp, 0.1 * math.log(scaling.factor) + 1


def _attention(
    model: ModelConfig, weights: Weights, prefix: str, hidden: Tensor, position_ids: Tensor, mask: Tensor
) -> Tensor:
    b, s, _ = hidden.shape
    d, heads, groups = model.kv_channels, model.num_attention_heads, model.num_query_groups
    joined = (hidden @ weights[prefix + "query_key_value.weight"].t()).view(b, s, heads + 2 * groups, d).transpose(1, 2)
    query, key, value = joined.split([heads, groups, groups], dim=1)
    query = _rms_norm(query, weights[prefix + "query_layernorm.weight"], model.layernorm_epsilon)
    key = _rms_norm(key, weights[prefix + "key_layernorm.weight"], model.layernorm_epsilon)
    query, key = expected_rotation(query, position_ids, model), expected_rotation(key, position_ids, model)
    key, value = (t.repeat_interleave(heads // groups, dim=1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2) * d**-0.5).masked_fill(~mask[:, None], float("-inf"))
    sees_any = mask.any(-1)[:, None, :, None]
    probabilities = torch.softmax(torch.where(sees_any, scores, 0.0), dim=-1) * sees_any
    return (probabilities @ value).transpose(1, 2).reshape(b, s, heads * d) @ weights[prefix + "dense.weight"].t()


def _mlp(model: ModelConfig, weights: Weights, prefix: str, hidden: Tensor) -> Tensor:
    del model
    gate, up = (hidden @ weights[f"{prefix}{name}_proj.weight"].t() for name in ("gate", "up"))
    return F.silu(gate) * up @ weights[prefix + "down_proj.weight"].t()


def _moe(model: ModelConfig, weights: Weights, prefix: str, hidden: Tensor) -> Tensor:
    tokens = hidden.flatten(0, 1)
    scores = torch.sigmoid(tokens @ weights[prefix + "gate.weight"].t())
    chosen = _choose_experts(model, scores + weights[prefix + "gate.expert_bias"])
    chosen_scores = scores.gather(1, chosen)
    factors = chosen_scores / (chosen_scores.sum(-1, keepdim=True) + 1e-20) * model.moe_router_topk_scaling_factor
    output = torch.zeros_like(tokens)
    for expert in range(model.num_moe_experts):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        part = _mlp(model, weights, f"{prefix}experts.{expert}.", tokens[token])
        output = output.index_add(0, token, part * factors[token, place].unsqueeze(-1))
    if model.moe_shared_expert_intermediate_size:
        output = output + _mlp(model, weights, prefix + "shared_experts.", tokens)
    return output.view_as(hidden)


def _choose_experts(model: ModelConfig, biased: Tensor) -> Tensor:
    """[tokens, k] ids: the best of the best groups, a group being ranked by the sum of its two best experts."""
    groups = model.moe_router_num_groups
    per_group = biased.view(len(biased), groups, -1)
    best_groups = per_group.topk(2, dim=-1).values.sum(-1).topk(model.moe_router_group_topk, dim=-1).indices
    allowed = torch.zeros(len(biased), groups, dtype=torch.bool).scatter_(1, best_groups, True)
    masked = per_group.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
    return masked.topk(model.moe_router_topk, dim=-1).indices


def to_megatron(model: ModelConfig, weights: Weights) -> Weights:
    """The same weights under the names and in the layout of an undivided megatron-core model (state dict)."""
    heads, groups, d = model.num_attention_heads, model.num_query_groups, model.kv_channels
    result = {
        "embedding.word_embeddings.weight": weights["model.word_embeddings.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
    }
    if "lm_head.weight" in weights:
        result["output_layer.weight"] = weights["lm_head.weight"]
    for layer in range(model.num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        joined = weights[source + "attention.query_key_value.weight"].view(heads + 2 * groups, d, -1)
        query, key, value = joined.split([heads, groups, groups])
        # megatron-core keeps a group's queries beside its key and value.
        grouped = torch.cat([query.reshape(groups, heads // groups, d, -1), key.unsqueeze(1), value.unsqueeze(1)], 1)
        result |= {
            target + "self_attention.linear_qkv.weight": grouped.reshape((heads + 2 * groups) * d, -1),
            target + "self_attention.linear_proj.weight": weights[source + "attention.dense.weight"],
            target + "self_attention.q_layernorm.weight": weights[source + "attention.query_layernorm.weight"],
            target + "self_attention.k_layernorm.weight": weights[source + "attention.key_layernorm.weight"],
            target + "input_layernorm.weight": weights[source + "input_layernorm.weight"],
            target + "pre_mlp_layernorm.weight": weights[source + "post_attention_layernorm.weight"],
        }
        if not model.is_moe or layer < model.num_dense_layers:
            result |= _mlp_to_megatron(weights, source + "mlp.", target + "mlp.")
            continue
        result[target + "mlp.router.weight"] = weights[source + "mlp.gate.weight"]
        result[target + "mlp.router.expert_bias"] = weights[source + "mlp.gate.expert_bias"]
        experts = [
            _mlp_to_megatron(weights, f"{source}mlp.experts.{expert}.", "") for expert in range(model.num_moe_experts)
        ]
        for number in (1, 2):
            joined = torch.stack([expert[f"linear_fc{number}.weight"] for expert in experts])
            result[f"{target}mlp.experts.weight{number}"] = joined
        if model.moe_shared_expert_intermediate_size:
            result |= _mlp_to_megatron(weights, source + "mlp.shared_experts.", target + "mlp.shared_experts.")
    return result


def _mlp_to_megatron(weights: Weights, source: str, target: str) -> Weights:
    gate_up = torch.cat([weights[source + "gate_proj.weight"], weights[source + "up_proj.weight"]])
    return {target + "linear_fc1.weight": gate_up, target + "linear_fc2.weight": weights[source + "down_proj.weight"]}
