"""The golden run: what the tiny model's training came to when it was last recorded, step by step, in several layouts.

    python -m tests.golden.golden_run [--write]

A change that should move no number leaves `golden_run.txt` as it is; one that should says why and records it anew with
--write. One run of four stages (AR, one noisy view, MDLM, two views) in each layout. Losses, norms and weights are
compared to the last digit on a machine like the one that recorded them (its name stands in the file), elsewhere to
rounding; the samples, masks and noise levels must be equal everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import (
    CONTEXT_LENGTH,
    ROW_LENGTH,
    TRAINING,
    checkpoints_of,
    read_metrics,
    read_tensors,
    run_config,
    train_here,
    write_corpus,
)
from megatron_dllm.config import CheckpointConfig, ParallelConfig, ScheduleConfig, StageConfig, TrainConfig

RECORD = Path(__file__).with_name("golden_run.txt")
# Relative difference of losses and norms that another machine's rounding explains after some twenty steps.
TOLERANCE = 1e-4

# Layouts whose names end so have a router bias that stands still: only then may the last layer leave tokens out.
SKIPPING = "_skipping"
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one_rank": (1, ParallelConfig()),
    "one_rank_skipping": (1, ParallelConfig()),
    "one_rank_recompute": (1, ParallelConfig(recompute="full")),
    "dp2": (2, ParallelConfig()),
    "tp2_ep2": (
        2,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
    ),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "cp2": (2, ParallelConfig(context_parallel_size=2)),
    "cp2_skipping": (2, ParallelConfig(context_parallel_size=2)),
}

_STAGE = StageConfig(block_size=4, num_tokens=600, global_batch_size=4, learning_rate=3e-3)
STAGES = {
    "ar": replace(_STAGE, objective="ar", block_size=1, lr_warmup_tokens=300),
    "one_view": replace(_STAGE, lr_shape="linear", final_learning_rate=1e-3),
    "mdlm": replace(_STAGE, block_size=CONTEXT_LENGTH, num_tokens=1200),
    "two_views": replace(_STAGE, block_size=8, num_views=2, view_relation="complementary", t_min=0.001, t_max=0.999),
}


@dataclass(frozen=True)
class Step:
    """One optimizer step as it was logged; numbers keep all their digits."""

    stage: str
    loss: float
    grad_norm: float
    fingerprint: str


@dataclass(frozen=True)
class Golden:
    """One layout's run: its steps, and the SHA-256 of all weights and moments of its last checkpoint."""

    steps: list[Step]
    weights: str

    def lines(self) -> list[str]:
        """As text, one line a step."""
        return [
            f"{step.stage:<10} {step.loss!r:<22} {step.grad_norm!r:<22} {step.fingerprint}" for step in self.steps
        ] + [f"weights    {self.weights}"]


def golden_config(folder: Path, name: str, layout: ParallelConfig) -> TrainConfig:
    """The run of one layout."""
    training = replace(TRAINING, moe_router_bias_update_rate=0.0) if name.endswith(SKIPPING) else TRAINING
    return run_config(
        folder,
        name,
        layout,
        training=training,
        checkpoint=CheckpointConfig(keep_last=1, timeout_minutes=10.0),
        schedule=ScheduleConfig(context_length=CONTEXT_LENGTH, row_length=ROW_LENGTH, stages=dict(STAGES)),
    )


def train_layout(folder: Path, name: str) -> Golden:
    """Train one layout in a folder that holds the corpus."""
    world_size, layout = LAYOUTS[name]
    config = golden_config(folder, name, layout)
    assert run_ranks(train_here, world_size, config, timeout_s=500.0) == [0] * world_size
    steps = [
        Step(r["stage"], r["loss"], r["grad_norm"], r["data_fingerprint"]) for r in read_metrics(config) if "loss" in r
    ]
    return Golden(steps, weights_hash(max(checkpoints_of(config).glob("step_*"))))


def weights_hash(checkpoint: Path) -> str:
    """SHA-256 of names, types, shapes and bytes of every tensor of a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(checkpoint).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def machine() -> str:
    """What decides how sums are rounded: the processor's kind, its vector unit and torch's version."""
    model = (
        next(
            (
                line.split(":", 1)[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.machine(),
        )
        if Path("/proc/cpuinfo").exists()
        else ""
    )
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def read_record() -> tuple[str, dict[str, Golden]]:
    """The machine that recorded, and each layout's run."""
    layouts: dict[str, Golden] = {}
    recorded_on = name = ""
    steps: list[Step] = []
    for line in RECORD.read_text(encoding="utf-8").splitlines():
        key, *values = line.split()
        if key == "machine":
            recorded_on = line.removeprefix("machine").strip()
        elif key == "layout":
            name, steps = values[0], []
        elif key == "weights":
            layouts[name] = Golden(steps, values[0])
        else:
            steps.append(Step(key, float(values[0]), float(values[1]), values[2]))
    return recorded_on, layouts


def differences(found: Golden, expected: Golden, is_exact: bool) -> list[str]:
    """What differs, a line each; weights are compared only where rounding is the same."""
    if len(found.steps) != len(expected.steps):
        return [f"{len(found.steps)} steps instead of {len(expected.steps)}"]
    problems = []
    for index, (mine, theirs) in enumerate(zip(found.steps, expected.steps, strict=True)):
        for name in ("stage", "fingerprint"):
            if getattr(mine, name) != getattr(theirs, name):
                problems.append(f"step {index}: {name} {getattr(mine, name)} instead of {getattr(theirs, name)}")
        for name in ("loss", "grad_norm"):
            value, wanted = getattr(mine, name), getattr(theirs, name)
            if abs(value - wanted) > (0.0 if is_exact else TOLERANCE * abs(wanted)):
                problems.append(f"step {index} ({mine.stage}): {name} {value!r} instead of {wanted!r}")
    if is_exact and found.weights != expected.weights:
        problems.append(f"weights {found.weights} instead of {expected.weights}")
    return problems


def main() -> int:
    """Command line: compare, or record anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what comes out instead of comparing it")
    arguments: Any = parser.parse_args()
    found: dict[str, Golden] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus")
        for name in LAYOUTS:
            found[name] = train_layout(Path(folder), name)
            print(f"{name}: {len(found[name].steps)} steps", flush=True)
    if arguments.write:
        lines = [f"machine {machine()}"]
        for name, golden in found.items():
            lines += [f"layout {name}", *golden.lines()]
        RECORD.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return 0
    recorded_on, expected = read_record()
    problems = [
        f"{name}: {problem}"
        for name, golden in found.items()
        for problem in differences(golden, expected[name], machine() == recorded_on)
    ]
    print("\n".join(problems) or "equal" + ("" if machine() == recorded_on else " to rounding (another machine)"))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
