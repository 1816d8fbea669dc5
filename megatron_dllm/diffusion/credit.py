"""Credit for tokens that pass after pass predicts (CreditDecoding, dInfer): what is repeated is believed sooner.

A pass leaves its most probable token at each masked place, with its probability p. A later pass adds to that token's
logit, and so to its probability, which the threshold then judges:

    credit of a token = sum over the passes that had it first, this one included, of decay^age p^exponent
    logit             = logit + weight log(1 + credit)

With decay 0.8, exponent 0.2 and weight 0.7, a token that was first with p = 0.5 in this pass and the one before has a
credit of 0.871 (1 + 0.8) = 1.57, and its logit grows by 0.66. Of a place, that is a sparse row of the vocabulary: so
many passes, so many tokens at the most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig

# At decay 0.8, older ones weigh less than a millionth of the newest.
MOST_PASSES = 64


@dataclass(frozen=True)
class Trace:
    """What earlier passes over a block had first at each place, the newest last.

    Attributes:
        token_ids: [..., c] int64, the places as a caller lays them out.
        probabilities: [..., c] fp32; 0 where there was no such pass.
    """

    token_ids: Tensor
    probabilities: Tensor

    @classmethod
    def empty(cls, *shape: int) -> Trace:
        """Of places that no pass has seen; `shape` ends with c."""
        return cls(torch.zeros(*shape, dtype=torch.int64), torch.zeros(*shape))

    @property
    def num_passes(self) -> int:
        """c, passes that are remembered."""
        return self.token_ids.shape[-1]

    def take(self, is_place: Tensor) -> Trace:
        """The [m, c] trace of the places [...] bool, without the passes that none of them has seen."""
        probabilities = self.probabilities[is_place]
        num_unseen = self.num_passes - int((probabilities > 0).any(dim=0).sum())
        return Trace(self.token_ids[is_place][:, num_unseen:], probabilities[:, num_unseen:])

    def grown(self, token_ids: Tensor, probabilities: Tensor) -> Trace:
        """With a pass that had tokens [...] first, with probabilities [...]; where these are 0, it saw nothing."""
        newest = (token_ids.unsqueeze(-1), probabilities.unsqueeze(-1).to(self.probabilities.dtype))
        kept = (self.token_ids, self.probabilities)
        longer = [torch.cat([old, new], dim=-1)[..., -MOST_PASSES:] for old, new in zip(kept, newest, strict=True)]
        return Trace(*longer)

    def to(self, device: torch.device) -> Trace:
        """The same on a device."""
        return Trace(self.token_ids.to(device), self.probabilities.to(device))


def add_credit(logits: Tensor, trace: Trace, config: DecodingConfig) -> Tensor:
    """Logits with the credit of each place.

    Args:
        logits: [m, v] of this pass; overwritten.
        trace: [m, c] of the passes so far, of which the last is this one.
        config: weight, decay and exponent.
    """
    age = torch.arange(trace.num_passes - 1, -1, -1, device=logits.device)
    earned = torch.where(
        trace.probabilities > 0, trace.probabilities**config.credit_exponent * config.credit_decay**age, 0.0
    )
    # A token that several passes had first has their sum, in each of its entries.
    is_same = trace.token_ids.unsqueeze(2) == trace.token_ids.unsqueeze(1)
    credit = (is_same * earned.unsqueeze(1)).sum(dim=2)
    added = logits.gather(1, trace.token_ids) + config.credit_weight * torch.log1p(credit)
    return logits.scatter_(1, trace.token_ids, added)
