"""Rows built from lengths alone, whose tokens can be told apart."""

from __future__ import annotations

import itertools

import numpy as np

from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import RowPlan
from megatron_dllm.data.row import Row, build_row, lay_out_row
from megatron_dllm.data.row_noise import RowNoise
from megatron_dllm.data.row_tokens import RowContent, collect_tokens
from megatron_dllm.data.spans import Spans
from megatron_dllm.diffusion.noise_spec import NoiseSpec

MASK, PAD, EOS = 99, 98, 97


def spec(num_views: int = 1, **changes: object) -> NoiseSpec:
    settings = {
        "t_unit": "block",
        "is_stratified": True,
        "at_least_one": True,
        "loss_weight": "elbo",
        "t_min": 0.1,
        "t_max": 0.9,
        "num_views": num_views,
        "view_relation": "complementary" if num_views == 2 else "stratified",
    } | changes
    return NoiseSpec(**settings)


def make_plan(
    lengths: list[int], epoch: int = 0, sample_ids: list[int] | None = None, kinds: list[int] | None = None
) -> tuple[RowPlan, RowContent]:
    """Segments whose tokens are 1, 2, 3, ... of sample 0, then 1, 2, 3, ... + 10 of sample 100, and so on."""
    sample_ids = list(range(0, 100 * len(lengths), 100)) if sample_ids is None else sample_ids
    segments = np.array([[i, 0, n, i] for i, n in enumerate(lengths)], dtype=np.int64).reshape(-1, 4)
    segments[:, 3] = np.array(sample_ids) // 100
    clean_ids = np.concatenate(
        [np.zeros(0, np.int64), *[1 + np.arange(n) + s // 10 for s, n in zip(sample_ids, lengths, strict=True)]]
    )
    spans = None if kinds is None else spans_of_kinds(lengths, kinds)
    return RowPlan(segments, epoch), RowContent(clean_ids, np.array(sample_ids, dtype=np.int64), spans)


def spans_of_kinds(lengths: list[int], kinds: list[int]) -> Spans:
    """Spans of segments from the kind of every token, one segment after the other."""
    documents, start = [], 0
    for length in lengths:
        own, spans = kinds[start : start + length], []
        for kind, run in itertools.groupby(range(length), own.__getitem__):
            places = list(run)
            spans += [(places[0], places[-1] + 1, kind)] if kind else []
        documents.append(spans)
        start += length
    return Spans.of_lists(documents)


def make_row(
    lengths: list[int],
    geometry: RowGeometry,
    noise: NoiseSpec | None,
    *,
    epoch: int = 0,
    sample_ids: list[int] | None = None,
    kinds: list[int] | None = None,
) -> Row:
    """A row of the segments of `make_plan`, its noise drawn with seed 0."""
    plan, content = make_plan(lengths, epoch, sample_ids, kinds)
    return build_row(plan, content, geometry, noise, seed=0, mask_token_id=MASK, pad_token_id=PAD, eos_token_id=EOS)


def make_masked_row(
    lengths: list[int], geometry: RowGeometry, masks: list[list[int]], *, epoch: int = 0, kinds: list[int] | None = None
) -> Row:
    """A row masked by hand, one list of its noisy tokens for each view: weights 10 + view, t = 0.1 x (position + 1)."""
    plan, content = make_plan(lengths, epoch, None, kinds)
    tokens = collect_tokens(content, np.array(lengths), geometry, EOS)
    masked = np.array([[0] * len(tokens.noisy.ids), *masks], dtype=bool)
    weights = np.where(masked, 10.0 + np.arange(len(masked))[:, None], 0.0).astype(np.float32)
    t = np.tile(0.1 * (tokens.noisy.position_ids + 1), (len(masked), 1)).astype(np.float32)
    leading = np.full(len(tokens.leading.ids), len(masks), np.float32)
    noise = RowNoise(masked, weights, t, leading)
    return lay_out_row(plan, content, tokens, geometry, noise, mask_token_id=MASK, pad_token_id=PAD)
