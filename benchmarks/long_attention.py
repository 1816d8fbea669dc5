"""Time and memory of attention alone for one context-parallel rank of long rows, forward and backward.

    python -m benchmarks.long_attention

A row [x_t; x_0] is packed and dealt by the program's own code; the first rank's queries meet the keys that they see.
Time is CPU time of this process over the visible pairs of the rank, memory what torch operations return: both should
follow the pairs and the tokens, not the square of the context.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.attention import Run, measure_memory, seconds_of
from benchmarks.context_balance import build_rows
from benchmarks.context_exchange import geometry_of
from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.diffusion.context_deal import deal_row
from megatron_dllm.diffusion.roles import visible_keys
from megatron_dllm.model.attention.backends import BACKENDS

NOTE = (
    "One forward and backward pass of the first of `ranks` context-parallel ranks, the better of two. one: a "
    "document as long as the context; equal: packed documents of one length, `document` tokens, at every context; "
    "random: packed ones of log-normal lengths, the median an eighth of the context. "
    "What other processes take is not counted as time, though they share the caches. million_pairs: that the rank's "
    "queries see. ns_a_pair: CPU time over them. peak_mib: tensors that operations returned, inputs not counted; "
    "kib_a_token: the same over the tokens of the row."
)
KINDS = ("one", "equal", "random")
# Of random lengths: the median as a share of the context, and the standard deviation of the logarithm.
MEDIAN, SIGMA = 0.125, 1.2


def measure(roles: Tensor, own: Tensor, backend: str, head_dim: int) -> tuple[float, float]:
    """CPU seconds and peak MiB of one pass of one head, the plan not counted.

    Args:
        roles: [s, 3] int32 of the row.
        own: [q] int64 places of the queries.
        backend: of attention.
        head_dim: features.
    """
    generator = torch.Generator().manual_seed(0)
    query, grad = (torch.randn(1, 1, len(own), head_dim, generator=generator) for _ in range(2))
    key, value = (torch.randn(1, 1, len(roles), head_dim, generator=generator) for _ in range(2))
    inputs = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    module = BACKENDS[backend]
    plan = module.build_plan(roles[own].unsqueeze(0), roles.unsqueeze(0))
    run = Run(lambda: module.attend(*inputs, plan, head_dim**-0.5), inputs, grad)
    peak, _ = measure_memory(run.forward, inputs, grad)
    return min(seconds_of(run, torch.device("cpu")) for _ in range(2)), peak / 2**20


def measure_row(context: int, kind: str, args: argparse.Namespace) -> dict[str, object]:
    """One line of the table."""
    length = {"one": context, "equal": args.document, "random": MEDIAN * context}[kind]
    (row,) = build_rows(geometry_of(context, args.block), 1, length, SIGMA if kind == "random" else 0.0)
    is_target = np.zeros(len(row.input_ids), dtype=np.bool_)
    is_target[row.target_positions] = True
    own = deal_row(row.roles, is_target, args.ranks)[0]
    pairs = int(visible_keys(row.roles)[own].sum())
    seconds, peak = measure(torch.from_numpy(row.roles), torch.from_numpy(own), args.backend, args.head_dim)
    return dict(
        context=context,
        documents=kind,
        million_pairs=round(pairs / 1e6, 3),
        seconds=round(seconds, 2),
        ns_a_pair=round(1e9 * seconds / pairs, 3),
        peak_mib=round(peak, 1),
        kib_a_token=round(1024 * peak / len(row.roles), 3),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--document", type=int, default=8192, help="tokens of documents of equal length")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="shared_prefix")
    parser.add_argument("--output", type=Path, default=RESULTS / "long_attention", help="without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine() | {name: getattr(args, name) for name in ("document", "block", "ranks", "head_dim", "backend")}
    table = []
    for kind in KINDS:
        for context in args.contexts:
            table.append(measure_row(context, kind, args))
            print(table[-1], flush=True)
    write_results(args.output, "Attention of one context rank of long rows", about, {"rows": table}, NOTE)


if __name__ == "__main__":
    main()
