"""One real rank of a model too large for this machine: it is built and trains one micro-batch, on the CPU.

    python -m benchmarks.real_rank --world_size 64 --rank 0 --stage warmup_32 experiment=llada2_flash ...

The words behind the options are those of `train`; corpora and checkpoints are not read. Collectives return what this
rank sends, in the right shapes. Weights and their gradients are held in the training precision; there is neither the
fp32 buffer of gradients nor an optimizer. The same program runs first with tensors that have shapes alone: its peak is
the prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.host import prepare_host
from megatron_dllm.run.command import run_command

KINDS = ("predicted", "measured")
NOTE = (
    "GB of 10^9 bytes. predicted: peak of the same program with tensors that have shapes alone and experts that get "
    "equal numbers of tokens; measured: of the real tensors' storages; resident: of the process, with the libraries."
)


class LoneRank(TorchDispatchMode):
    """Computes everything, and answers collectives."""

    def __init__(self, collectives: Any) -> None:
        super().__init__()
        self._collectives = collectives

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        return self._collectives.answer(func, args) if func.namespace == "c10d" else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _tensors(is_real: bool, config: TrainConfig, memory: Any, peers: Any) -> Iterator[None]:
    """Tensors with or without values, counted by `memory`."""
    from megatron_dllm.planning.engine_collectives import LoneCollectives
    from megatron_dllm.planning.engine_ledger import Ledger
    from megatron_dllm.planning.engine_values import DeviceNames, KnownValues

    if is_real:
        with LoneRank(LoneCollectives(Ledger({}), peers)), memory:
            yield
        return
    share = config.model.moe_router_topk / config.model.num_moe_experts if config.model.is_moe else 1.0
    with DeviceNames(False, memory), KnownValues(Ledger({}), share, peers), memory:
        yield


def run(config: TrainConfig, world_size: int, rank: int, stage: str, is_real: bool) -> dict[str, Any]:
    """Build the rank and train one micro-batch; sizes in GB."""
    from megatron_dllm.model.objective import objective_of
    from megatron_dllm.model.pipeline import run_schedule
    from megatron_dllm.parallel.fake_world import fake_world
    from megatron_dllm.planning.engine import roles_of_ranks
    from megatron_dllm.planning.engine_memory import LiveMemory
    from megatron_dllm.planning.engine_rows import micro_batches
    from megatron_dllm.training.engine import build_chunks
    from megatron_dllm.training.loop import embedding_noise

    chosen = config.schedule.stages[stage]
    batches, memory, started = micro_batches(config, chosen, 1), LiveMemory(), time.perf_counter()
    with fake_world(config.parallel, rank, world_size) as groups:
        with _tensors(is_real, config, memory, roles_of_ranks(batches, groups)):
            chunks = build_chunks(config, groups, is_training=True)
            built, held = time.perf_counter(), memory.live
            memory.start_peak()
            objective, noise = objective_of(chosen, config.noise), embedding_noise(config, 0)
            device = torch.device("cpu")
            run_schedule(chunks, batches, device, groups, objective, noise=noise)
        parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    return dict(
        parameters_e9=parameters / 1e9,
        weights=held / 1e9,
        peak=memory.peak / 1e9,
        build_s=round(built - started, 1),
        step_s=round(time.perf_counter() - built, 1),
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print and write the row; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="of train: experiment=NAME key=value ...")
    parser.add_argument("--world_size", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--stage", required=True, help="of the schedule")
    parser.add_argument("--output", type=Path, default=RESULTS / "real_rank", help="without suffix; rows are added")
    args = parser.parse_args(arguments)
    prepare_host()
    from megatron_dllm.planning.engine import stage_of

    config = compose_train_config(args.words)
    config = replace(config, parallel=config.layout_of(stage_of(config, args.stage)))
    config.parallel.validate(args.world_size, config.model)
    found = {kind: run(config, args.world_size, args.rank, args.stage, kind == "measured") for kind in KINDS}
    row = dict(model=config.run.name, stage=args.stage, rank=args.rank, ranks=args.world_size)
    row |= {name: round(found["measured"][name], 3) for name in ("parameters_e9", "weights")}
    row |= {f"{kind}_peak": round(found[kind]["peak"], 3) for kind in KINDS}
    row |= dict(resident=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 1))
    row |= {name: found["measured"][name] for name in ("build_s", "step_s")}
    print(row, flush=True)
    old = args.output.with_suffix(".json")
    rows = json.loads(old.read_text(encoding="utf-8"))["rows"] if old.exists() else []
    write_results(args.output, "One real rank of a large model", machine(), {"rows": [*rows, row]}, NOTE)
    return 0


if __name__ == "__main__":
    run_command(main)
