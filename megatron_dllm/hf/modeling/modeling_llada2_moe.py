"""LLaDA2 in plain PyTorch: a bidirectional mixture-of-experts transformer that decodes block by block.

Loads with `trust_remote_code=True` under transformers 4.57 and 5.x. Position i predicts token i, where the
input holds the mask token. Shapes: b batch, n tokens of this call, c tokens in the cache, h hidden, d head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_llada2_moe import LLaDA2MoeConfig


class BlockCache:
    """Keys and values of finished blocks, one pair of [b, groups, c, d] per layer."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.is_committing = False

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put what is stored before `key` and `value` [b, groups, n, d]; keep the result while committing."""
        if layer < len(self.keys):
            key = torch.cat([self.keys[layer], key], dim=2)
            value = torch.cat([self.values[layer], value], dim=2)
        if self.is_committing:
            self.keys[layer:layer + 1] = [key]
            self.values[layer:layer + 1] = [value]
        return key, value

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.keys[0].shape[2] if self.keys else 0


class LLaDA2MoeRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden` [..., size]."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class LLaDA2MoeMLP(nn.Module):
    """Gated MLP."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [..., h] to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class LLaDA2MoeGate(nn.Module):
    """Router: sigmoid scores, a bias for choosing only, experts from the best groups only. In fp32."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        else:
            self.expert_bias = None

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move the bias with the model but keep its bits: rounding it would route tokens to other experts."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != torch.float32:
            device = self.expert_bias.device
            self.expert_bias = torch.empty_like(bias, device=device) if bias.is_meta else bias.to(device)
        return self

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for `hidden` [tokens, h]; returns ids [tokens, k] and weights [tokens, k] fp32."""
        config = self.config
        scores = torch.sigmoid(F.linear(hidden.float(), self.weight.float()))
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        if config.n_group > 1:
            grouped = choice.view(-1, config.n_group, config.num_experts // config.n_group)
            group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
            best = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
            is_out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
            choice = grouped.masked_fill(is_out.unsqueeze(-1), float("-inf")).flatten(1)
        expert_ids = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, expert_ids)
        if config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return expert_ids, weights * config.routed_scaling_factor


class LLaDA2MoeSparseMoeBlock(nn.Module):
    """Routed experts and, beside them, a shared one for every token."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.gate = LLaDA2MoeGate(config)
        size = config.moe_intermediate_size
        self.experts = nn.ModuleList(LLaDA2MoeMLP(config.hidden_size, size) for _ in range(config.num_experts))
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = LLaDA2MoeMLP(config.hidden_size, size * config.num_shared_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [b, n, h] to the same shape."""
        tokens = hidden.flatten(0, 1)
        expert_ids, weights = self.gate(tokens)
        # Tokens sorted by expert: each expert runs once, on its own rows.
        order = expert_ids.flatten().argsort(stable=True)
        counts = torch.bincount(expert_ids.flatten(), minlength=len(self.experts)).tolist()
        token_of_row = order // expert_ids.shape[1]
        outputs = [self.experts[expert](rows) for expert, rows in enumerate(tokens[token_of_row].split(counts))
                   if counts[expert]]
        routed = torch.zeros_like(tokens, dtype=torch.float32)
        scaled = torch.cat(outputs).float() * weights.flatten()[order].unsqueeze(1)
        result = routed.index_add_(0, token_of_row, scaled).to(hidden.dtype).view_as(hidden)
        return result if self.shared_experts is None else result + self.shared_experts(hidden)


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys; rotary embedding on part of each head."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.sizes = [heads * size, groups * size, groups * size]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        if config.use_qk_norm:
            self.query_layernorm = LLaDA2MoeRMSNorm(size, config.rms_norm_eps)
            self.key_layernorm = LLaDA2MoeRMSNorm(size, config.rms_norm_eps)
        self.dense = nn.Linear(heads * size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
                cache: BlockCache | None) -> Tensor:
        """Attend from `hidden` [b, n, h] to itself and the cache; `mask` as scaled_dot_product_attention takes it."""
        b, n, _ = hidden.shape
        query, key, value = (part.view(b, n, -1, self.config.head_dim) for part in
                             self.query_key_value(hidden).split(self.sizes, dim=-1))
        if self.config.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        query, key = (rotate(part.transpose(1, 2), *rotary) for part in (query, key))
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(output.transpose(1, 2).reshape(b, n, -1))


