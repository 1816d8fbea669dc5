"""What rows of preference pairs and their scores cost: how full rows are, views, planning, and the file of scores.

    python -m benchmarks.pair_rows

Rows and batches are those of recipe dpo, planned by the program's own code. Prompts and answers are drawn with
log-normal lengths.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.compose import compose_train_config
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import LENGTH, RowStream, row_forward_tokens
from megatron_dllm.data.spans import MASKABLE, Spans, segment_spans
from megatron_dllm.evaluation.scores_file import check_content, write_scores
from megatron_dllm.evaluation.scores_header import ScoresHeader

NOTE = (
    "fill: share of the rows' tokens that the model needs; apart: the same documents without regard to pairs. "
    "milliseconds_per_pair: CPU time of planning, which every rank does. forward_tokens_per_pair: all noisy views of "
    "both answers and one clean copy. Of the file: seconds to write it and to compare its checksum."
)
# Medians and sigmas of the logarithm; longest.
PROMPT, ANSWER = (200.0, 0.9, 2000), (300.0, 0.7, 2000)


def draw_sides(num_pairs: int) -> tuple[NDArray[np.int64], Spans]:
    """[2 x num_pairs] lengths of the sides of pairs, one pair after the other, and their spans."""
    draw = np.random.default_rng(0)

    def lengths(median: float, sigma: float, longest: int, count: int) -> NDArray[np.int64]:
        return np.clip(draw.lognormal(np.log(median), sigma, count), 4, longest).astype(np.int64)

    prompts = np.repeat(lengths(*PROMPT, num_pairs), 2)
    whole = prompts + lengths(*ANSWER, 2 * num_pairs)
    table = np.stack([prompts, whole, np.full_like(whole, MASKABLE)], axis=1)
    return whole, Spans(np.arange(len(whole) + 1), table)


def recipe_geometry(num_views: int) -> RowGeometry:
    """The rows of recipe dpo with so many views."""
    words = ["experiment=dpo", "model=ling_mini", "data.train=x", "checkpoint.load=y", "preference.reference=frozen"]
    config = compose_train_config(words)
    stage = replace(config.schedule.stages["dpo"], num_views=num_views)
    return RowGeometry.of_stage(stage, config.schedule, config.data)


def measure_rows(num_pairs: int, num_views: int, chunk: int) -> dict[str, Any]:
    """One epoch of rows, with pairs in one batch and without."""
    lengths, spans = draw_sides(num_pairs)
    geometry = recipe_geometry(num_views)
    found: dict[str, Any] = {"views": num_views, "packing_chunk": chunk}
    for name, rows in (("fill", geometry), ("apart", replace(geometry, rows_of_pairs=None))):
        stream = RowStream(lengths, 0, chunk, spans=spans, is_paired=True)
        started, tokens, num_rows = time.process_time(), 0, 0
        while (plan := stream.next(rows)).epoch == 0:
            tokens += row_forward_tokens(rows, plan.segments[:, LENGTH], segment_spans(spans, plan.segments))
            num_rows += 1
        found[name] = round(tokens / (num_rows * rows.row_length), 4)
        if name == "fill":
            milliseconds = 1e3 * (time.process_time() - started) / num_pairs
            found |= {"milliseconds_per_pair": round(milliseconds, 3)}
            found |= {"forward_tokens_per_pair": round(tokens / num_pairs)}
    return found


def measure_file(folder: Path, num_pairs: int, num_views: int) -> dict[str, Any]:
    """The file of scores of so many pairs, for one epoch."""
    noise = {"num_views": num_views}
    header = ScoresHeader("", "", None, 0, 32, 4096, "eos", "split_views", "bf16", noise, 2 * num_pairs, 1)
    path = folder / "pairs.scores"
    started = time.perf_counter()
    write_scores(path, header, np.zeros(header.shape, np.float32))
    written = time.perf_counter()
    check_content(path)
    return {
        "pairs": num_pairs,
        "views": num_views,
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "write_seconds": round(written - started, 2),
        "check_seconds": round(time.perf_counter() - written, 2),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16384, help="that are packed")
    parser.add_argument("--stored_pairs", type=int, default=1_500_000, help="of the file of scores")
    parser.add_argument("--output", type=Path, default=RESULTS / "pair_rows", help="without suffix")
    args = parser.parse_args()
    rows = [measure_rows(args.pairs, 4, chunk) for chunk in (1024, 4096, 16384)]
    rows += [measure_rows(args.pairs, views, 4096) for views in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        files = [measure_file(Path(folder), args.stored_pairs, views) for views in (1, 4, 8)]
    about = machine() | {"pairs": args.pairs, "prompt": PROMPT, "answer": ANSWER}
    title = "Rows of preference pairs, and the file of their scores"
    write_results(args.output, title, about, dict(rows=rows, files=files), NOTE)


if __name__ == "__main__":
    main()
