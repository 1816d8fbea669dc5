"""Scores of documents: what a validation, a loss that compares documents, and a likelihood are made of.

The score of a document is an estimate of its ELBO: minus the sum of loss_weight * NLL over its masked tokens, in nats
and not per token. Each noisy view gives one; their mean is the document's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentScores:
    """The scores of d documents under k noisy views, on the host.

    Attributes:
        sample_ids: [d] int64.
        epochs: [d] int64 pass over the corpus: its noise, and so the score, is another one in every epoch.
        num_maskable: [d] int64 tokens of each that may carry a loss, each once, whatever the number of views.
        by_view: [d, k] fp64 the estimate of each view, nats.
    """

    sample_ids: Tensor
    epochs: Tensor
    num_maskable: Tensor
    by_view: Tensor

    @property
    def means(self) -> Tensor:
        """[d] fp64 the score of each document: the mean over its views."""
        return self.by_view.mean(1)

    def ordered(self) -> DocumentScores:
        """The same by epoch and sample id, which no layout changes."""
        order = torch.from_numpy(np.lexsort((self.sample_ids.numpy(), self.epochs.numpy())))
        return DocumentScores(self.sample_ids[order], self.epochs[order], self.num_maskable[order], self.by_view[order])
