"""How evenly context parallelism deals rows: visible pairs and targets of the busiest rank over the mean.

    python -m benchmarks.context_balance

Rows of documents of log-normal length are packed, noised and dealt by the program's own code. For comparison, each line
also gives the ratio if every rank took one unbroken part of the row.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import LENGTH, RowStream
from megatron_dllm.data.row import Row, build_row
from megatron_dllm.data.row_tokens import RowContent
from megatron_dllm.diffusion.context_deal import deal_row, load_ratio
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.diffusion.roles import visible_keys

VOCAB_SIZE, MASK = 1000, 0
NOTE = (
    "Visible (query, key) pairs, and targets, of the busiest rank over the mean of the ranks: mean and maximum "
    "over the rows. undealt: each rank takes a stretch of the row as it lies. milliseconds: CPU time of one deal."
)


def build_rows(geometry: RowGeometry, num_rows: int, median: float, sigma: float) -> list[Row]:
    """Rows of documents of log-normal length, as training would build them."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(median), sigma, 50_000), 1).astype(np.int64)
    stream = RowStream(lengths, 0, 1024)
    noise = NoiseSpec(
        t_unit="block",
        is_stratified=True,
        at_least_one=geometry.num_views == 1,
        loss_weight="elbo",
        t_min=0.001,
        t_max=0.999,
        num_views=geometry.num_views,
        view_relation="complementary" if geometry.num_views == 2 else "stratified",
    )
    rows = []
    for index in range(num_rows):
        plan = stream.next(geometry)
        tokens = int(plan.segments[:, LENGTH].sum())
        content = RowContent(rng.integers(MASK + 1, VOCAB_SIZE, tokens), np.arange(len(plan.segments)) + 10_000 * index)
        rows.append(build_row(plan, content, geometry, noise, seed=0, mask_token_id=MASK, pad_token_id=0))
    return rows


def measure(rows: list[Row], num_ranks: int) -> dict[str, float]:
    """Ratios over the rows, and the time of one deal."""
    pairs, targets, undealt, seconds = [], [], [], []
    for row in rows:
        is_target = np.zeros(len(row.input_ids), dtype=np.bool_)
        is_target[row.target_positions] = True
        started = time.process_time()
        tokens = deal_row(row.roles, is_target, num_ranks)
        seconds.append(time.process_time() - started)
        costs = visible_keys(row.roles)
        pairs.append(load_ratio(costs, tokens))
        targets.append(load_ratio(is_target.astype(np.int64), tokens))
        undealt.append(load_ratio(costs, np.arange(len(costs)).reshape(num_ranks, -1)))
    return dict(
        pairs_mean=round(float(np.mean(pairs)), 4),
        pairs_max=round(max(pairs), 4),
        targets_max=round(max(targets), 3),
        undealt_pairs_mean=round(float(np.mean(undealt)), 2),
        milliseconds=round(1e3 * float(np.mean(seconds)), 1),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context_length", type=int, default=4096)
    parser.add_argument("--row_length", type=int, default=16384, help="tokens of a row, over all ranks")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 512, 0], help="block sizes; 0: the context")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--median", type=float, default=700.0, help="tokens of the median document")
    parser.add_argument("--sigma", type=float, default=1.2, help="of the logarithm of the length")
    parser.add_argument("--output", type=Path, default=RESULTS / "context_balance", help="without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine() | {
        name: getattr(args, name) for name in ("context_length", "row_length", "rows", "median", "sigma")
    }
    table: list[dict[str, float]] = []
    for views in (1, 2):
        for block in args.blocks:
            block = block or args.context_length
            geometry = RowGeometry(
                objective="block_diffusion",
                block_size=block,
                context_length=args.context_length,
                row_length=args.row_length,
                num_views=views,
                block_origin="document",
                prune_clean=True,
            )
            rows = build_rows(geometry, args.rows, args.median, args.sigma)
            for ranks in args.ranks:
                table.append(dict(views=views, block_size=block, ranks=ranks) | measure(rows, ranks))
                print(table[-1], flush=True)
    write_results(args.output, "Balance of the context-parallel deal", about, {"rows": table}, NOTE)


if __name__ == "__main__":
    main()
