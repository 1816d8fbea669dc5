"""The demo's pipeline on the device, shortened: text, an AR base, its conversion, export and decoded text.

Every step is the product's command with the demo's recipes (`recipes/chain/tiny_demo.yaml`), a process of its own. Left
out are the tools between, which use no GPU: the conversion starts from the base run itself, and no merge is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu.checks import Check, Found, NotHere, run_checks
from benchmarks.gpu.commands import run_command
from benchmarks.gpu.golden import read_steps
from benchmarks.gpu.settings import Settings
from megatron_dllm.config.recipe_source import RECIPES

# Document tokens of the AR base and of each stage of the conversion: some dozen steps, and three or so.
BASE_TOKENS, STAGE_TOKENS = 160_000, 6_000
SMALL_BASE_TOKENS, SMALL_STAGE_TOKENS = 24_000, 4_200
STAGES = ("warmup_1", "warmup_4", "warmup_32", "warmup_64", "stable", "decay_128", "decay_32")
LEFT_OUT_OF_SMALL = ("warmup_4", "warmup_32", "warmup_64", "decay_128")
# Nats by which the base's loss falls at the least.
LEAST_GAIN, SMALL_LEAST_GAIN = 1.0, 0.1


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """One row for each command, the value its wall seconds or its loss; after a failed one the others are skipped."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    checks: dict[str, Check] = {name: partial(_after, failed, check) for name, check in _steps(settings).items()}
    for row in run_checks(settings, checks):
        if row["status"] == "failed":
            failed.append(row["check"])
        yield row


def _after(failed: list[str], check: Check) -> Found:
    """The check, unless one before it has failed."""
    if failed:
        raise NotHere(f"{failed[0]} failed")
    return check()


def _steps(settings: Settings) -> dict[str, Check]:
    """The pipeline, command by command."""
    folder = settings.folder
    corpus, tokenizer = folder / "corpus", folder / "corpus" / "tokenizer"
    texts = ("--output", corpus, "--vocab_size", 4096, "--max_bytes", 600_000 if settings.is_small else 6_000_000)
    steps: dict[str, Check] = {"text": _command(settings, "text", "megatron_dllm.data.stdlib_corpus", *texts)}
    for name in ("train", "validation"):
        words = ("--input", corpus / f"{name}.jsonl", "--tokenizer", tokenizer, "--output", corpus / name)
        steps[f"tokenize, {name}"] = _command(settings, f"tokenize_{name}", "megatron_dllm.data.tokenize", *words)
    steps["AR base"] = partial(_train, settings, "base", _base_words(settings))
    steps["conversion"] = partial(_train, settings, "convert", _convert_words(settings))
    export = ("--checkpoint", folder / "convert", "--output", folder / "hf", "--dtype", "fp32")
    steps["export"] = _command(settings, "export", "checkpoints_tools.mcore_to_hf", *export)
    steps["decode"] = partial(_decode, settings)
    return steps


def _command(settings: Settings, name: str, *words: object) -> Check:
    """A command whose value is its wall seconds."""

    def check() -> Found:
        return Found(run_command(settings, settings.folder / f"{name}.log", words), None, "wall seconds")

    return check


def _train(settings: Settings, name: str, words: list[str]) -> Found:
    """Train a run; the value is its last loss."""
    folder = settings.folder
    shared = [
        f"run.root={folder}",
        f"run.name={name}",
        f"data.train={folder / 'corpus' / 'train'}",
        f"data.validation={folder / 'corpus' / 'validation'}",
        f"data.tokenizer={folder / 'corpus' / 'tokenizer'}",
        "evaluation.num_tokens=3000",
        "logging.interval_steps=1",
        "logging.tensorboard=false",
    ]
    seconds = run_command(settings, folder / f"{name}.log", ["megatron_dllm.train", *words, *shared])
    steps = read_steps(folder / name)
    losses = [step["loss"] for step in steps]
    assert all(map(math.isfinite, losses)), f"losses that are not finite: {losses}"
    if name == "base":
        least = SMALL_LEAST_GAIN if settings.is_small else LEAST_GAIN
        assert losses[0] - losses[-1] > least, f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} alone"
    speed = max(step["tokens_per_second"] for step in steps)
    columns = {"steps": len(steps), "first_loss": losses[0], "best_tokens_per_second": speed}
    return Found(losses[-1], None, f"last loss; {seconds:.0f} s in all", columns)


def _base_words(settings: Settings) -> list[str]:
    tokens = SMALL_BASE_TOKENS if settings.is_small else BASE_TOKENS
    stage = "schedule.stages.ar"
    return ["experiment=tiny_base", f"{stage}.num_tokens={tokens}", f"{stage}.lr_warmup_tokens={tokens // 10}"]


def _convert_words(settings: Settings) -> list[str]:
    """The conversion from the base, through all of its stages; a small one leaves out some."""
    tokens = SMALL_STAGE_TOKENS if settings.is_small else STAGE_TOKENS
    left_out = LEFT_OUT_OF_SMALL if settings.is_small else ()
    words = ["experiment=tiny_convert", f"checkpoint.load={settings.folder / 'base'}"]
    words += [f"schedule.stages.{stage}.num_tokens={tokens}" for stage in STAGES if stage not in left_out]
    words += [f"~schedule.stages.{stage}" for stage in left_out]
    words += ["schedule.stages.warmup_1.lr_warmup_tokens=1000", "evaluation.block_sizes=[32]"]
    return words


def _decode(settings: Settings) -> Found:
    """Decode the demo's prompts together with the exported model; the value is tokens per second, without loading."""
    output = settings.folder / "samples.jsonl"
    words = [
        "megatron_dllm.generate",
        f"checkpoint={settings.folder / 'hf'}",
        f"prompts_file={RECIPES / 'prompts' / 'python.jsonl'}",
        f"output={output}",
        "block_size=32",
        f"max_new_tokens={32 if settings.is_small else 128}",
    ]
    run_command(settings, settings.folder / "decode.log", words)
    texts = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    tokens, seconds = sum(text["num_generated_tokens"] for text in texts), max(text["seconds"] for text in texts)
    assert tokens, "no token was decoded"
    return Found(tokens / seconds, None, f"{tokens} tokens of {len(texts)} texts", {"sample": texts[0]["text"][:80]})
