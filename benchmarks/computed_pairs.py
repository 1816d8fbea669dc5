"""How much of what the attention backends compute is visible, and what the kernel's mask costs to make. No kernel runs.

    python -m benchmarks.computed_pairs

Counted from the plans of the backends: of all (query, key) pairs that a backend computes, the share that the mask
allows. Beside it the same for the flex backend if documents were filled up to whole blocks, and the time to make its
mask from the roles and by torch's create_block_mask, which looks at every pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.attention import clock, document_lengths
from benchmarks.record import RESULTS, machine, write_results
from benchmarks.step_cases import OURS, build_batch, draw_documents
from megatron_dllm.diffusion.roles import visible_keys
from megatron_dllm.model.attention import chunked, flex, shared_prefix
from megatron_dllm.model.attention.tiles import TilePlan

NOTE = (
    "dense to flex: visible pairs over those that the backend computes (dense: all). flex_aligned: the same with "
    "document lengths rounded up to the block (of at most a tile), which takes more_tokens, whose pairs do not "
    "count. Milliseconds to make flex's mask: from the roles, and by looking at every pair."
)


def computed_pairs(plan: Any) -> int:
    """(query, key) pairs that a backend with this plan computes, per head."""
    if isinstance(plan, TilePlan):
        return sum(_size(tile.queries) * sum(map(_size, (tile.prefix, *tile.own))) for tile in plan.tiles)
    if isinstance(plan, shared_prefix.PiecePlan):
        return sum(_size(piece.queries) * _size(piece.keys) for _, pieces in plan.pieces for piece in pieces)
    mask = plan.block_mask
    return int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) * mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1]


def _size(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def build_roles(lengths: list[int], block: int, views: int) -> Tensor:
    """Roles [1, s, 3] of documents as training lays them out."""
    return build_batch(draw_documents(lengths, block, views, vocab_size=8), OURS, mask_token_id=2).roles


def measure(length: int, documents: str, block: int, views: int, every_pair_up_to: int) -> dict[str, Any]:
    """A row of the table."""
    lengths = document_lengths(length, documents)
    roles = build_roles(lengths, block, views)
    visible = int(visible_keys(roles[0].numpy()).sum())
    shares = {"dense": visible / roles.shape[1] ** 2} | {
        backend.__name__.rsplit(".", 1)[1]: visible / computed_pairs(backend.build_plan(roles, roles))
        for backend in (chunked, shared_prefix, flex)
    }
    mask = flex.build_plan(roles, roles).block_mask
    slow = None
    if length <= every_pair_up_to:
        slow = _milliseconds(lambda: create_block_mask(mask.mask_mod, 1, None, *mask.seq_lengths, device="cpu"))
    aligned = more = None
    if block <= flex.TILE_SIZE:
        whole = [-(-size // block) * block for size in lengths]
        whole_roles = build_roles(whole, block, views)
        aligned, more = visible / computed_pairs(flex.build_plan(whole_roles, whole_roles)), sum(whole) / length - 1
    return (
        dict(length=length, documents=documents, block=block, views=views)
        | shares
        | dict(
            flex_aligned=aligned,
            more_tokens=more,
            mask_ms=min(_milliseconds(lambda: flex.build_plan(roles, roles)) for _ in range(5)),
            every_pair_ms=slow,
        )
    )


def _milliseconds(run: Callable[[], Any]) -> float:
    device = torch.device("cpu")
    started = clock(device)
    run()
    return 1e3 * (clock(device) - started)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384], help="document tokens")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 32, 512, 0], help="block sizes; 0: the length")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument(
        "--every_pair_up_to",
        type=int,
        default=4096,
        help="longest row of which every pair is looked at (10 bytes for each)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "computed_pairs", help="without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for length in args.lengths:
        for documents in ("one", "lognormal"):
            for block in dict.fromkeys(block or length for block in args.blocks):
                for views in args.views:
                    rows.append(measure(length, documents, block, views, args.every_pair_up_to))
                    print(rows[-1], flush=True)
    write_results(args.output, "Pairs that are computed and pairs that are visible", machine(), {"rows": rows}, NOTE)


if __name__ == "__main__":
    main()
