"""Representation alignment in the model: which tokens of a micro-batch are pairs, and what happens behind each layer.

The clean token of a pair may lie on another rank: tensor ranks share the tokens with sequence parallelism, context
ranks always. So the states of all of them are gathered behind each layer, without gradient, and every rank aligns its
own noisy tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.clean_slots import find_slots, is_clean, is_noisy, slot_keys
from megatron_dllm.diffusion.losses.alignment import NUM_COLUMNS, AlignmentRule, align
from megatron_dllm.model.token_share import TokenShare


@dataclass(frozen=True)
class Alignment:
    """What a micro-batch's layers are asked for, and where they write what it came to.

    Attributes:
        rule: what is aligned.
        sums: [num_layers, NUM_COLUMNS] fp64, of all layers of the model; each layer here sets its own line, again where
            it is recomputed. A line that another rank sets stays 0.
        taught: by a second model, or what that model is asked to fill; None: the model's own clean tokens teach.
    """

    rule: AlignmentRule
    sums: Tensor
    taught: TaughtStates | None = None

    @classmethod
    def empty(
        cls, rule: AlignmentRule, num_layers: int, device: torch.device, taught: TaughtStates | None = None
    ) -> Alignment:
        """Of a micro-batch that has not run yet."""
        return cls(rule, torch.zeros(num_layers, NUM_COLUMNS, dtype=torch.float64, device=device), taught)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a micro-batch, for each of this rank's n tokens.

    Attributes:
        clean: [n] int64 index of its partner among the gathered tokens; any where it has none.
        visible: [n] fp32 1 where it is a visible noisy token with a partner, else 0.
        masked: [n] fp32 1 where it is a masked target with one.
    """

    clean: Tensor
    visible: Tensor
    masked: Tensor


@dataclass
class TaughtStates:
    """What a second model's pass over a micro-batch leaves for that of the model that learns.

    Attributes:
        pairs: of the micro-batch; None before that pass.
        by_layer: from a layer's number to [n, h] states behind it of the partners of this rank's n tokens.
    """

    pairs: Pairs | None = None
    by_layer: dict[int, Tensor] = field(default_factory=dict)


def find_pairs(offered: Batch, batch: Batch, share: TokenShare, shift: bool) -> Pairs:
    """Pair noisy tokens with clean ones (a collective of the context ranks).

    Args:
        offered: this context rank's part of rows with clean tokens; the micro-batch itself, or the same slots as a
            second model reads them.
        batch: this context rank's part of the micro-batch.
        share: of the tokens of both.
        shift: a position predicts the token after it.
    """
    num_rows, length = batch.input_ids.shape
    row_length = length * (1 if share.context is None else share.context.size())
    keys, noisy = slot_keys(batch.roles, batch.position_ids, row_length), is_noisy(batch.roles)
    is_target = torch.zeros(num_rows * length, dtype=torch.bool, device=keys.device)
    is_target[batch.target_positions] = True
    is_masked = noisy & is_target.view(num_rows, length)
    # 1 what every slot offers, in the order of gathered states [S, b]
    clean_keys = slot_keys(offered.roles, offered.position_ids, row_length)
    slots = torch.stack([clean_keys, is_clean(offered.roles).long(), offered.input_ids], dim=-1).transpose(0, 1)
    all_keys, all_clean, all_ids = share.gather_context(slots.contiguous()).flatten(0, 1).unbind(-1)
    # 2 what this rank's tokens want: their own clean copy, or the token before the one that they predict
    wanted = keys if shift else keys - is_masked.long()
    mine = torch.stack([wanted, noisy & ~batch.is_masked, is_masked, batch.input_ids], dim=-1).transpose(0, 1)
    own_keys, visible, masked, ids = share.local(mine).flatten(0, 1).unbind(-1)
    clean, is_found = find_slots(own_keys, all_keys, all_clean.bool())
    # 3 noise may have replaced a token by another one: it is not the same then
    is_same = is_found & (all_ids[clean] == ids)
    return Pairs(clean, (visible.bool() & is_same).float(), (masked.bool() & is_found).float())


@dataclass(frozen=True)
class LayerAlignment:
    """Aligns the states of a micro-batch behind a layer.

    Attributes:
        asked: what is aligned, and where its sums go.
        pairs: of the micro-batch.
        share: of its tokens.
    """

    asked: Alignment
    pairs: Pairs
    share: TokenShare

    @property
    def taught(self) -> TaughtStates | None:
        """What a second model says, if it teaches."""
        return self.asked.taught

    def __call__(self, layer_number: int, hidden: Tensor) -> Tensor:
        """[s, b, h] the states [s, b, h] behind a layer, whose gradient gets that of the alignment added."""
        rule, pairs, num_layers = self.asked.rule, self.pairs, len(self.asked.sums)
        visible, masked = rule.scales(layer_number, num_layers)
        if visible == masked == 0.0:
            return hidden
        teacher = _partners(self.share, pairs, hidden) if self.taught is None else self.taught.by_layer[layer_number]
        aligned, distance = align(hidden, teacher, visible * pairs.visible + masked * pairs.masked)
        if self.share.is_counting:
            self._count(layer_number, distance, visible > 0.0, masked > 0.0)
        # A pipeline stage lets go of the memory of what it has sent, which a view may not have.
        return make_viewless_tensor(inp=aligned, requires_grad=True, keep_graph=True)

    def _count(self, layer_number: int, distance: Tensor, has_visible: bool, has_masked: bool) -> None:
        """Set the layer's line, from [n] fp32 1 - cosine of all tokens."""
        parts = ((self.pairs.visible, has_visible), (self.pairs.masked, has_masked))
        columns = [value for part, has in parts for value in ((part * distance).sum() * has, part.sum() * has)]
        self.asked.sums[layer_number - 1] = torch.stack(columns).double()


@dataclass(frozen=True)
class StateRecorder:
    """Keeps the states of a second model behind each layer that is aligned.

    Attributes:
        asked: what is aligned; its `taught` is filled.
        pairs: of the micro-batch.
        share: of its tokens.
    """

    asked: Alignment
    pairs: Pairs
    share: TokenShare

    def __call__(self, layer_number: int, hidden: Tensor) -> Tensor:
        """[s, b, h] the states [s, b, h] behind a layer, as they are."""
        assert self.asked.taught is not None, "the states of a teacher need a place"
        if any(self.asked.rule.scales(layer_number, len(self.asked.sums))):
            self.asked.taught.by_layer[layer_number] = _partners(self.share, self.pairs, hidden)
        return hidden


def _partners(share: TokenShare, pairs: Pairs, hidden: Tensor) -> Tensor:
    """[n, h] the states of the partners of this rank's n tokens, of states [s, b, h] (a collective)."""
    return share.gather(hidden).flatten(0, 1).index_select(0, pairs.clean)


class AlignedLayer(TransformerLayer):
    """TransformerLayer whose output is aligned where the micro-batch asks for it."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Of megatron-core's arguments `attention_bias` says what is to be done behind the layer."""
        hidden, context = super().forward(*args, **kwargs)
        inputs = kwargs.get("attention_bias")
        if inputs is not None and inputs.after_layer is not None:
            hidden = inputs.after_layer(self.layer_number, hidden)
        return hidden, context
