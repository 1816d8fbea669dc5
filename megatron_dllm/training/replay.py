"""The batch of a step that was not applied: written out, and run again row by row to see which rows are to blame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.model.objective import Objective
from megatron_dllm.model.pipeline import EmbeddingNoise, asked_by
from megatron_dllm.parallel.agreement import failing_together
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.run.files import remove, write_json
from megatron_dllm.run.names import REPLAY


def dump_step(
    run_folder: Path,
    step: int,
    micro_batches: Sequence[Batch],
    record: dict[str, Any],
    groups: Groups,
    write: Callable[[dict[str, Any], str], None] = save_file,
) -> Path:
    """Write every micro-batch of a step (ids, masks, noise levels, sample ids) and what is known about it.

    A collective: what an earlier start left of the step is gone before, and all is written when it returns. Ranks
    that hold the same rows write them once.

    Args:
        run_folder: folder of the run.
        step: optimizer steps done before this one.
        micro_batches: of this data-parallel rank, before they are split over context-parallel ranks.
        record: configuration, stage, reason and sums, for step.json.
        groups: of this rank.
        write: of tensors by name, and a path.
    """
    folder = run_folder / REPLAY / f"step_{step:07d}"
    with failing_together():
        if dist.get_rank() == 0:
            remove(folder)
            folder.mkdir(parents=True)
            write_json(folder / "step.json", {"step": step, "data_parallel_size": groups.data.size(), **record})
    with failing_together():
        if not any(group.rank() for group in (groups.tensor, groups.pipeline, groups.context)):
            tensors = {
                f"{index}.{item.name}": getattr(batch, item.name).cpu().contiguous()
                for index, batch in enumerate(micro_batches)
                for item in fields(Batch)
            }
            write(tensors, str(folder / f"data_{groups.data.rank():05d}.safetensors"))
    return folder


def load_step(folder: Path) -> list[list[Batch]]:
    """The micro-batches that `dump_step` wrote, by data-parallel rank.

    Raises:
        ValueError: the folder holds none, or not every rank's, or an earlier version wrote them.
    """
    files = sorted(folder.glob("data_*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no batch (data_*.safetensors); name a folder RUN/replay/step_N.")
    size = read_json(folder / "step.json")["data_parallel_size"]
    if len(files) != size:
        raise ValueError(
            f"{folder} holds the rows of {len(files)} data-parallel ranks instead of {size}: the run was "
            "ended while it wrote them, or files were moved; the step's gradient needs them all."
        )
    ranks = []
    for file in files:
        tensors: dict[str, Tensor] = load_file(str(file))
        _check_fields(file, tensors)
        count = 1 + max(int(name.split(".")[0]) for name in tensors)
        ranks.append(
            [Batch(**{item.name: tensors[f"{index}.{item.name}"] for item in fields(Batch)}) for index in range(count)]
        )
    return ranks


def _check_fields(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file of tensors [...] without what batches hold by now; other versions knew less of a token."""
    missing = sorted({item.name for item in fields(Batch)} - {name.split(".", 1)[1] for name in tensors})
    if missing:
        raise ValueError(
            f"{file} holds no {', '.join(missing)}, which batches have by now: an earlier version wrote it; replay "
            "the step with that version (the run's starts.jsonl names the commit)."
        )


@dataclass(frozen=True)
class RowReplay:
    """What one row did: its share of the step's loss and gradient (the shares of all rows add up to the step's).

    `first_bad` names the first module whose output was not finite, if any.
    """

    data_rank: int
    micro_batch: int
    row: int
    sample_ids: list[int]
    num_targets: int
    t_min: float
    t_max: float
    loss: float
    grad_norm: float
    first_bad: str

    @property
    def badness(self) -> float:
        """Gradient norm, infinite where anything is not finite: what rows are sorted by."""
        return self.grad_norm if math.isfinite(self.grad_norm) and math.isfinite(self.loss) else math.inf


@dataclass(frozen=True)
class StepReplay:
    """All rows, worst first, and the loss and gradient norm of the whole step."""

    rows: list[RowReplay]
    loss: float
    grad_norm: float


def replay_step(
    model: nn.Module, ranks: list[list[Batch]], objective: Objective, noise: EmbeddingNoise, device: torch.device
) -> StepReplay:
    """Forward and backward of every row by itself.

    Args:
        model: whole, on this one rank, with gradients.
        ranks: micro-batches by data-parallel rank.
        objective: of the step.
        noise: on masked embeddings, as in the step.
        device: where the model is.
    """
    denominator = max(sum(int(objective.count(batch)) for rank in ranks for batch in rank), 1)
    config: Any = model.config
    num_layers = int(config.num_layers)
    total: dict[str, Tensor] = {}
    rows = []
    for data_rank, batches in enumerate(ranks):
        for index, batch in enumerate(batches):
            for row, single in enumerate(batch.split_rows()):
                model.zero_grad(set_to_none=True)
                with _first_bad_module(model) as bad:
                    local = single.to(device)
                    outputs = model(
                        local,
                        mask_noise_sigma=noise.sigma,
                        noise_seed=noise.seed,
                        entropy_temperature=objective.entropy_temperature,
                        asked=asked_by(objective, num_layers, device),
                        opening=objective.opening,
                    )
                    loss = objective.loss(local, outputs).total / denominator
                torch.autograd.backward(loss)
                rows.append(
                    _row_replay(
                        single, (data_rank, index, row), loss.item(), _gradient_norm(model, total), next(iter(bad), "")
                    )
                )
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in total.values()))
    rows.sort(key=lambda row: row.badness, reverse=True)
    return StepReplay(rows, sum(row.loss for row in rows), norm)


def _row_replay(batch: Batch, place: tuple[int, int, int], loss: float, grad_norm: float, bad: str) -> RowReplay:
    t = batch.target_t
    low, high = (float(t.min()), float(t.max())) if t.numel() else (0.0, 0.0)
    return RowReplay(
        *place,
        sample_ids=batch.sample_ids.tolist(),
        num_targets=t.numel(),
        t_min=low,
        t_max=high,
        loss=loss,
        grad_norm=grad_norm,
        first_bad=bad,
    )


def _gradient_norm(model: nn.Module, total: dict[str, Tensor]) -> float:
    """Norm of the gradients, which are added to `total`."""
    square = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            square += float(gradient.double().square().sum())
            total[name] = total[name] + gradient if name in total else gradient.clone()
    return math.sqrt(square) if square >= 0 else math.nan


@contextmanager
def _first_bad_module(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, innermost first."""
    bad: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def look(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            output = output.nll if isinstance(output, TargetOutputs) else output
            tensors = output if isinstance(output, tuple | list) else (output,)
            if any(isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors):
                bad.append(name or "the loss")

        handles.append(module.register_forward_hook(look))
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()
