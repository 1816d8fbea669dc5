"""What context-parallel ranks exchange of long rows, and how evenly these are dealt: counts, no timing.

    python -m benchmarks.context_exchange

Noisy keys are read by their own block alone, so where every noisy block lies on one rank only clean keys travel. A row
whose noisy blocks are divided needs the general exchange: all keys. Rows are packed, noised and dealt by the program's
own code, which also decides what travels (`model.attention.context_parallel.keys_to_send`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.context_balance import build_rows
from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.row import Row
from megatron_dllm.diffusion.context_deal import deal_row, load_ratio
from megatron_dllm.diffusion.roles import visible_keys
from megatron_dllm.model.attention.context_parallel import keys_to_send

NOTE = (
    "A row holds one noisy view and the clean blocks that it needs, twice the context in all. one: a document as long "
    "as the context; packed: log-normal lengths, median an eighth of the context, cut at the context. general: share "
    "of the rows in which a noisy block is divided, or so many keys are clean that all travel. mib: keys and values "
    "that a rank receives in one layer, forward, bf16, in the mean over the rows; the backward pass sends as many "
    "gradients back. all_mib: with all keys gathered. balance: visible pairs of the busiest rank over the mean, the "
    "worst row. milliseconds: CPU time of one deal."
)
MIB = 2**20
BF16_BYTES = 2
KEY_AND_VALUE = 2


def received_mib(num_keys: int, num_ranks: int, num_groups: int, kv_channels: int) -> float:
    """MiB that a rank receives where each of the others sends so many keys and values of a layer."""
    return num_keys * (num_ranks - 1) * KEY_AND_VALUE * num_groups * kv_channels * BF16_BYTES / MIB


def measure(rows: Sequence[Row], num_ranks: int, num_groups: int, kv_channels: int) -> dict[str, float]:
    """Counts over the rows, each of them a micro-batch."""
    sent, balance, seconds = [], [], []
    for row in rows:
        is_target = np.zeros(len(row.input_ids), dtype=np.bool_)
        is_target[row.target_positions] = True
        begun = time.process_time()
        tokens = deal_row(row.roles, is_target, num_ranks)
        seconds.append(time.process_time() - begun)
        balance.append(load_ratio(visible_keys(row.roles), tokens))
        dealt = torch.from_numpy(row.roles[tokens.reshape(-1)]).unsqueeze(0)
        sent.append(keys_to_send(dealt, num_ranks))
    length = len(rows[0].input_ids) // num_ranks
    mean_sent = float(np.mean([length if keys is None else keys for keys in sent]))
    all_mib = received_mib(length, num_ranks, num_groups, kv_channels)
    mib = all_mib * mean_sent / length
    return dict(
        general=round(sum(keys is None for keys in sent) / len(sent), 3),
        mib=round(mib, 1),
        all_mib=round(all_mib, 1),
        share=round(mib / all_mib, 3),
        balance=round(max(balance), 4),
        milliseconds=round(1e3 * float(np.mean(seconds)), 1),
    )


def geometry_of(context_length: int, block_size: int) -> RowGeometry:
    """Rows of one noisy view with its clean copy."""
    return RowGeometry(
        objective="block_diffusion",
        block_size=block_size,
        context_length=context_length,
        row_length=2 * context_length,
        num_views=1,
        block_origin="document",
        prune_clean=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 4096, 0], help="block sizes; 0: the context")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, default=8, help="of packed documents; a single document has one row")
    parser.add_argument("--num_groups", type=int, default=4, help="key-value heads of a rank (Ling: 4)")
    parser.add_argument("--kv_channels", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS / "context_exchange", help="without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine() | {name: getattr(args, name) for name in ("rows", "num_groups", "kv_channels")}
    table: list[dict[str, object]] = []
    for context in args.contexts:
        for kind, median, sigma, count in (("one", context, 0.0, 1), ("packed", context / 8, 1.2, args.rows)):
            for block in args.blocks:
                rows = build_rows(geometry_of(context, block or context), count, median, sigma)
                for ranks in args.ranks:
                    found = measure(rows, ranks, args.num_groups, args.kv_channels)
                    table.append(
                        dict(context=context, documents=kind, block_size=block or context, ranks=ranks) | found
                    )
                    print(table[-1], flush=True)
    write_results(args.output, "What context-parallel ranks exchange of long rows", about, {"rows": table}, NOTE)


if __name__ == "__main__":
    main()
