"""Twenty steps of the tiny model whose losses a CPU has recorded, and the run that repeats them.

    python -m benchmarks.gpu.golden            # records golden.json anew, on a CPU

The run goes through the product: random weights in a Hugging Face folder, converted, trained by the shipped recipe of
the demo's conversion through all of its seven stages, shortened. Nothing in it depends on Python's version or on the
device: no dropout, a corpus and weights drawn on the CPU, noise that is a function of the tokens. On one CPU other
attention backends and recomputation moved loss and gradient norm by 1e-7 at most over all steps, so no token sits
between two experts, and a device that differs by more than 1e-5 computes something else.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.commands import run_command
from benchmarks.gpu.settings import Settings
from benchmarks.record import machine
from benchmarks.synthetic import write_synthetic
from benchmarks.tiny_run import write_corpus
from megatron_dllm.config import ModelConfig
from megatron_dllm.config.recipe_source import RECIPES
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import METRICS

RECORD = Path(__file__).with_name("golden.json")
RECORDED = ("step", "stage", "loss", "grad_norm", "data_fingerprint")
# Document tokens of each stage of the recipe, three steps or so; a small run does the first ones.
STAGES = {
    "warmup_1": 6300,
    "warmup_4": 6300,
    "warmup_32": 6300,
    "warmup_64": 6300,
    "stable": 6300,
    "decay_128": 6300,
    "decay_32": 8300,
}
NUM_SMALL = 2


def write_start(settings: Settings) -> None:
    """The corpus, and the checkpoint `start` of random weights, in the part's folder."""
    folder = settings.folder
    write_corpus(folder / "corpus", 300, median=120, longest=900)
    sizes = yaml.safe_load((RECIPES / "model" / "tiny_moe.yaml").read_text(encoding="utf-8"))
    write_synthetic(folder / "random_hf", ModelConfig(**sizes), dtype=torch.float32)
    words = ("checkpoints_tools.hf_to_mcore", "--hf", folder / "random_hf", "--output", folder / "start")
    run_command(settings, folder / "start.log", words, device="cpu")


def train(settings: Settings, name: str, changes: Sequence[str] = ()) -> Path:
    """The run, or what is left of it; returns its folder.

    Args:
        settings: of the part.
        name: of the run.
        changes: `key=value` words.
    """
    folder = settings.folder
    words = [
        "megatron_dllm.train",
        "experiment=tiny_convert",
        f"run.root={folder}",
        f"run.name={name}",
        f"checkpoint.load={folder / 'start'}",
        f"data.train={folder / 'corpus'}",
        "data.validation=null",
        "data.tokenizer=null",
        "evaluation.num_tokens=0",
        "checkpoint.save_interval_tokens=0",
        "checkpoint.keep_last=9",
        "logging.interval_steps=1",
        "logging.tensorboard=false",
        "schedule.stages.warmup_1.lr_warmup_tokens=3000",
        *stage_words(settings.is_small),
        *changes,
    ]
    run_command(settings, folder / f"{name}.log", words)
    return folder / name


def stage_words(is_small: bool) -> list[str]:
    """The stages of the recipe, shortened; a small run leaves out the later ones."""
    kept = list(STAGES)[:NUM_SMALL] if is_small else list(STAGES)
    lengths = [f"schedule.stages.{stage}.num_tokens={STAGES[stage]}" for stage in kept]
    return lengths + [f"~schedule.stages.{stage}" for stage in STAGES if stage not in kept]


def read_steps(run: Path) -> list[dict[str, Any]]:
    """The run's records of steps."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def recorded_steps() -> list[dict[str, Any]]:
    """What the CPU recorded."""
    steps: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["steps"]
    return steps


def main() -> None:
    """Record the run of this CPU."""
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings("cpu", False, Path(temporary), 1200.0)
        write_start(settings)
        steps = [{name: step[name] for name in RECORDED} for step in read_steps(train(settings, "fp32"))]
    write_json(RECORD, {"about": machine(), "steps": steps}, indent=1)


if __name__ == "__main__":
    main()
