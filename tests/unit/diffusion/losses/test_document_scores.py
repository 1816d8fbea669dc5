"""Scores of documents, in an order that no layout changes."""

from __future__ import annotations

import torch

from megatron_dllm.diffusion.losses.document_scores import DocumentScores


def test_the_order_is_that_of_epochs_and_then_of_sample_ids() -> None:
    scores = DocumentScores(
        sample_ids=torch.tensor([5, 2**50, 5, 4]),
        epochs=torch.tensor([1, 0, 0, 1]),
        num_maskable=torch.tensor([10, 11, 12, 13]),
        by_view=torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 11.0], [13.0, 15.0]], dtype=torch.float64),
    )
    ordered = scores.ordered()
    assert ordered.sample_ids.tolist() == [5, 2**50, 4, 5] and ordered.epochs.tolist() == [0, 0, 1, 1]
    assert ordered.num_maskable.tolist() == [12, 11, 13, 10]
    assert ordered.means.tolist() == [10.0, 6.0, 14.0, 2.0]
