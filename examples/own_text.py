"""Train a tiny block-diffusion model on your own text, and watch the loss fall.

    python -m examples.own_text [FILE ...] [--num_tokens 64000] [--output runs/own_text] [key=value ...]

Trains a tokenizer on the text files (this project's own pages if you name none), tokenizes them, trains the model of
recipes/experiment/own_text.yaml on one CPU rank, and prints the mean loss of every eight steps. Words with an = change
the recipe (schedule.stages.convert.learning_rate=1e-3). Name another --output to start again. Takes under a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from rich.console import Console

from examples.corpus import ROOT, documents_of, make_corpus


def command(overrides: list[str]) -> list[str]:
    """The training command, on one rank; run it with more, or with torchrun on a GPU, the same way."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    return [*launcher, "-m", "megatron_dllm.train", "experiment=own_text", *overrides]


def mean_losses(metrics: Path, num_steps: int = 8) -> list[tuple[int, float, float]]:
    """Last step, mean loss in nats per token and mean share of masked tokens guessed right, of every few steps.

    The loss of one step varies a lot: a block with few masked tokens weighs them by 1/t.
    """
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record]
    groups = [steps[start : start + num_steps] for start in range(0, len(steps), num_steps)]
    return [
        (group[-1]["step"], fmean(r["loss"] for r in group), fmean(r["masked_accuracy"] for r in group))
        for group in groups
    ]


def main(words: list[str] | None = None) -> int:
    """Prepare, train, print; returns training's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="text files, each a document; and key=value")
    parser.add_argument("--num_tokens", type=int, default=64000, help="document tokens to train on")
    parser.add_argument("--output", type=Path, default=Path("runs/own_text"), help="run folder")
    arguments = parser.parse_args(words)
    files = [Path(word).resolve() for word in arguments.words if "=" not in word]
    output = arguments.output.resolve()
    overrides = [
        *make_corpus(documents_of(files), output.parent / f"{output.name}_corpus"),
        f"run.root={output.parent}",
        f"run.name={output.name}",
        f"schedule.stages.convert.num_tokens={arguments.num_tokens}",
        *(word for word in arguments.words if "=" in word),
    ]
    done = subprocess.run(command(overrides), cwd=ROOT, check=False)
    if done.returncode == 0:
        console = Console()
        for step, loss, accuracy in mean_losses(output / "metrics.jsonl"):
            console.print(f"step {step:4d}   loss {loss:6.3f} nats per token   masked tokens right {accuracy:5.1%}")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
