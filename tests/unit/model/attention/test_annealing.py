"""The mask that opens: what each share of it shows, in every backend, and in the model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.random_roles import draw_inputs
from megatron_dllm.config import ParallelConfig
from megatron_dllm.config.annealing import KINDS, RANDOM, AttentionAnnealConfig
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention import dense
from megatron_dllm.model.attention.annealing import Annealing, Opening, PlacedOpening, window_roles
from megatron_dllm.model.attention.backends import Backend
from megatron_dllm.model.attention.random_pairs import RandomPairs
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch
from tests.unit.model.attention.eager_kernel import small_backends

SHARES = [0.0, 0.1, 0.34, 0.8, 1.0]
LENGTHS, VIEWS = [[7, 1, 12], [20]], 2


def random_mask(query: Tensor, key: Tensor, share: float, seed: int) -> Tensor:
    """[b, q, k] bool of tokens [b, q, 5] and [b, k, 5]."""
    return dense.build_plan(query, key, RandomPairs(share, seed))[:, 0]


def one_block_rows() -> Tensor:
    """[2, 42, 4] documents of one block in two views and their places, padding behind them."""
    rows = []
    for lengths in LENGTHS:
        tokens = [
            [doc, 0, view, place]
            for doc, length in enumerate(lengths)
            for view in range(1, VIEWS + 1)
            for place in range(length)
        ]
        rows.append(tokens + [[-1, 0, 0, 0]] * (42 - len(tokens)))
    return torch.tensor(rows, dtype=torch.int32)


def expected_mask(tokens: Tensor, share: float) -> Tensor:
    """[b, s, s] by its description, token by token."""
    mask = torch.zeros(*tokens.shape[:2], tokens.shape[1], dtype=torch.bool)
    for row, lengths in zip(range(len(tokens)), LENGTHS, strict=True):
        for i, (doc, _, view, q) in enumerate(tokens[row].tolist()):
            for j, (other, _, seen, k) in enumerate(tokens[row].tolist()):
                if doc == other >= 0 and view == seen:
                    mask[row, i, j] = k <= q + math.floor(share * lengths[doc])
    return mask


@pytest.mark.parametrize("share", SHARES)
def test_the_window_by_its_description(share: float) -> None:
    tokens = one_block_rows()
    mask = visible(*window_roles(tokens, tokens, share))
    assert torch.equal(mask, expected_mask(tokens, share))
    for lengths, row in zip(LENGTHS, mask, strict=True):
        widths = [(n, math.floor(share * n)) for n in lengths]
        assert int(row.sum()) == VIEWS * sum(min(n, q + w + 1) for n, w in widths for q in range(n))


def test_its_ends_are_the_causal_mask_and_the_whole_one() -> None:
    tokens = one_block_rows()
    roles = tokens[..., :3]
    assert torch.equal(visible(*window_roles(tokens, tokens, 1.0)), visible(roles, roles))
    # An autoregressive row of the same tokens: each copy a document of its own, each token a clean block.
    doc = torch.where(roles[..., 0] >= 0, 10 * roles[..., 0] + roles[..., 2], -1)
    causal = torch.stack([doc, tokens[..., 3], torch.zeros_like(doc)], dim=-1)
    assert torch.equal(visible(*window_roles(tokens, tokens, 0.0)), visible(causal, causal))


@pytest.mark.parametrize("share", [0.1, 0.8, 0.999])
def test_an_ar_row_among_them_stays_causal(share: float) -> None:
    """Clean tokens in blocks of one beside a row of noisy copies, as `ar_row_share` mixes them."""
    noisy = _numbered(one_block_rows())
    place = torch.arange(42, dtype=torch.int32) % 21
    doc = (torch.arange(42) >= 21).int()
    row = torch.stack([doc, place, 0 * doc, place, 100 + doc], dim=-1)[None]
    tokens = torch.cat([noisy[:1], row])
    expected = (doc[:, None] == doc) & (place <= place[:, None])
    assert torch.equal(visible(row, row)[0], expected)
    assert torch.equal(visible(*window_roles(tokens, tokens, share))[1], expected)
    assert torch.equal(random_mask(tokens, tokens, share, 3)[1], expected)


@pytest.mark.parametrize("name", ["chunked", "shared_prefix", "flex"])
@pytest.mark.parametrize("share", [0.1, 0.34])
def test_every_backend_keeps_the_window(name: str, share: float) -> None:
    backend: Backend = small_backends(tile_size=8)[name]
    generator = torch.Generator().manual_seed(3)
    tokens = one_block_rows()
    keys = tokens[:, torch.randperm(42, generator=generator)]
    for queries in (keys, keys[:, :11]):
        inputs, grad = draw_inputs(queries[..., :3], keys[..., :3])
        both = []
        for one in (backend, dense):
            plan = PlacedOpening(Opening("window", share), 0, tokens).plan(one, queries, keys)
            out = one.attend(*inputs, plan, 0.3)
            both.append((out, *torch.autograd.grad(out, inputs, grad)))
        for got, want in zip(*both, strict=True):
            assert float((got - want).detach().abs().max()) < 1e-12


def test_the_share_follows_from_the_step_alone() -> None:
    annealing = Annealing(AttentionAnnealConfig(steps=4))
    openings = [annealing.at(step).opening for step in range(6)]
    assert openings == [*(Opening("window", share) for share in (0.25, 0.5, 0.75)), None, None, None]
    assert Annealing(AttentionAnnealConfig(steps=1)).opening is None


def _numbered(tokens: Tensor) -> Tensor:
    """[b, s, 5] tokens [b, s, 4] with a number of each document."""
    rows = torch.arange(len(tokens), dtype=torch.int32).view(-1, 1, 1)
    return torch.cat([tokens, 100 * rows + tokens[..., :1]], dim=-1)


def test_random_pairs_have_the_ends_of_the_window_and_its_seed_alone() -> None:
    tokens = _numbered(one_block_rows())
    whole, causal = visible(tokens, tokens), expected_mask(tokens[..., :4], 0.0)
    assert torch.equal(random_mask(tokens, tokens, 0.0, 7), causal)
    assert torch.equal(random_mask(tokens, tokens, 1.0, 7), whole)
    mask = random_mask(tokens, tokens, 0.4, 7)
    assert bool((causal <= mask).all() and (mask <= whole).all())
    assert not torch.equal(mask, random_mask(tokens, tokens, 0.4, 8))
    # Wherever a token lies, and whatever lies beside it.
    order = torch.randperm(42, generator=torch.Generator().manual_seed(1))
    assert torch.equal(random_mask(tokens[:, order[:9]], tokens[:, order], 0.4, 7), mask[:, order[:9]][:, :, order])
    assert torch.equal(random_mask(tokens[1:], tokens[1:], 0.4, 7), mask[1:])


@pytest.mark.parametrize("share", [1e-9, 0.34])
def test_flex_draws_the_pairs_of_the_dense_mask(share: float) -> None:
    """Also of tokens in another order, of some queries alone, and of AR rows beside them."""
    backend = small_backends(tile_size=8)["flex"]
    tokens = _numbered(one_block_rows())
    place = torch.arange(42, dtype=torch.int32)
    tokens = torch.cat([tokens, torch.stack([0 * place, place, 0 * place, place, 0 * place + 9], dim=-1)[None]])
    shuffled = tokens[:, torch.randperm(42, generator=torch.Generator().manual_seed(3))]
    for queries, keys in ((tokens, tokens), (shuffled, shuffled), (shuffled[:, :11], shuffled)):
        inputs, grad = draw_inputs(queries[..., :3], keys[..., :3])
        both = []
        for one in (backend, dense):
            plan = PlacedOpening(Opening(RANDOM, share), 5, tokens).plan(one, queries, keys)
            out = one.attend(*inputs, plan, 0.3)
            both.append((out, *torch.autograd.grad(out, inputs, grad)))
        for got, want in zip(*both, strict=True):
            assert float((got - want).detach().abs().max()) < 1e-12


def test_the_expected_share_of_random_pairs() -> None:
    length, num_documents, share = 40, 50, 0.3
    place = torch.arange(length, dtype=torch.int32).repeat(num_documents)
    doc = torch.arange(num_documents, dtype=torch.int32).repeat_interleave(length)
    tokens = torch.stack([doc, 0 * doc, 0 * doc + 1, place, doc], dim=-1)[None]
    found = float(random_mask(tokens, tokens, share, 3).sum()) / (num_documents * length**2)
    expected = share + (1 - share) * (length + 1) / (2 * length)
    num_drawn = num_documents * length * (length - 1) / 2
    error = math.sqrt(share * (1 - share) * num_drawn) / (num_documents * length**2)
    assert abs(found - expected) < 4 * error


@pytest.mark.parametrize("has_all_outputs", [False, True])
def test_a_closed_mask_is_that_of_the_autoregressive_model(one_rank: Any, has_all_outputs: bool) -> None:
    from megatron_dllm.config import TrainingConfig
    from megatron_dllm.model.gpt import build_model

    model = tiny_model()
    training = TrainingConfig(skip_unused_outputs=not has_all_outputs)
    built = build_model(model, ParallelConfig(), one_rank, training=training)
    batch = tiny_batch(model, [[17, 9], [24]], row_length=32, block_size=32, has_clean=False)
    roles = batch.roles.clone()
    roles[..., 1], roles[..., 2] = batch.position_ids, 0
    causal = built(replace(batch, roles=roles)).nll
    whole = built(batch).nll
    for kind in KINDS:
        if kind == RANDOM:
            built.attention = replace(built.attention, backend=dense)
        closed, half = (built(batch, opening=Opening(kind, share), noise_seed=3).nll for share in (1e-9, 0.3))
        torch.testing.assert_close(closed, causal, rtol=1e-6, atol=1e-6)
        assert float((half - closed).abs().max()) > 1e-3 < float((half - whole).abs().max())
