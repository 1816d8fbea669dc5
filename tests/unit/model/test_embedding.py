"""Noise on the embedding of masked tokens: its size, its shape, and that it belongs to the token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dllm.model.embedding import mask_noise_std, mean_row_norm, token_normals

HIDDEN = 64


def _tokens(num_rows: int = 2, length: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    positions = torch.arange(length) % 64
    document = torch.arange(length) // 64
    roles = torch.stack([document // 2, positions // 8, document % 2], -1).int().expand(num_rows, -1, -1)
    return torch.arange(num_rows) * 31 + 5, roles, positions.expand(num_rows, -1)


def test_features_are_standard_normal_and_independent() -> None:
    normals = token_normals(7, *_tokens(num_rows=8, length=512), hidden_size=HIDDEN).flatten(0, 1)
    n = normals.numel()
    assert abs(normals.mean()) < 5 / n**0.5
    assert abs(normals.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(normals.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    share_below_minus_one = (normals < -1).double().mean()
    assert abs(share_below_minus_one - 0.158655) < 5 * (0.1335 / n) ** 0.5
    correlations = torch.corrcoef(normals.t())
    assert (correlations - torch.eye(HIDDEN)).abs().max() < 6 / len(normals) ** 0.5
    neighbours = (normals[1:] * normals[:-1]).mean()
    assert abs(neighbours) < 5 / n**0.5


@pytest.mark.parametrize("hidden_size", [1, 7, 64])
def test_noise_belongs_to_the_token_and_not_to_its_place(hidden_size: int) -> None:
    keys, roles, positions = _tokens()
    expected = token_normals(7, keys, roles, positions, hidden_size)
    assert expected.shape == (2, 256, hidden_size)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:100]
    shuffled = token_normals(7, keys.flip(0), roles.flip(0)[:, order], positions.flip(0)[:, order], hidden_size)
    assert torch.equal(shuffled, expected.flip(0)[:, order])


def test_every_part_of_the_key_counts() -> None:
    keys, roles, positions = _tokens()
    normals = token_normals(7, keys, roles, positions, HIDDEN)
    for changed in (
        token_normals(8, keys, roles, positions, HIDDEN),
        token_normals(7, keys + 2**40, roles, positions, HIDDEN),
        token_normals(7, keys, roles + torch.tensor([1, 0, 0], dtype=torch.int32), positions, HIDDEN),
        token_normals(7, keys, roles + torch.tensor([0, 0, 1], dtype=torch.int32), positions, HIDDEN),
        token_normals(7, keys, roles, positions + 1, HIDDEN),
    ):
        assert (changed != normals).float().mean() > 0.99
        assert abs((changed * normals).mean()) < 5 / normals.numel() ** 0.5
    assert len(normals.flatten(0, 1).unique(dim=0)) == 2 * 256
    assert torch.isfinite(token_normals(-(2**63), keys - 2**63, roles, positions, HIDDEN)).all()


@pytest.mark.parametrize("hidden_size", [1, 3, 64])
def test_expected_norm_of_the_noise_is_the_asked_share_of_the_mean_row_norm(hidden_size: int) -> None:
    weight = torch.randn(40, hidden_size, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 41).unsqueeze(1)
    norm = mean_row_norm(weight, 40, None)
    torch.testing.assert_close(norm, weight.norm(dim=1).mean())
    normals = token_normals(3, *_tokens(num_rows=64), hidden_size=hidden_size)
    noise = normals * mask_noise_std(0.25, norm, hidden_size)
    assert noise.norm(dim=-1).mean() == pytest.approx(0.25 * norm.item(), rel=0.02)
