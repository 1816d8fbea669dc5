"""The attention layer: takes the place of megatron-core's DotProductAttention and attends by token roles.

All that depends on the roles was made before the first layer ran, see `inputs`.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dllm.model.attention.head_exchange import heads_to_tokens, tokens_to_heads
from megatron_dllm.model.attention.inputs import AttentionInputs
from megatron_dllm.model.attention.selection import join_rows, select_queries


class RoleAttention(MegatronModule):
    """Core attention whose mask is the predicate `diffusion.roles.visible`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        selects_rows: bool = False,
    ) -> None:
        """Take megatron-core's arguments.

        Args:
            config: the model's; dropout must be 0 and the softmax the plain one.
            layer_number: 1 for the first layer.
            attn_mask_type: ignored, the roles say what is visible.
            attention_type: ignored.
            attention_dropout: overrides the config's.
            softmax_scale: factor on the logits; None: 1 / sqrt(d).
            cp_comm_type: ignored, the inputs of the micro-batch say what travels.
            pg_collection: ignored, likewise.
            selects_rows: compute only the queries that the inputs keep.

        Raises:
            ValueError: for dropout, or another softmax.
        """
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout ({dropout}) must be 0; the attention backends have none.")
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise ValueError(f"softmax_type ({config.softmax_type}) is not supported; use vanilla.")
        self.layer_number = max(1, layer_number)
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.selects_rows = selects_rows

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: AttentionInputs | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend by roles.

        Args:
            query: [s, b, n, d] queries of this rank's heads and tokens, rotary embedding applied.
            key: [s, b, g, d] keys.
            value: [s, b, g, d] values.
            attention_mask: ignored, whatever its shape: the roles are in `attention_bias`.
            attn_mask_type: ignored.
            attention_bias: what the layers of the micro-batch share.
            packed_seq_params: must be None.

        Returns:
            [s, b, n * d], or [R, 1, n * d] of the kept tokens; exactly 0 for padding.
        """
        inputs = attention_bias
        s, b, n, d = query.shape
        assert packed_seq_params is None, "RoleAttention reads only token roles"
        assert inputs is not None, "RoleAttention needs the AttentionInputs of the micro-batch as attention_bias"
        assert inputs.roles.shape[:2] == (b, s), f"roles {tuple(inputs.roles.shape)} of other tokens than [{b}, {s}]"
        if inputs.heads is not None:
            query, key, value = tokens_to_heads(query, key, value, inputs.heads)
        key, value = inputs.bring_keys(self.layer_number, key, value)
        kept = inputs.kept if self.selects_rows else None
        if kept is not None:
            assert inputs.heads is None, "rows are chosen from this rank's tokens"
            query = select_queries(query, kept.rows, kept.num_queries)
            out = self._attend(query, join_rows(key), join_rows(value), inputs, kept.plan)
            return out[: len(kept.rows)].reshape(len(kept.rows), 1, n * d)
        out = self._attend(query, key, value, inputs, inputs.plan)
        if inputs.heads is not None:
            out = heads_to_tokens(out, inputs.heads)
        return out.reshape(s, b, n * d)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs, plan: Any) -> Tensor:
        """[q, b, n, d] queries and [k, b, g, d] keys and values, in megatron-core's layout, to [q, b, n, d]."""
        assert plan is not None, "the inputs were made without a plan for this layer"
        out = inputs.backend.attend(
            query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), plan, self.softmax_scale
        )
        return out.permute(2, 0, 1, 3)
