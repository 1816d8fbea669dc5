"""Slots are found by document and position, and nothing is found that is not there."""

from __future__ import annotations

import torch

from megatron_dllm.diffusion.clean_slots import find_slots, is_clean, is_noisy, slot_keys


def test_slots_of_random_rows_are_those_of_a_search_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(40, generator=generator)[:24] for _ in range(3)])
    roles = torch.zeros(3, 24, 3, dtype=torch.int32)
    roles[..., 0] = places % 4 - 1  # padding too
    roles[..., 2] = (torch.rand(3, 24, generator=generator) < 0.3).int()
    positions = places // 4
    keys = slot_keys(roles, positions, 24).flatten()
    offered = is_clean(roles).flatten()
    assert bool((is_clean(roles) ^ is_noisy(roles) ^ (roles[..., 0] < 0)).all())
    for offset in (0, 1):
        slots, is_found = find_slots(keys - offset, keys, offered)
        for index in range(72):
            row, token = divmod(index, 24)
            expected = [
                row * 24 + other
                for other in range(24)
                if roles[row, other, 0] == roles[row, token, 0] >= 0
                and roles[row, other, 2] == 0
                and positions[row, other] == positions[row, token] - offset
            ]
            if roles[row, token, 0] >= 0:
                assert ([int(slots[index])] if is_found[index] else []) == expected
