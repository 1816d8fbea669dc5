"""What lies in the folder of a run or a chain: its runs in order, who started them, how long they took, their texts.

Whatever a run did not write is left out. `config.yaml` is read as plain YAML: what looks like an interpolation or a
resolver in a stranger's file stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_dllm.reporting.records import Record, number, numbers
from megatron_dllm.run.files import read_json_lines
from megatron_dllm.run.names import CODE_STATE, CONFIG, CONTRACT, LEASE, METRICS, STARTS, VALIDATION


@dataclass(frozen=True)
class Attempt:
    """One start of a run's processes: who took the run folder, and when (seconds since 1970)."""

    owner: str
    time: float


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        config: config.yaml as plain values.
        code: git.txt: the commit, then what differs from it.
        changes: what later starts changed, a sentence each.
        training: a record a logged step.
        validations: a record a validation.
    """

    folder: Path
    config: dict[str, Any]
    code: str
    changes: list[str]
    attempts: list[Attempt]
    training: list[Record]
    validations: list[Record]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    def setting(self, *keys: str) -> Any:
        """A value of the configuration; None where it is not there."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


@dataclass(frozen=True)
class Track:
    """Runs that follow each other, each from the weights of the one before; steps and tokens count on through all."""

    runs: list[Run]
    training: list[Record]
    validations: list[Record]

    @property
    def name(self) -> str:
        """Names of the runs."""
        return " → ".join(run.name for run in self.runs)

    @property
    def is_autoregressive(self) -> bool:
        """Whether nothing but the exact NLL of an AR model was measured."""
        measured = {key for record in self.validations for key in record if key.startswith("validation_elbo/")}
        return measured == {"validation_elbo/ar"}


@dataclass(frozen=True)
class Command:
    """What a job of a chain was started with; `arguments` follow the name of the Python program."""

    arguments: list[str]
    num_nodes: int
    ranks_per_node: int


@dataclass(frozen=True)
class Duration:
    """How long a job of a chain took, all its attempts together."""

    job: str
    seconds: float


@dataclass(frozen=True)
class History:
    """A run or a chain.

    Attributes:
        checkpoints: checkpoints outside the runs that were evaluated, such as a merge.
        commands: of a chain's jobs, by name.
    """

    folder: Path
    tracks: list[Track]
    checkpoints: list[Path]
    samples: list[Record]
    durations: list[Duration]
    commands: dict[str, Command]
    packages: list[str]

    @property
    def validated(self) -> list[Track]:
        """Tracks of diffusion models that were validated; one that only learned to answer was not."""
        return [track for track in self.tracks if track.validations and not track.is_autoregressive]

    @property
    def runs(self) -> list[Run]:
        """All runs, in order."""
        return [run for track in self.tracks for run in track.runs]


def read_history(folder: Path) -> History:
    """Read the folder of a run or a chain.

    Raises:
        ValueError: no run lies there.
    """
    found = [folder] if (folder / METRICS).is_file() else _run_folders(folder)
    if not found:
        raise ValueError(
            f"folder ({folder}) holds no {METRICS}, nor do the folders in it; name the folder of a run or a chain."
        )
    jobs = _job_folders(folder)
    order = {name: index for index, name in enumerate(jobs)}
    runs = sorted((_read_run(path) for path in found), key=lambda run: _place(run, order))
    return History(
        folder.resolve(),
        [_joined(runs) for runs in _lineages(runs)],
        [path.parent for path in sorted(folder.glob(f"*/{VALIDATION}")) if (path.parent / CONTRACT).is_file()],
        _samples(folder),
        _durations(folder, jobs),
        {name: command for name, job in jobs.items() if (command := _command(job))},
        _text(folder / "launch" / "packages.txt").splitlines(),
    )


def _run_folders(folder: Path) -> list[Path]:
    return [path.parent for pattern in (f"*/{METRICS}", f"*/*/{METRICS}") for path in sorted(folder.glob(pattern))]


def _read_run(folder: Path) -> Run:
    records = read_json_lines(folder / METRICS)
    return Run(
        folder.resolve(),
        _plain_yaml(folder / CONFIG),
        _text(folder / CODE_STATE),
        _changes(folder / STARTS),
        _attempts(folder / LEASE),
        [record for record in records if "validation" not in record],
        [record for record in records if "validation" in record],
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _plain_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}); restore it or remove it.") from None
    return content if isinstance(content, dict) else {}


def _changes(starts: Path) -> list[str]:
    """What starts.jsonl says of changed values."""
    found = []
    for start in read_json_lines(starts):
        changes = start.get("changes")
        if isinstance(changes, dict):
            when = f"{start.get('time')}, at step {start.get('step')}"
            pairs = ((name, pair) for name, pair in changes.items() if isinstance(pair, list) and len(pair) == 2)
            found += [f"{when}: {name}: {pair[0]} → {pair[1]}" for name, pair in pairs]
    return found


