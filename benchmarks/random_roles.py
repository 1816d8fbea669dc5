"""Random rows of token roles, and attention problems made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoleCase:
    """What kind of rows to draw.

    Attributes:
        num_views: noisy copies of each document.
        block_size: tokens of a block; larger than any document: MDLM.
        clean_block_size: tokens of a block of clean copies; 0: those of noisy ones.
        is_pruned: leave out clean blocks that no later block reads.
        has_clean: there are clean copies.
        is_row_grid: blocks are counted along the row, so that a document's first one may be short.
        prompt_share: the share of a document's blocks, from its beginning, that have no noisy copy.
        has_split_turns: some noisy blocks have further copies, in views of their own.
        num_rows: rows.
        row_length: tokens of a row.
        max_document: tokens of the longest document.
    """

    num_views: int = 1
    block_size: int = 4
    clean_block_size: int = 0
    is_pruned: bool = True
    has_clean: bool = True
    is_row_grid: bool = False
    prompt_share: float = 0.0
    has_split_turns: bool = False
    num_rows: int = 2
    row_length: int = 120
    max_document: int = 40


CASES = {
    "one view": RoleCase(),
    "unpruned": RoleCase(is_pruned=False),
    "two views": RoleCase(num_views=2, block_size=8),
    "block of one": RoleCase(block_size=1),
    "row grid": RoleCase(is_row_grid=True, block_size=6),
    "mdlm": RoleCase(block_size=1000),
    "mdlm two views": RoleCase(block_size=1000, num_views=2),
    "large block, clean kept": RoleCase(block_size=1000, is_pruned=False),
    "ar": RoleCase(num_views=0, block_size=1, is_pruned=False),
    "noisy only": RoleCase(has_clean=False, block_size=4),
    "one long document": RoleCase(row_length=150, max_document=10_000, num_rows=1),
    "prompts": RoleCase(prompt_share=0.6),
    "prompts, two views": RoleCase(prompt_share=0.4, num_views=2, block_size=8),
    "tiny documents": RoleCase(max_document=3, block_size=2),
    "clean blocks of one": RoleCase(clean_block_size=1),
    "clean blocks of one, two views": RoleCase(clean_block_size=1, num_views=2, block_size=8),
    "all clean tokens, in blocks of one": RoleCase(clean_block_size=1, block_size=8, is_pruned=False),
    "smaller clean blocks": RoleCase(clean_block_size=2, block_size=6, is_row_grid=True),
    "split turns": RoleCase(has_split_turns=True),
    "split turns, two views": RoleCase(num_views=2, block_size=8, has_split_turns=True),
}


def draw_roles(case: RoleCase, seed: int) -> Tensor:
    """[num_rows, row_length, 3] int32 roles, documents laid out as their views and then their clean tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_draw_row(case, generator) for _ in range(case.num_rows)])


def _draw_row(case: RoleCase, generator: torch.Generator) -> Tensor:
    rows: list[Tensor] = []
    used = before = 0
    copies = case.num_views + 1
    # Noisy blocks have the numbers of the clean blocks that they begin with.
    apart = case.block_size // (case.clean_block_size or case.block_size)
    for doc in range(case.row_length):
        length = int(torch.randint(1, min(case.max_document, case.row_length // copies) + 1, (), generator=generator))
        if case.max_document > case.row_length:
            length = case.row_length // copies - 1
        places = torch.arange(length) + (before if case.is_row_grid else 0)
        blocks, clean_blocks = places // case.block_size, places // (case.clean_block_size or case.block_size)
        before += length
        answered = blocks[blocks - blocks[0] >= int(case.prompt_share * int(blocks[-1] - blocks[0] + 1))]
        parts = [(view, answered) for view in range(1, case.num_views + 1)]
        if case.has_split_turns:
            is_split = torch.rand(int(blocks[-1]) + 1, generator=generator) < 0.4
            parts += [(view + case.num_views, answered[is_split[answered]]) for view in range(1, case.num_views + 1)]
        if case.has_clean:
            parts.append((0, clean_blocks[blocks < blocks[-1]] if case.is_pruned else clean_blocks))
        row = torch.cat(
            [
                torch.stack(
                    [torch.full_like(kept, doc), kept * (1 if view == 0 else apart), torch.full_like(kept, view)], 1
                )
                for view, kept in parts
            ]
        )
        if used + len(row) > case.row_length:
            break
        rows.append(row)
        used += len(row)
    padding = torch.tensor([[-1, 0, 0]]).expand(case.row_length - used, 3)
    return torch.cat([*rows, padding]).int()


def draw_inputs(
    roles_q: Tensor,
    roles_k: Tensor,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Leaf tensors query, key, value for these roles and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    (b, q), k = roles_q.shape[:2], roles_k.shape[1]
    shapes = [(b, heads, q, head_dim), (b, groups, k, head_dim), (b, groups, k, head_dim), (b, heads, q, head_dim)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in drawn[:3]], drawn[3]
