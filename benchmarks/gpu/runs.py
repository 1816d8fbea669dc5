"""Runs of the tiny model on the device: recorded losses, a resume, and an export that decodes as on the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.checks import Check, Found, NotHere
from benchmarks.gpu.commands import run_command
from benchmarks.gpu.golden import read_steps, recorded_steps, train, write_start
from benchmarks.gpu.settings import Settings
from benchmarks.tiny_run import read_tensors
from megatron_dllm.data.stdlib_corpus import save_tokenizer, train_tokenizer
from megatron_dllm.run.code_version import ROOT
from megatron_dllm.run.names import CHECKPOINTS
from megatron_dllm.training.observers.metrics_file import depends_on_machine

# Relative differences of loss and gradient norm from the CPU's in fp32: of the model without a choice of experts in
# fp32, of the other one in bf16, where the CPU's own differ by 4e-4 and 1.4e-2 at most; five times that.
LIMITS = {"fp32": {"loss": 1e-5, "grad_norm": 1e-5}, "bf16": {"loss": 2e-3, "grad_norm": 7e-2}}
# Steps that a resumed run repeats at the least.
REPEATED_STEPS = 3
PROMPTS = ("def read(path):\n    ", "import os\n", "class Stack:\n    def push(self, item):", "# Copyright (c) 2001")


def start_check(settings: Settings) -> dict[str, Check]:
    """What all of these runs begin with."""
    return {"corpus and weights of the runs": partial(_start, settings)}


def run_chains(settings: Settings) -> list[dict[str, Check]]:
    """Chains of checks that do not wait for each other; inside a chain each uses the folders of those before it."""
    return [
        {
            "golden run, fp32": partial(golden, settings, "fp32"),
            "export decodes as on the CPU": partial(export_decodes, settings),
            "resume, fastest operations": partial(resume_by_default, settings),
        },
        {"resume, run.is_deterministic": partial(resume_exactly, settings)},
        {"golden run, bf16": partial(golden, settings, "bf16")},
    ]


def _start(settings: Settings) -> Found:
    write_start(settings)
    return Found("written")


def golden(settings: Settings, precision: str) -> Found:
    """Train the recorded steps; the value is the largest difference of a loss, over what it may be.

    Samples, masks and noise levels must be the CPU's to the bit. Where the time ends the run, the steps that it has
    done are compared.
    """
    is_choosing, is_whole = precision != "fp32", True
    try:
        train(settings, precision, is_choosing, [f"parallel.precision={precision}"])
    except TimeoutError:
        is_whole = False
    steps, expected = read_steps(settings.folder / precision), recorded_steps(is_choosing)
    if not steps:
        raise NotHere("no step was done in time")
    if is_whole and not settings.is_small and len(steps) != len(expected):
        raise AssertionError(f"{len(steps)} steps instead of {len(expected)}")
    pairs = list(zip(steps, expected, strict=False))
    other = [step["step"] for step, want in pairs if step["data_fingerprint"] != want["data_fingerprint"]]
    if other:
        raise AssertionError(f"the samples, masks or noise levels of steps {other} are not those of the CPU")
    found = compare_steps(pairs, LIMITS[precision])
    return found if is_whole else replace(found, why=f"the time ended after {len(steps)} steps; {found.why}")


def compare_steps(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], limits: Mapping[str, float]) -> Found:
    """The largest relative difference of a loss, or of a gradient norm if it alone is beyond its limit.

    Args:
        pairs: each step and what it should be.
        limits: of loss and grad_norm, in this order.
    """
    errors = {name: [abs(step[name] / want[name] - 1.0) for step, want in pairs] for name in limits}
    (loss, norm), places = (max(errors[name]) for name in limits), [step["stage"] for step, _ in pairs]
    columns = {"steps": len(pairs), "grad_norm": norm} | {
        f"errors of {name}": " ".join(f"{error:.0e}" for error in found) for name, found in errors.items()
    }
    over = [name for name, limit in limits.items() if not max(errors[name]) <= limit]
    place = errors["loss"].index(loss)
    why = f"largest: step {place + 1}, {places[place]}; gradient norm: {norm:.1e}, at most {limits['grad_norm']:.0e}"
    # The value is of the loss; where only the norm is over its limit, that is what fails.
    value, limit = (norm, limits["grad_norm"]) if over == ["grad_norm"] else (loss, limits["loss"])
    return Found(value, limit, why, columns)


def resume_exactly(settings: Settings) -> Found:
    """A short run with run.is_deterministic and its resume; the value counts the records and tensors that differ."""
    short, words = replace(settings, is_small=True), ("run.is_deterministic=true",)
    found = compare_resume(short, train(short, "exact", True, words), True, words)
    return replace(found, limit=0)


def resume_by_default(settings: Settings) -> Found:
    """The same of the golden run, whose operations are those that are fastest: recorded, without a limit."""
    return compare_resume(settings, _golden_run(settings), False, ())


def compare_resume(settings: Settings, whole: Path, is_choosing: bool, words: Sequence[str]) -> Found:
    """Go on from an earlier checkpoint of a run, in a copy of its folder; counts the records and tensors that differ.

    Args:
        settings: of the part.
        whole: folder of the run.
        is_choosing: which model it trains.
        words: that it was started with.
    """
    last = read_steps(whole)[-1]["step"]
    copy = whole.with_name(f"{whole.name}_resumed")
    shutil.copytree(whole, copy)
    step = _forget_after(copy / CHECKPOINTS, last - REPEATED_STEPS)
    train(settings, copy.name, is_choosing, words)
    records = [_comparable(run, step) for run in (copy, whole)]
    assert len(records[0]) == len(records[1]) == last - step, "the resumed run has other steps"
    tensors = [read_tensors(max((run / CHECKPOINTS).glob("step_*"))) for run in (copy, whole)]
    steps = [got["step"] for got, want in zip(*records, strict=True) if got != want]
    (error, name), different = differing_tensors(tensors[0], tensors[1])
    why = f"steps {step + 1} to {last} again; {len(tensors[0])} tensors"
    if steps or different:
        loss = max(abs(got["loss"] / want["loss"] - 1.0) for got, want in zip(*records, strict=True))
        why += (
            f"; the records of steps {steps} differ, the loss by {loss:.1e}, and {len(different)} tensors, at most by "
            f"{error:.1e} ({name})"
        )
    return Found(len(steps) + len(different), None, why)


def _golden_run(settings: Settings) -> Path:
    """The folder of the run in fp32.

    Raises:
        NotHere: it was not trained, or not to its end.
    """
    run = settings.folder / "fp32"
    if not list((run / CHECKPOINTS).glob("step_*")):
        raise NotHere("the golden run has left no checkpoint")
    return run


def _forget_after(checkpoints: Path, step: int) -> int:
    """Delete the checkpoints of later steps; returns the step of the newest that is left."""
    for folder in checkpoints.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    newest = max(checkpoints.glob("step_*"))
    (checkpoints / "latest").write_text(newest.name + "\n", encoding="utf-8")
    return int(newest.name.removeprefix("step_"))


def _comparable(run: Path, after: int) -> list[dict[str, Any]]:
    """Records of the steps after that one, without what depends on the clock."""
    return [
        {name: value for name, value in record.items() if not depends_on_machine(name)}
        for record in read_steps(run)
        if record["step"] > after
    ]


def differing_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[tuple[float, str], list[str]]:
    """The largest relative difference with its name, and the names of all tensors [...] that differ in a bit."""
    assert got.keys() == expected.keys(), "other tensors"
    names = [name for name in got if not torch.equal(got[name], expected[name])]
    errors = [(_relative(got[name], expected[name]), name) for name in names]
    return max(errors, default=(0.0, "")), names


def _relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference of two tensors [...] over that of the second."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def export_decodes(settings: Settings) -> Found:
    """Export the golden run and decode prompts on the device and on the CPU; the value counts texts that differ."""
    run, folder = _golden_run(settings), settings.folder
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_dllm").glob("*.py"))]
    save_tokenizer(train_tokenizer(sources, 512), folder / "tokenizer")
    lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ("checkpoints_tools.mcore_to_hf", "--checkpoint", run, "--output", folder / "hf", "--dtype", "fp32")
    run_command(settings, folder / "export.log", words, device="cpu")
    decoded = {device: _decode(settings, device) for device in dict.fromkeys((settings.device, "cpu"))}
    expected = decoded["cpu"]
    wrong = [number for number, ids in enumerate(decoded[settings.device]) if ids != expected[number]]
    places = [_first_difference(decoded[settings.device][number], expected[number]) for number in wrong]
    why = f"texts {wrong} differ, first at tokens {places}" if wrong else f"{sum(map(len, expected))} tokens"
    return Found(len(wrong), 0, why)


def _decode(settings: Settings, device: str) -> list[list[int]]:
    """Token ids of every prompt's text."""
    folder = settings.folder
    output = folder / f"decoded_{device}.jsonl"
    words = [
        "megatron_dllm.generate",
        f"checkpoint={folder / 'hf'}",
        f"tokenizer={folder / 'tokenizer'}",
        f"prompts_file={folder / 'prompts.jsonl'}",
        f"output={output}",
        "precision=fp32",
        "max_new_tokens=32",
        "threshold=0.9",
    ]
    run_command(settings, folder / f"decode_{device}.log", words, device=device)
    return [json.loads(line)["generated_ids"] for line in output.read_text(encoding="utf-8").splitlines()]


def _first_difference(got: Sequence[int], expected: Sequence[int]) -> int:
    """Place of the first token that differs; the shorter length where one is the other's beginning."""
    length = min(len(got), len(expected))
    return next((place for place in range(length) if got[place] != expected[place]), length)