def rotary_angles(position_ids: Tensor, config: LLaDA2MoeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [b, 1, n, rotary_dim] for `position_ids` [b, n], computed in fp32."""
    # Not a buffer: its values would be lost where a model is created without memory.
    exponent = torch.arange(0, config.rotary_dim, 2, device=position_ids.device).float() / config.rotary_dim
    angles = position_ids.unsqueeze(-1).float() * config.rope_theta ** -exponent
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply the rotary embedding to the first features of every head, `hidden` [b, heads, n, d]."""
    turned, kept = hidden.split([cosine.shape[-1], hidden.shape[-1] - cosine.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned, kept], dim=-1)


class LLaDA2MoeDecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int) -> None:
        super().__init__()
        is_dense = layer < config.first_k_dense_replace
        self.attention = LLaDA2MoeAttention(config, layer)
        self.mlp = (LLaDA2MoeMLP(config.hidden_size, config.intermediate_size) if is_dense
                    else LLaDA2MoeSparseMoeBlock(config))
        self.input_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
                cache: BlockCache | None) -> Tensor:
        """Map `hidden` [b, n, h] to the same shape."""
        hidden = hidden + self.attention(self.input_layernorm(hidden), mask, rotary, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    """What transformers wants to know."""

    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    _no_split_modules = ("LLaDA2MoeDecoderLayer",)
    _supports_sdpa = True

    def post_init(self) -> None:
        """Tell transformers which values keep their bits."""
        super().post_init()
        # Loading in bf16 leaves these as they are. Not a class attribute: transformers 4 refuses buffers there.
        self._keep_in_fp32_modules_strict = {"expert_bias"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, LLaDA2MoeGate)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, LLaDA2MoeRMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, LLaDA2MoeGate) and module.expert_bias is not None:
            nn.init.zeros_(module.expert_bias)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What transformers asks for."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """What transformers asks for."""
        self.word_embeddings = value

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                past_key_values: BlockCache | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: [b, n] tokens.
            attention_mask: None: every token sees every other; [b, c + n]: 0 marks padding; [b, 1, n, c + n]: bool
                (true: visible) or added to the scores.
            position_ids: [b, n]; None: counted on from the cache.
            inputs_embeds: [b, n, h] instead of tokens.
            past_key_values: finished blocks; extended by this call only while it is committing.
            kwargs: what else transformers passes; without effect.
        """
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(start, start + hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :].bool()
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(hidden.dtype)
        rotary = rotary_angles(position_ids, self.config, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, mask, rotary, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class LLaDA2MoeModelLM(LLaDA2MoePreTrainedModel):
    """The model with its head, and block-diffusion decoding."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012 (transformers' form)

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What transformers asks for."""
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """What transformers asks for."""
        self.model.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """What transformers asks for."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """What transformers asks for."""
        self.lm_head = value

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                past_key_values: BlockCache | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits [b, n, v]; see `LLaDA2MoeModel.forward`. `labels` [b, n] are not shifted; -100 is left out."""
        output = self.model(input_ids, attention_mask, position_ids, inputs_embeds, past_key_values)
        logits = self.lm_head(output.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(),
                                                           ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *, input_ids: Tensor | None = None, block_size: int | None = None,
                 max_new_tokens: int = 256, threshold: float = 0.95, min_tokens_per_step: int = 1,
                 temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 1234,
                 eos_token_id: int | list[int] | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Continue one prompt, block by block.

        The block grid starts at the prompt's first token; the prompt's tail shares the first generated block.
        Each step predicts every masked token of the block and keeps those more probable than `threshold`, at
        least the `min_tokens_per_step` most probable. A finished block is run once more as clean tokens, whose
        keys and values later blocks read. Decoding ends after a block with an eos.

        Args:
            inputs: [1, n] prompt.
            input_ids: another name for it.
            block_size: tokens denoised together; None: what the model was trained for.
            max_new_tokens: at most so many; blocks are denoised whole and cut.
            threshold: of the model's probability (temperature 1, whole vocabulary).
            min_tokens_per_step: kept in every step even below the threshold.
            temperature: 0 takes the most probable token, above it samples within `top_p` and `top_k`.
            top_p: probability mass to sample from.
            top_k: tokens to sample from; 0: all.
            seed: of the sampling.
            eos_token_id: ends the text; None: config.json's.
            attention_mask: must be all ones (one prompt has no padding).

        Returns:
            [1, n + m] prompt and continuation, up to the first eos.
        """
        ids = self._check_prompt(inputs if inputs is not None else input_ids, attention_mask)
        size = block_size or self.config.block_length
        eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
        eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        sampling = (temperature, top_p, top_k, torch.Generator(device=ids.device).manual_seed(seed))
        end_of_context = self.config.max_position_embeddings
        prompt_length = ids.shape[1]
        limit = min(prompt_length + max_new_tokens, end_of_context)
        cache = BlockCache()
        if prompt_length >= size:
            self._commit(ids[:, :prompt_length // size * size], cache, size)
        while True:
            start = ids.shape[1] // size * size
            end = min(start + size, end_of_context)
            known = ids.shape[1] - start
            block = F.pad(ids[:, start:], (0, end - ids.shape[1]), value=self.config.mask_token_id)
            self._denoise(block[0], known, cache, threshold, min_tokens_per_step, sampling)
            ids = torch.cat([ids[:, :start], block], dim=1)
            if ids.shape[1] >= limit or any(token in eos_ids for token in block[0, known:].tolist()):
                break
            self._commit(block, cache, size)
        generated = ids[0, prompt_length:limit].tolist()
        kept = next((place + 1 for place, token in enumerate(generated) if token in eos_ids), len(generated))
        return ids[:, :prompt_length + kept]

    def _check_prompt(self, ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        if ids is None or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
            raise ValueError("inputs must be one prompt [1, n] with n > 0; decode several one after the other.")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask must be all ones: one prompt has no padding; remove the padding.")
        if ids.shape[1] >= self.config.max_position_embeddings:
            raise ValueError(f"inputs ({ids.shape[1]} tokens) must be shorter than max_position_embeddings "
                             f"({self.config.max_position_embeddings}); shorten the prompt.")
        if bool((ids == self.config.mask_token_id).any()):
            raise ValueError(f"inputs hold the mask token ({self.config.mask_token_id}); take it out of the text.")
        return ids

    def _commit(self, ids: Tensor, cache: BlockCache, size: int) -> None:
        """Store keys and values of whole clean blocks `ids` [1, n]; each sees itself and earlier ones."""
        mask = None
        if ids.shape[1] > size:
            block = torch.arange(ids.shape[1], device=ids.device) // size
            mask = (block.unsqueeze(0) <= block.unsqueeze(1))[None, None]
        cache.is_committing = True
        self.model(ids, mask, past_key_values=cache)
        cache.is_committing = False

    def _denoise(self, block: Tensor, known: int, cache: BlockCache, threshold: float, min_tokens: int,
                 sampling: tuple[float, float, int, torch.Generator]) -> None:
        """Fill the masked tokens of `block` [n], those from `known` on, in place."""
        masked = torch.arange(known, len(block), device=block.device)
        while len(masked):
            hidden = self.model(block.unsqueeze(0), past_key_values=cache).last_hidden_state
            tokens, confidence = self._predict(self.lm_head(hidden[0, masked]).float(), *sampling)
            is_kept = confidence > threshold
            if int(is_kept.sum()) < min_tokens:
                is_kept[confidence.argsort(descending=True, stable=True)[:min_tokens]] = True
            block[masked[is_kept]] = tokens[is_kept]
            masked = masked[~is_kept]

    def _predict(self, logits: Tensor, temperature: float, top_p: float, top_k: int,
                 generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A token, never the mask token, for every row of `logits` [m, v], and the model's probability of it."""
        probability = torch.softmax(logits, dim=1)
        logits = logits.clone()
        logits[:, self.config.mask_token_id] = float("-inf")
        if temperature == 0.0:
            tokens = logits.argmax(dim=1)
        else:
            ranked, order = (logits / temperature).sort(dim=1, descending=True, stable=True)
            if top_k:
                ranked[:, top_k:] = float("-inf")
            chances = torch.softmax(ranked, dim=1)
            if top_p < 1.0:
                chances = chances.masked_fill(chances.cumsum(dim=1) - chances >= top_p, 0.0)
            tokens = order.gather(1, torch.multinomial(chances, 1, generator=generator)).squeeze(1)
        return tokens, probability.gather(1, tokens.unsqueeze(1)).squeeze(1)
