"""Twenty steps of the tiny model whose losses a CPU has recorded, and the run that repeats them.

    python -m benchmarks.gpu.golden            # records golden.json anew, on a CPU

The run goes through the product: random weights, converted, trained by the shipped recipe of the demo's conversion
through all of its seven stages, shortened. Nothing in it depends on Python's version or on the device: no dropout, a
corpus and weights drawn on the CPU, noise that is a function of the tokens.

There are two models. In one the router chooses, as in the recipe: a token whose experts score alike to a millionth goes
elsewhere on another device, and where its loss weight of 1/t is large, that moves a step's loss by a ten-thousandth (on
one CPU, weights that were off by 1e-6 moved it by 7e-5 and a gradient norm by 4e-4). In the other every token goes to
every expert; the same weights moved loss and norm by 3e-7 at most, so a device that differs by more than 1e-5 there
computes something else.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.commands import run_command
from benchmarks.gpu.settings import Settings
from benchmarks.record import machine
from benchmarks.synthetic import write_synthetic
from benchmarks.tiny_run import write_corpus
from checkpoints_tools import hf_to_mcore
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
# All 16, in groups of two as the routing of groups wants it.
EVERY_EXPERT = {"moe_router_topk": 16, "moe_router_num_groups": 8, "moe_router_group_topk": 8}


def write_start(settings: Settings) -> None:
    """The corpus, and for both models a checkpoint of random weights, in the part's folder."""
    folder = settings.folder
    write_corpus(folder / "corpus", 300, median=120, longest=900)
    sizes = yaml.safe_load((RECIPES / "model" / "tiny_moe.yaml").read_text(encoding="utf-8"))
    for is_choosing in (True, False):
        start = _start(folder, is_choosing)
        model = replace(ModelConfig(**sizes), **({} if is_choosing else EVERY_EXPERT))
        write_synthetic(start.with_name(f"{start.name}_hf"), model, dtype=torch.float32)
        hf_to_mcore.convert(start.with_name(f"{start.name}_hf"), start)


def _start(folder: Path, is_choosing: bool) -> Path:
    return folder / ("start" if is_choosing else "start_every_expert")


def train(settings: Settings, name: str, is_choosing: bool, changes: Sequence[str] = ()) -> Path:
    """The run, or what is left of it; returns its folder.

    Args:
        settings: of the part.
        name: of the run.
        is_choosing: whether the router chooses, or takes every expert.
        changes: `key=value` words.
    """
    folder = settings.folder
    words = [
        "megatron_dllm.train",
        "experiment=tiny_convert",
        f"run.root={folder}",
        f"run.name={name}",
        f"checkpoint.load={_start(folder, is_choosing)}",
        f"data.train={folder / 'corpus'}",
        "data.validation=null",
        "data.tokenizer=null",
        "evaluation.num_tokens=0",
        "checkpoint.save_interval_tokens=0",
        "checkpoint.keep_last=9",
        "logging.interval_steps=1",
        "logging.tensorboard=false",
        "schedule.stages.warmup_1.lr_warmup_tokens=3000",
        *model_words(is_choosing),
        *stage_words(settings.is_small),
        *changes,
    ]
    run_command(settings, folder / f"{name}.log", words)
    return folder / name


def model_words(is_choosing: bool) -> list[str]:
    """What the recipe's model is changed by."""
    return [] if is_choosing else [f"model.{name}={value}" for name, value in EVERY_EXPERT.items()]


def stage_words(is_small: bool) -> list[str]:
    """The stages of the recipe, shortened; a small run leaves out the later ones."""
    kept = list(STAGES)[:NUM_SMALL] if is_small else list(STAGES)
    lengths = [f"schedule.stages.{stage}.num_tokens={STAGES[stage]}" for stage in kept]
    return lengths + [f"~schedule.stages.{stage}" for stage in STAGES if stage not in kept]


def read_steps(run: Path) -> list[dict[str, Any]]:
    """The run's records of steps."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def recorded_steps(is_choosing: bool) -> list[dict[str, Any]]:
    """What the CPU recorded of one of the models."""
    steps: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))[_name(is_choosing)]
    return steps


def _name(is_choosing: bool) -> str:
    return "chosen experts" if is_choosing else "every expert"


def main() -> None:
    """Record the runs of this CPU."""
    record: dict[str, Any] = {"about": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings("cpu", False, Path(temporary), 1200.0)
        write_start(settings)
        for is_choosing in (True, False):
            steps = read_steps(train(settings, f"run_{is_choosing}", is_choosing))
            record[_name(is_choosing)] = [{name: step[name] for name in RECORDED} for step in steps]
    write_json(RECORD, record, indent=1)


if __name__ == "__main__":
    main()
