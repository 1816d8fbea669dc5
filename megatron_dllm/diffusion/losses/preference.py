"""Direct preference optimisation on ELBO estimates (LLaDA2.0 Eq. 7, 8; with several views VRPO, arXiv 2505.19223).

A pair has a chosen answer w and a rejected one l. With scores B (estimates of the ELBO, nats) of the model and of a
frozen reference, both on the same masks:

    m    = [B(w) - B_ref(w)] - [B(l) - B_ref(l)]         the margin
    loss = -log sigmoid(beta m)                          log 2 where the model is the reference

The gradient needs the scores of both answers, and nothing else of the other one:

    d loss / d B(w) = -beta sigmoid(-beta m)             d loss / d B(l) = +beta sigmoid(-beta m)

So a pass without gradients scores all documents, these numbers scale the loss weights of their tokens, and an ordinary
step trains. The answers of a pair may lie in any rows, micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_dllm.diffusion.losses.document_scores import DocumentScores, Weighing

# A pair whose sigmoid(-beta m), the share of the gradient it has left, is below this has nothing more to teach.
SATURATED = 0.01


@dataclass(frozen=True)
class PreferenceRule:
    """The settings of the loss.

    Attributes:
        beta: what margins are multiplied by.
        sft_coefficient: of the chosen answers' NLL for each token, which is added to the loss.
        share_noise: model and reference are scored on the same views; otherwise the model on the first half of them and
            the reference on the second.
    """

    beta: float
    sft_coefficient: float = 0.0
    share_noise: bool = True


def preference_loss(margins: Tensor, beta: float) -> Tensor:
    """[p] fp64 the loss of pairs with margins [p] fp64."""
    return -logsigmoid(beta * margins)


def remaining(margins: Tensor, beta: float) -> Tensor:
    """[p] fp64 sigmoid(-beta m), the share of the gradient that is left to pairs with margins [p] fp64."""
    return torch.sigmoid(-beta * margins)


@dataclass(frozen=True)
class _Pairs:
    """The answers of p pairs, [p, 2]: the chosen one first. `gains` are how far their scores exceed the reference's."""

    scores: Tensor
    gains: Tensor
    num_tokens: Tensor

    @property
    def margins(self) -> Tensor:
        """[p] fp64."""
        return self.gains[:, 0] - self.gains[:, 1]


def weigh_pairs(rule: PreferenceRule, scores: DocumentScores, reference: Tensor) -> Weighing:
    """What the scores of a global batch of whole pairs come to.

    Args:
        rule: of the loss.
        scores: of the documents, in order: sample ids 2i (chosen) and 2i + 1 (rejected) follow each other.
        reference: [d, k] fp64 the reference's scores of the same documents and views, or [d, 1] their means.
    """
    own_views, reference = _split_views(rule, scores.by_view.shape[1], reference)
    by_view = scores.by_view[:, own_views]
    means = by_view.mean(1)
    pairs = _Pairs(*(column.view(-1, 2) for column in (means, means - reference, scores.num_maskable.double())))
    _check_pairs(scores)
    num_pairs, chosen_tokens = len(pairs.scores), pairs.num_tokens[:, 0].sum()
    nll_chosen = -pairs.scores[:, 0].sum()
    left = remaining(pairs.margins, rule.beta)
    # Of the mean over pairs, by the score of each document.
    gradient = rule.beta / num_pairs * torch.stack([-left, left], dim=1)
    gradient[:, 0] -= rule.sft_coefficient / chosen_tokens
    factors = torch.zeros_like(scores.by_view)
    factors[:, own_views] = -gradient.flatten()[:, None] * len(means) / by_view.shape[1]
    loss = preference_loss(pairs.margins, rule.beta).sum()
    loss = loss + rule.sft_coefficient * num_pairs * nll_chosen / chosen_tokens
    count = torch.tensor(float(num_pairs), dtype=torch.float64)
    return Weighing(scores, factors, loss, count, pairs.margins, _logged(rule, pairs, by_view))


def _split_views(rule: PreferenceRule, num_views: int, reference: Tensor) -> tuple[slice, Tensor]:
    """The model's views, and [d] the reference's scores from [d, k] or [d, 1] fp64."""
    if rule.share_noise:
        return slice(num_views), reference.mean(1)
    half = num_views // 2
    return slice(half), reference[:, half:].mean(1)


def _check_pairs(scores: DocumentScores) -> None:
    ids, epochs = scores.sample_ids.view(-1, 2), scores.epochs.view(-1, 2)
    is_right = (ids[:, 0] % 2 == 0) & (ids[:, 1] == ids[:, 0] + 1) & (epochs[:, 0] == epochs[:, 1])
    assert bool(is_right.all()), "a global batch holds whole pairs"


def _logged(rule: PreferenceRule, pairs: _Pairs, by_view: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What is logged, each a sum and what to divide it by.

    Args:
        rule: of the loss.
        pairs: of the global batch.
        by_view: [d, k] fp64 the model's scores.
    """
    margins = pairs.margins
    one = torch.ones_like(margins)
    found = {
        "preference_accuracy": ((margins > 0).double(), one),
        "margin": (margins, one),
        "margin_per_token": (margins, pairs.num_tokens.mean(1)),
        "saturated_share": ((remaining(margins, rule.beta) < SATURATED).double(), one),
    }
    for side, name in enumerate(("chosen", "rejected")):
        tokens = pairs.num_tokens[:, side]
        found[f"reward_{name}"] = (rule.beta * pairs.gains[:, side], one)
        found[f"elbo_{name}"] = (-pairs.scores[:, side], tokens)
        found[f"length_{name}"] = (tokens, one)
    if by_view.shape[1] > 1:
        variance = by_view.var(1)
        found["score_variance"] = (variance, torch.ones_like(variance))
    return {name: (total.sum(), count.sum()) for name, (total, count) in found.items()}