def _attempts(lease: Path) -> list[Attempt]:
    records = [record for path in sorted(lease.glob("generation_*")) for record in read_json_lines(path)]
    return [Attempt(str(record.get("owner", "")), number(record.get("time"))) for record in records]


def _place(run: Run, order: dict[str, int]) -> tuple[float, float, str]:
    """Where a run stands among others: as its chain has it, else by its first start."""
    first = run.attempts[0].time if run.attempts else float("inf")
    return order.get(run.name, len(order)), first, run.name


# ---- runs that follow each other --------------------------------------------------------------


def _lineages(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in groups, each run behind the one whose weights it started from; a second one from there stands alone."""
    groups: list[list[Run]] = []
    left = list(runs)
    while left:
        # One whose weights come from none of the others; where two name each other, the first.
        group = [next((run for run in left if not any(_continues(run, other) for other in left)), left[0])]
        left.remove(group[0])
        while after := next((run for run in left if _continues(run, group[-1])), None):
            group.append(after)
            left.remove(after)
        groups.append(group)
    return groups


def _continues(run: Run, other: Run) -> bool:
    """Whether a run loaded a checkpoint of another one. A chain may have been moved since: two names are enough."""
    load = run.setting("checkpoint", "load")
    if not isinstance(load, str) or run is other:
        return False
    parts = Path(load).parts
    names = other.folder.parts[-2:]
    return any(parts[start : start + 2] == names for start in range(len(parts) - 1))


def _joined(runs: list[Run]) -> Track:
    """Records of the runs one after the other, with steps and tokens that count on."""
    training: list[Record] = []
    validations: list[Record] = []
    steps, tokens = 0.0, 0.0
    for run in runs:
        training += _moved(run.training, steps, tokens)
        # Behind the first run, what was measured before the first step is what the run before ended with.
        kept = [r for r in run.validations if not validations or number(r.get("step")) > 0]
        moved = _moved(kept, steps, tokens)
        validations += moved
        seen = [*training, *validations]
        steps = float(np.nanmax([steps, *numbers(seen, "step")]))
        tokens = float(np.nanmax([tokens, *numbers(seen, "consumed_tokens")]))
    return Track(runs, training, validations)


def _moved(records: list[Record], steps: float, tokens: float) -> list[Record]:
    return [
        {
            **record,
            "step": number(record.get("step")) + steps,
            "consumed_tokens": number(record.get("consumed_tokens")) + tokens,
        }
        for record in records
    ]


# ---- what stands beside the runs ---------------------------------------------------------------


def _job_folders(folder: Path) -> dict[str, Path]:
    """Folders of a chain's jobs under launch/, in the order in which they first started."""
    times = {}
    for path in folder.glob("launch/*/events.jsonl"):
        times[path.parent] = min((number(event.get("time")) for event in read_json_lines(path)), default=float("inf"))
    return {path.name: path for path in sorted(times, key=lambda path: (times[path], path.name))}


def _durations(folder: Path, jobs: dict[str, Path]) -> list[Duration]:
    content = _json_object(folder / "chain.json")
    books = content.get("jobs", content.get("stages"))  # as chains before the change of words have it
    if isinstance(books, dict) and books:
        seconds = {name: number(entry.get("seconds")) for name, entry in books.items() if isinstance(entry, dict)}
    else:
        seconds = {name: _seconds_of_ends(job) for name, job in jobs.items()}
    return [Duration(name, value) for name, value in seconds.items() if np.isfinite(value)]


def _seconds_of_ends(job: Path) -> float:
    ends = [event for event in read_json_lines(job / "events.jsonl") if event.get("event") == "end"]
    return float(np.sum(numbers(ends, "seconds"))) if ends else float("nan")


def _command(job: Path) -> Command | None:
    content = _json_object(job / "job.json") or _json_object(job / "stage.json")  # as above
    arguments, nodes, ranks = (content.get(name) for name in ("arguments", "nodes", "ranks_per_node"))
    if not isinstance(arguments, list) or not isinstance(nodes, int) or not isinstance(ranks, int):
        return None
    return Command([str(word) for word in arguments], nodes, ranks)


def _json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty where there is none that can be read."""
    try:
        content = json.loads(_text(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _samples(folder: Path) -> list[Record]:
    """Decoded texts: lines with a prompt and a text, in any file of JSON lines beside the runs."""
    paths = [path for path in sorted(folder.glob("*.jsonl")) if path.name != METRICS]
    lines = [record for path in paths for record in read_json_lines(path)]
    return [r for r in lines if isinstance(r.get("prompt"), str) and isinstance(r.get("text"), str)]


def commit_of(run: Run) -> tuple[str, bool]:
    """(commit, whether tracked files differed from it); an empty text where it is not known."""
    first, _, changes = run.code.partition("\n")
    return (first.strip(), bool(changes.strip())) if re.fullmatch(r"[0-9a-f]{7,64}", first.strip()) else ("", False)
