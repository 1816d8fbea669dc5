"""Rows as an autoregressive model reads them: every token of a document once, true, and seen by the tokens behind it.

The slots stay those of the noisy rows. Of each document's tokens one slot shows each; the others become padding:

    noisy  a [b] c [d]   clean  a b          a document of four tokens in blocks of 2; [x] is masked
    true   . .  c d             a b          read in the order a b c d
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.clean_slots import find_slots, is_clean, is_noisy, slot_keys
from megatron_dllm.diffusion.roles import BLOCK, CLEAN_VIEW, DOC, PADDING_DOC, VIEW


def true_rows(batch: Batch, shift: bool) -> Batch:
    """The same slots without noise, each token in a clean block of its own; targets stay as they are.

    A token whose clean copy was left out is shown where a noisy view has it; what noise has hidden there is known from
    the target that predicts it.

    Args:
        batch: whole rows, on the CPU.
        shift: a position of a noisy view predicts the token after it.
    """
    keys = slot_keys(batch.roles, batch.position_ids, batch.input_ids.shape[1]).flatten()
    clean, noisy = is_clean(batch.roles).flatten(), is_noisy(batch.roles).flatten()
    targets = batch.target_positions
    # Clean tokens always predict the next one.
    predicted = keys[targets] + (clean[targets] | shift).long()
    # 1 what is known of tokens: by clean copies, by targets, and by what noisy views show
    is_shown = noisy & ~batch.is_masked.flatten()
    known = torch.cat([keys[clean], predicted, keys[is_shown]])
    ids = batch.input_ids.flatten()
    known_ids = torch.cat([ids[clean], batch.target_ids, ids[is_shown]])
    first = _first_of_each(known)
    # 2 of the slots of a token the clean one, or else the first noisy one
    slots = torch.cat([clean.nonzero().flatten(), noisy.nonzero().flatten()])
    slots = slots[_first_of_each(keys[slots])]
    place, is_known = find_slots(keys[slots], known[first], known[first] >= 0)
    slots, place = slots[is_known], place[is_known]
    roles = batch.roles.flatten(0, 1).clone()
    roles[:, DOC], roles[:, BLOCK], roles[:, VIEW] = PADDING_DOC, 0, CLEAN_VIEW
    roles[slots, DOC] = batch.roles.flatten(0, 1)[slots, DOC]
    roles[slots, BLOCK] = batch.position_ids.flatten()[slots].int()
    true_ids = ids.clone()
    true_ids[slots] = known_ids[first][place]
    return replace(
        batch,
        input_ids=true_ids.view_as(batch.input_ids),
        roles=roles.view_as(batch.roles),
        is_masked=torch.zeros_like(batch.is_masked),
    )


def _first_of_each(keys: Tensor) -> Tensor:
    """[u] int64 where each of the different keys [n] int64 stands first."""
    ordered, order = torch.sort(keys, stable=True)
    is_repeated = torch.cat([ordered[:1] != ordered[:1], ordered[1:] == ordered[:-1]])
    return order[~is_repeated]
