"""The one predicate against masks written down independently, token by token, from the LLaDA2.0 report."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dllm.diffusion.roles import visible, visible_keys


def expected_block_diffusion_mask(blocks: list[int], documents: list[int]) -> list[list[bool]]:
    """LLaDA2.0 Eq. 3 over [x_t; x_0]: 2L x 2L, from the block number b(i) and the document of every token."""
    length = len(blocks)
    mask = [[False] * (2 * length) for _ in range(2 * length)]
    for i in range(2 * length):
        for j in range(2 * length):
            if documents[i % length] != documents[j % length]:
                continue
            if i < length and j < length:
                mask[i][j] = blocks[i] == blocks[j]
            elif i < length <= j:
                mask[i][j] = blocks[i] > blocks[j - length]
            elif i >= length and j >= length:
                mask[i][j] = blocks[i - length] >= blocks[j - length]
    return mask


def expected_document_mask(documents: list[int]) -> list[list[bool]]:
    """LLaDA2.0 Eq. 4: L x L, everything inside one document."""
    return [[a == b for b in documents] for a in documents]


def random_documents(rng: random.Random, length: int) -> list[int]:
    """[length] document of every token of a full row."""
    documents: list[int] = []
    while len(documents) < length:
        documents += [len(set(documents))] * rng.randint(1, 9)
    return documents[:length]


def block_numbers(documents: list[int], block_size: int, origin: str) -> list[int]:
    """Block of every token, counted from its document's start or from the row's."""
    starts = {doc: documents.index(doc) for doc in documents}
    return [(i - (starts[doc] if origin == "document" else 0)) // block_size for i, doc in enumerate(documents)]


def roles_of(documents: list[int], blocks: list[int], view: int) -> Tensor:
    return torch.tensor([[doc, block, view] for doc, block in zip(documents, blocks, strict=True)], dtype=torch.int32)


def block_diffusion_roles(documents: list[int], blocks: list[int], num_views: int = 1) -> Tensor:
    """All noisy views, then the clean copy."""
    return torch.cat([roles_of(documents, blocks, view) for view in (*range(1, num_views + 1), 0)])


def random_roles(seed: int, rows: int, length: int) -> Tensor:
    """[rows, length, 3] roles of no particular layout, padding and empty rows included."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(low, high, (rows, length), generator=generator) for low, high in ((-1, 3), (0, 5), (0, 3))]
    roles = torch.stack(columns, dim=-1).int()
    roles[0, :, 0] = -1
    return roles


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("origin", ["document", "row"])
def test_block_diffusion_equals_equation_3(origin, block_size, seed):
    documents = random_documents(random.Random(seed), 24)
    blocks = block_numbers(documents, block_size, origin)
    roles = block_diffusion_roles(documents, blocks)
    expected = torch.tensor(expected_block_diffusion_mask(blocks, documents))
    assert torch.equal(visible(roles, roles), expected)
    assert np.array_equal(visible_keys(roles.numpy()), expected.sum(1).numpy())


def test_grids_differ_where_a_document_starts_inside_a_block():
    documents = [0, 0, 0, 1, 1, 1]
    masks = [
        visible(roles, roles)
        for roles in (
            block_diffusion_roles(documents, block_numbers(documents, 2, origin)) for origin in ("document", "row")
        )
    ]
    # Tokens 3 and 4 share a block if it restarts at token 3, and do not on the row's grid.
    assert masks[0][3, 4] and not masks[1][3, 4]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("origin", ["document", "row"])
def test_one_block_a_document_is_the_document_mask(seed, origin):
    documents = random_documents(random.Random(seed), 24)
    blocks = block_numbers(documents, 24, origin)
    roles = roles_of(documents, blocks, view=1)
    assert torch.equal(visible(roles, roles), torch.tensor(expected_document_mask(documents)))


@pytest.mark.parametrize("seed", range(3))
def test_mdlm_is_the_noisy_part_of_block_diffusion_with_one_block(seed):
    documents = random_documents(random.Random(seed), 16)
    roles = block_diffusion_roles(documents, [0] * 16)
    mask = visible(roles, roles)
    assert torch.equal(mask[:16, :16], torch.tensor(expected_document_mask(documents)))
    # No noisy token reads the clean copy, which therefore need not be there.
    assert not mask[:16, 16:].any()


def test_ar_is_the_causal_document_mask():
    documents = random_documents(random.Random(0), 24)
    roles = roles_of(documents, block_numbers(documents, 1, "document"), view=0)
    expected = [[documents[i] == documents[j] and j <= i for j in range(24)] for i in range(24)]
    assert torch.equal(visible(roles, roles), torch.tensor(expected))


def test_block_size_one_shows_each_noisy_token_the_causal_past():
    documents = [0] * 5
    roles = block_diffusion_roles(documents, list(range(5)))
    mask = visible(roles, roles)
    assert torch.equal(mask[:5, :5], torch.eye(5, dtype=torch.bool))
    assert torch.equal(mask[:5, 5:], torch.ones(5, 5).tril(-1).bool())


def test_clean_tokens_never_see_noisy_ones():
    roles = random_roles(seed=1, rows=4, length=60)
    view = roles[..., 2]
    from_clean_to_noisy = (view[:, :, None] == 0) & (view[:, None, :] > 0)
    assert from_clean_to_noisy.any()
    assert not (visible(roles, roles) & from_clean_to_noisy).any()


def test_two_views_see_the_same_clean_past_and_not_each_other():
    documents = random_documents(random.Random(3), 12)
    blocks = block_numbers(documents, 3, "document")
    roles = block_diffusion_roles(documents, blocks, num_views=2)
    mask = visible(roles, roles)
    first, second, clean = slice(0, 12), slice(12, 24), slice(24, 36)
    assert not mask[first, second].any() and not mask[second, first].any()
    expected = torch.tensor(expected_block_diffusion_mask(blocks, documents))
    for view in (first, second):
        assert torch.equal(mask[view, view], expected[:12, :12])
        assert torch.equal(mask[view, clean], expected[:12, 12:])


def test_padding_neither_sees_nor_is_seen():
    roles = random_roles(seed=2, rows=3, length=40)
    padding = roles[..., 0] == -1
    mask = visible(roles, roles)
    assert padding[1:].any() and not padding[1:].all()
    assert not mask[padding].any()
    assert not mask.transpose(1, 2)[padding].any()
    assert mask.diagonal(dim1=1, dim2=2)[~padding].all()


def test_queries_may_be_a_part_of_the_keys():
    roles = random_roles(seed=3, rows=2, length=30)
    assert torch.equal(visible(roles[:, 10:17], roles), visible(roles, roles)[:, 10:17])


def test_order_of_tokens_is_free():
    roles = random_roles(seed=4, rows=1, length=30)[0]
    roles[:, 0].clamp_(min=0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(visible(roles[order], roles[order]), visible(roles, roles)[order][:, order])
    assert np.array_equal(visible_keys(roles[order].numpy()), visible_keys(roles.numpy())[order.numpy()])


@pytest.mark.parametrize("seed", range(10))
def test_visible_keys_equal_the_dense_sums(seed):
    for row in random_roles(seed, rows=3, length=50):
        assert np.array_equal(visible_keys(row.numpy()), visible(row, row).sum(1).numpy())


def test_rows_without_tokens_see_nothing():
    assert visible_keys(np.full((8, 3), -1, dtype=np.int32)).tolist() == [0] * 8
    assert visible_keys(np.zeros((0, 3), dtype=np.int32)).tolist() == []
