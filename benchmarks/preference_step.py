"""What a step of preferences costs beside one of SFT on the same rows, by number of views.

    python -m benchmarks.preference_step

Pairs of log-normal lengths are trained by the program's own code: as answers (SFT), and as pairs with the reference's
scores from a file (two passes) or from a copy in memory (three). All have the same rows, noise and model, and forward
and backward without the optimizer. Times are CPU seconds of one thread, the shortest of some repetitions; memory is the
peak of one more step, weights and gradients included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, machine, write_results
from benchmarks.sft import EOS, MASK, MODEL, PAD, Chats, shortest_seconds
from megatron_dllm.config import NoiseConfig, ParallelConfig, PreferenceConfig, SftConfig, StageConfig
from megatron_dllm.data.batch import Batch, collate
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import RowPlan, row_forward_tokens
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.model.objective import objective_of
from megatron_dllm.planning.engine_memory import LiveMemory
from megatron_dllm.training.frozen import FrozenModel
from megatron_dllm.training.weighing import FrozenReference, Reference, weigh_batches

NOTE = (
    "model_tokens: of the rows, for each pair. Seconds: sft: one pass with gradients; file: a pass for the scores "
    "before it; frozen: another for those of the reference. The ratios are to sft. memory: most MiB that are alive "
    "at a time in one step, of all tensors that it makes, changes or takes a view of: weights and gradients too."
)


class Pairs(Chats):
    """Pairs as a source: the sample id of a side is its number."""

    def sample_id(self, document: int, offset: int) -> int:
        """The document."""
        return document


def draw_pairs(num_pairs: int, median: float, sigma: float, seed: int = 0) -> Pairs:
    """Pairs whose prompt and two answers have log-normal lengths."""
    rng = np.random.default_rng(seed)
    parts = np.maximum(rng.lognormal(np.log(median), sigma, (num_pairs, 3)), 4).astype(int)
    prompts, stops = np.repeat(parts[:, 0], 2), (parts[:, :1] + parts[:, 1:]).flatten()
    spans = [[(start, stop, MASKABLE)] for start, stop in zip(prompts.tolist(), stops.tolist(), strict=True)]
    return Pairs(stops, Spans.of_lists(spans))


def stage_of(num_views: int) -> StageConfig:
    """The stage of preferences."""
    return StageConfig(
        block_size=32,
        num_tokens=1,
        global_batch_size=2,
        learning_rate=1.0,
        num_views=num_views,
        sft=SftConfig(),
        preference=PreferenceConfig(),
    )


def batches_of(source: Pairs, stage: StageConfig) -> list[Batch]:
    """A micro-batch for each pair, in a row without padding but for what makes its length a whole number of blocks."""
    batches = []
    for first in range(0, len(source.document_lengths), 2):
        numbers = np.array([first, first + 1])
        lengths = source.document_lengths[numbers]
        segments = np.stack([numbers, np.zeros_like(numbers), lengths, numbers], axis=1)
        size = -(-int(lengths.max()) // 32) * 32
        loose = RowGeometry("block_diffusion", 32, size, 2 * (stage.num_views + 1) * size, stage.num_views, fill="eos")
        # A row must hold the longest segment with all its copies, whatever carries a loss.
        needed = row_forward_tokens(loose, lengths, source.spans.take(numbers))
        geometry = replace(loose, row_length=max(needed, (stage.num_views + 1) * size))
        noise = NoiseSpec.for_stage(NoiseConfig(), stage)
        dataset = RowDataset(source, geometry, noise, 0, MASK, PAD, EOS)
        batches.append(collate([dataset[RowPlan(segments, 0)]]))
    return batches


def peak_mib(step: Callable[[], None]) -> float:
    """Most MiB that are alive at a time while a step runs."""
    with LiveMemory() as memory:
        step()
    return memory.peak / 2**20


def measure(source: Pairs, num_views: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line of each table: the seconds of the three kinds of steps, and their memory."""
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import single_rank

    stage = stage_of(num_views)
    batches, device = batches_of(source, stage), torch.device("cpu")
    with single_rank(0) as groups:
        model, frozen = (build_model(MODEL, ParallelConfig(), groups) for _ in range(2))
        copy = FrozenReference(FrozenModel([frozen], device, groups))
        sft, dpo = (objective_of(which, NoiseConfig()) for which in (replace(stage, preference=None), stage))
        stored = torch.zeros(2 * len(batches), num_views, dtype=torch.float64)

        def step(objective: Any, reference: Reference | None) -> Callable[[], None]:
            def run() -> None:
                weighed, _ = weigh_batches([model], batches, device, groups, objective, reference)
                for batch in weighed:
                    (objective.loss(batch, model(batch)).total / (2 * len(batches))).backward()

            return run

        kinds = {"sft": (sft, None), "file": (dpo, lambda *_: stored), "frozen": (dpo, copy)}
        seconds = {name: shortest_seconds(step(*kind), repeats) for name, kind in kinds.items()}
        peaks = {name: round(peak_mib(step(*kind)), 1) for name, kind in kinds.items()}
    tokens = sum(batch.input_ids.numel() for batch in batches) / len(batches)
    ratios = {f"{name}_ratio": seconds[name] / seconds["sft"] for name in ("file", "frozen")}
    return {"views": num_views, "model_tokens": tokens, **seconds, **ratios}, {"views": num_views, **peaks}


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--median", type=float, default=150.0, help="tokens of the median prompt and answer")
    parser.add_argument("--sigma", type=float, default=0.5, help="of the logarithm of their lengths")
    parser.add_argument("--pairs", type=int, default=4, help="of a step")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "preference_step", help="without suffix")
    options = parser.parse_args(arguments)
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    torch.set_num_threads(1)
    source = draw_pairs(options.pairs, options.median, options.sigma)
    steps, memory = [], []
    for num_views in options.views:
        for table, line in zip((steps, memory), measure(source, num_views, options.repeats), strict=True):
            table.append(line)
            print(line, flush=True)
    about = machine() | {name: getattr(options, name) for name in ("median", "sigma", "pairs", "repeats")}
    write_results(options.output, "Step of preferences", about, {"step": steps, "memory": memory}, NOTE)
    return 0


if __name__ == "__main__":
    main()
