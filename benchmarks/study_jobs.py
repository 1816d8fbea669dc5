"""The jobs of a study, one after the other: what is there is not repeated, and each says how long the rest takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.guided_runs import HELD_OUT_TOKENS, MEASURED_ROWS, TARGET
from benchmarks.ranks import run_ranks
from benchmarks.study_corpus import VALIDATION
from benchmarks.study_cost import mean_operations
from benchmarks.tiny_run import train_here
from megatron_dllm.checkpoint.validation import read_validation_file
from megatron_dllm.config import TrainConfig
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import METRICS

RESULT = "result.json"
# Operations a second where nothing has been measured yet: of a core that does nothing else, starts and validations
# included (an AR model of 40,000 tokens took 10 seconds of CPU for 8e10).
ASSUMED_RATE = 8e9
_LIMIT_S = 24 * 3600.0


@dataclass(frozen=True)
class Job:
    """A part of a study that leaves a file.

    Attributes:
        name: for people.
        result: file of what came of it.
        operations: floating-point operations, for the estimate of the time.
        measure: does it, or goes on with it; returns what the file is to hold.
    """

    name: str
    result: Path
    operations: float
    measure: Callable[[], Mapping[str, Any]]

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return self.result.is_file()


def run_jobs(jobs: Sequence[Job], after_each: Callable[[], None]) -> None:
    """Do what is missing, in order; each result has `operations` and `seconds` too.

    Args:
        jobs: of the study.
        after_each: called when a job's result is there, and once where all are there already.
    """
    _say(f"{len(jobs)} jobs, {sum(job.is_done for job in jobs)} of them done; {_rest(jobs)}")
    if all(job.is_done for job in jobs):
        after_each()
    for number, job in enumerate(jobs, 1):
        if job.is_done:
            continue
        _say(f"[{number}/{len(jobs)}] {job.name}: about {_time(job.operations / rate(jobs))}; {_rest(jobs)}")
        begun = time.perf_counter()
        found = job.measure()
        seconds = time.perf_counter() - begun
        write_json(job.result, {**found, "operations": job.operations, "seconds": seconds})
        after_each()


def rate(jobs: Sequence[Job]) -> float:
    """Operations a second of the jobs that are done; an assumed rate where none is."""
    done = [json.loads(job.result.read_text(encoding="utf-8")) for job in jobs if job.is_done]
    if not done:
        return ASSUMED_RATE
    return float(sum(result["operations"] for result in done) / sum(result["seconds"] for result in done))


def _rest(jobs: Sequence[Job]) -> str:
    left = sum(job.operations for job in jobs if not job.is_done) / rate(jobs)
    assumed = f"if a second does {ASSUMED_RATE:.0e} operations"
    return f"about {_time(left)} to the end, {'as the jobs before' if any(job.is_done for job in jobs) else assumed}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _say(text: str) -> None:
    print(text, flush=True)


def run(config: TrainConfig) -> None:
    """Train, or go on."""
    (code,) = run_ranks(train_here, 1, config, timeout_s=_LIMIT_S)
    assert code == 0, f"{config.run.name} ended with code {code}"


def command(module: str, *words: str) -> None:
    """A command of the program, in a process of its own."""
    (code,) = run_ranks(_main, 1, module, list(words), timeout_s=_LIMIT_S)
    assert code == 0, f"{module} ended with code {code}"


def held_out_nats(config: TrainConfig, *words: str) -> Mapping[str, float]:
    """What the end of a run is worth on held-out text, in nats per token: by block size, and under "ar" the exact NLL.

    Args:
        config: of the run.
        words: more of the settings of `megatron_dllm.evaluate`.
    """
    folder = Path(config.run.root) / config.run.name
    output = folder / "held_out.json"
    command(
        "megatron_dllm.evaluate",
        f"checkpoint.load={folder}",
        f"data.validation={folder.parent.parent / VALIDATION}",
        f"output={output}",
        f"evaluation.block_sizes=[{TARGET}]",
        f"evaluation.num_tokens={HELD_OUT_TOKENS}",
        f"evaluation.micro_batch_size={MEASURED_ROWS}",
        *words,
        "overwrite=true",
    )
    return read_validation_file(output).nats_per_token


def _main(module: str, words: list[str]) -> int:
    code: int = import_module(module).main(words)
    return code


@dataclass(frozen=True)
class Lengths:
    """How long the runs of a study are.

    Attributes:
        tokens: document tokens of the run that others are compared with.
        base_tokens: of the AR model that all of them convert.
        rows: of a step.
    """

    tokens: int
    base_tokens: int
    rows: int

    @property
    def name(self) -> str:
        """Runs of other lengths lie elsewhere: they are neither gone on with nor put into the same table."""
        return f"{self.base_tokens}_{self.tokens}_{self.rows}"


def num_tokens(config: TrainConfig) -> int:
    """Document tokens of all stages, which count in tokens."""
    return sum(stage.num_tokens or 0 for stage in config.schedule.stages.values())


def base_job(config: TrainConfig, name: str) -> Job:
    """The AR model that a study converts; its result is no row of a table."""

    def train() -> Mapping[str, Any]:
        run(config)
        return {}

    folder = Path(config.run.root) / config.run.name
    return Job(name, folder.with_suffix(".json"), num_tokens(config) * mean_operations(config), train)


def seconds_per_token(config: TrainConfig) -> float:
    """Of the logged steps of a run, for a document token: without its start, its validations and its saves."""
    lines = (Path(config.run.root) / config.run.name / METRICS).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "step_seconds" in record]
    seconds = sum(record["step_seconds"] for record in records)
    return float(seconds / sum(record["step_seconds"] * record["tokens_per_second"] for record in records))


def run_name(name: str, *others: object) -> str:
    """Of the run of an arm or method, which has words in its name, with what else tells it apart."""
    return "_".join([name.replace(", ", "_").replace(" ", "_"), *map(str, others)])
