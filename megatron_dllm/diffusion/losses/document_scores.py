"""Scores of documents: what a validation, a loss that compares documents, and a likelihood are made of.

The score of a document is an estimate of its ELBO: minus the sum of loss_weight * NLL over its masked tokens, in nats
and not per token. Each noisy view gives one; their mean is the document's. A loss that compares documents turns the
scores of a global batch into a `Weighing`, with which an ordinary step trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_dllm.diffusion.losses.step_sums import StepSums


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


@dataclass(frozen=True)
class Weighing:
    """What the scores of a global batch come to: the loss, and the weights with which a step has its gradient.

    Attributes:
        scores: of the d documents.
        factors: [d, k] fp64 what the loss weights of each document and view are multiplied by. The gradient is that of
            the sum of the weighted NLLs, divided by d.
        loss: [] fp64 the loss, not divided yet.
        count: [] fp64 what the loss is divided by: pairs, say.
        margins: [p] fp64 of what is compared, nats; all 0 where the model is its reference.
        ratios: what is logged beside the loss, each a sum [] and what to divide it by [].
    """

    scores: DocumentScores
    factors: Tensor
    loss: Tensor
    count: Tensor
    margins: Tensor
    ratios: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def largest_margin(self) -> float:
        """The largest margin without its sign."""
        return float(self.margins.abs().max()) if len(self.margins) else 0.0

    def of_documents(self, sample_ids: Tensor, epochs: Tensor) -> Tensor:
        """[p, k] fp64 the factors of some documents.

        Args:
            sample_ids: [p] int64.
            epochs: [p] int64 the pass over the corpus that each belongs to.
        """
        rows = [self._places[document] for document in zip(epochs.tolist(), sample_ids.tolist(), strict=True)]
        return self.factors[torch.tensor(rows, dtype=torch.int64)]

    @cached_property
    def _places(self) -> Mapping[tuple[int, int], int]:
        """Index of each document by epoch and sample id, made once for all micro-batches."""
        known = zip(self.scores.epochs.tolist(), self.scores.sample_ids.tolist(), strict=True)
        return {document: index for index, document in enumerate(known)}

    def logged(self, sums: StepSums) -> StepSums:
        """The sums of the step that trained, with the loss itself instead of what had its gradient."""
        return sums.with_loss(self.loss, self.count).with_ratios(**self.ratios)
