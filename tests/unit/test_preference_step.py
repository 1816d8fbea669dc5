"""The rows that the step benchmark of preferences measures."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.preference_step import batches_of, draw_pairs, peak_mib, stage_of


def test_each_row_holds_both_sides_of_a_pair_for_every_kind_of_step() -> None:
    source = draw_pairs(3, median=20.0, sigma=0.5)
    stage = stage_of(2)
    stage.validate("one", 1024)
    batches = batches_of(source, stage)
    assert [batch.sample_ids.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    assert all(int(batch.segment_maskable.min()) >= 4 for batch in batches)
    for batch, plain in zip(batches, batches_of(source, replace(stage, preference=None)), strict=True):
        assert batch.input_ids.shape == plain.input_ids.shape, "the same rows"
        assert int(batch.num_forward_tokens) == int(plain.num_forward_tokens)


def test_memory_is_that_of_what_lives_together() -> None:
    weight = torch.zeros(2**18)

    def step() -> None:
        weight.add_(1.0)
        for _ in range(3):
            torch.ones(2**19)

    assert peak_mib(step) == 1 + 2, "the weight, which was there before, and one tensor at a time"
