"""The last decoder layer, computed only for the tokens whose output is read.

What a token leaves behind in a layer are its keys and values, which others read in the same layer, and its output,
which the next layer reads. After the last layer only tokens that carry a loss are read. So there the attention of
all other tokens, their MLP or experts (the router included), the final norm and the head are left out; keys and
values are those of all tokens. Nothing changes in loss or gradients.

The tokens to keep are a flat list in the `AttentionInputs` of the micro-batch; their number is a shape, known to the
host.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dllm.config import ModelConfig, TrainingConfig
from megatron_dllm.model.alignment import AlignedLayer
from megatron_dllm.model.attention.inputs import AttentionInputs


def can_skip_outputs(model: ModelConfig, config: TransformerConfig, training: TrainingConfig) -> bool:
    """Whether the last layer may leave out tokens, by what it would change or could not do.

    It must not where the router is balanced by what it sees (its bias moves, or it has a loss of its own); where
    the expert dispatcher gathers tokens of ranks with other rows, which must bring equal numbers (or may want them:
    flex, whose buffers follow the first layer's tokens); and where context-parallel ranks exchange tokens for heads,
    likewise. Products in FP8 want whole blocks of tokens.
    """
    is_balanced = bool(training.moe_router_bias_update_rate or training.moe_aux_loss_coeff or training.moe_z_loss_coeff)
    num_expert_ranks = config.expert_model_parallel_size * (config.expert_tensor_parallel_size or 1)
    gathers_rows = (
        config.moe_token_dispatcher_type == "allgather" and num_expert_ranks > config.tensor_model_parallel_size
    )
    needs_equal_counts = gathers_rows or config.moe_token_dispatcher_type == "flex"
    if model.is_moe and (is_balanced or needs_equal_counts):
        return False
    exchanges_heads = config.context_parallel_size > 1 and config.cp_comm_type == "a2a"
    return training.skip_unused_outputs and not exchanges_heads and not config.fp8


def flat_rows(positions: Tensor, length: int, num_rows: int) -> Tensor:
    """[P] indexes into [b * s] tokens to indexes into [s * b], the order of megatron-core's hidden states."""
    return positions % length * num_rows + positions // length


def rows_to_keep(positions: Tensor, length: int, num_rows: int, multiple: int) -> Tensor:
    """The tokens that the last layer computes.

    Args:
        positions: [P] int64 indexes into the flattened [b * s] tokens whose output is read; P may be 0.
        length: tokens of a row on this rank, s.
        num_rows: rows, b.
        multiple: the tensor ranks that share the tokens, 1 without sequence parallelism.

    Returns:
        [R] int64 indexes into [s * b]: those of `positions`, filled up with token 0 to a multiple, at least one.
    """
    missing = -len(positions) % multiple if len(positions) else multiple
    rows = flat_rows(positions, length, num_rows)
    return torch.cat([rows, rows.new_zeros(missing)])


class LastLayer(AlignedLayer):
    """Layer that returns the hidden states of chosen tokens alone. Parameters and names are the same."""

    def _forward_attention(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attention_bias: AttentionInputs | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention and residual of the chosen tokens.

        Args:
            hidden_states: [s/tp, b, h] of all tokens.
            attention_mask: megatron-core's, unused.
            attention_bias: what the layers of the micro-batch share; if it keeps no queries, all are computed.
            **kwargs: megatron-core's others.

        Returns:
            [R/tp, 1, h] hidden states, and no context.
        """
        if attention_bias is None or attention_bias.kept is None:
            return super()._forward_attention(hidden_states, attention_mask, attention_bias=attention_bias, **kwargs)
        rows = attention_bias.kept.rows
        attended = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            attention_bias=attention_bias,
            rotary_pos_emb=kwargs.get("rotary_pos_emb"),
        )
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return add(attended, self._select(hidden_states, rows), self.hidden_dropout), None

    def _select(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[s/tp, b, h] to this tensor rank's share [R/tp, 1, h] of the chosen tokens."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
            rows = rows.chunk(self.tp_group.size())[self.tp_group.rank()]
        return hidden.flatten(0, 1).index_select(0, rows).unsqueeze(1)
