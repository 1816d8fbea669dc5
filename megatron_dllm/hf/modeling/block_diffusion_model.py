"""The frame of a block-diffusion transformer: embedding, layers, norm and head, as transformers loads and saves them.

A family fills in its layer and its names. Position i predicts token i, where the input holds the mask token.
Shapes: b batch, n tokens of this call, c tokens in the cache, h hidden, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .block_diffusion_layers import BlockCache, RMSNorm, rotary_angles
from .rotary_scaling import scaling_of


class BlockDiffusionPreTrainedModel(PreTrainedModel):
    """What transformers wants to know."""

    base_model_prefix = "model"
    _supports_sdpa = True

    def post_init(self) -> None:
        """Tell transformers which values keep their bits."""
        super().post_init()
        # Loading in bf16 leaves these as they are. Not a class attribute: transformers 4 refuses buffers there.
        if any(name.endswith("expert_bias") for name, _ in self.named_buffers()):
            self._keep_in_fp32_modules_strict = {"expert_bias"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "expert_bias", None) is not None:
            nn.init.zeros_(module.expert_bias)


class BlockDiffusionModel(BlockDiffusionPreTrainedModel):
    """Embedding, layers and final norm; `embedding_name` and `layer_class` are the family's."""

    embedding_name: str = ""
    layer_class: Any = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        setattr(self, self.embedding_name, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(self.layer_class(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What transformers asks for."""
        return getattr(self, self.embedding_name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """What transformers asks for."""
        setattr(self, self.embedding_name, value)

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
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(start, start + hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :].bool()
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(hidden.dtype)
        rotary = rotary_angles(position_ids, self.config.rotary_dim, self.config.rope_theta,
                               scaling_of(self.config.rope_parameters), hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, mask, rotary, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class BlockDiffusionLM(BlockDiffusionPreTrainedModel):
    """The model with its head; `model_class` is the family's."""

    model_class: Any = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What transformers asks for."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """What transformers asks for."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """What transformers asks for."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """What transformers asks for."""
        self.lm_head = value

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                past_key_values: BlockCache | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits of every token, and the loss of those that `labels` names.

        Args:
            input_ids: [b, n] tokens; this and the next three are those of `BlockDiffusionModel.forward`.
            attention_mask: [b, c + n] or [b, 1, n, c + n].
            position_ids: [b, n].
            inputs_embeds: [b, n, h].
            labels: [b, n] tokens, not shifted; -100 is left out.
            past_key_values: finished blocks.
            kwargs: what else transformers passes; without effect.

        Returns:
            `logits` [b, n, v] and, with labels, `loss`.
        """
        output = self.model(input_ids, attention_mask, position_ids, inputs_embeds, past_key_values)
        logits = self.lm_head(output.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(),
                                                           ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)
