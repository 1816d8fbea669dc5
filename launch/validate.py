"""Everything that can be refused before a job exists: layout, data, checkpoint, folders, container.

Each check yields sentences; a submission shows all of them at once and submits nothing.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import pkgutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.job import job_python, valid_nodes
from launch.jobs import Chain, Job
from launch.progress import Progress, progress_of
from launch.record import output_exists, read_json
from megatron_dllm.checkpoint import folder as checkpoint_folder
from megatron_dllm.checkpoint.identity import check_start
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.cluster import ClusterConfig, time_limit_seconds

log = logging.getLogger("launch")
ROOT = Path(__file__).resolve().parents[1]
_IDX_MAGIC = b"MMIDIDX\x00\x00"
# Arguments of the tools that name what they read.
_INPUT_OPTIONS = ("--hf", "--checkpoint", "--checkpoints", "--run", "--input", "--tokenizer", "--config-dir")
_INPUT_KEYS = ("checkpoint", "checkpoint.load", "data.train", "data.validation", "data.tokenizer", "prompts_file")
# sbatch's --output replaces %j and the like, and a container's mounts are separated by commas and colons.
_SPECIAL = "%,:\\"


def check_chain(chain: Chain, allow_changes: bool = False) -> list[str]:
    """Problems of everything that is still to run, each a sentence with its remedy; empty if there are none."""
    cluster = chain.config.cluster
    problems = [*container_problems(cluster), *folder_problems(chain.folder)]
    ready: list[Job] = []
    later: list[Job] = []
    for number, job in enumerate(chain.jobs):
        try:
            if progress_of(chain, job, allow_changes) is Progress.FINISHED:
                continue
            valid_nodes(chain, job)
        except ValueError as error:
            problems.append(f"job {job.name}: {error}")
            continue
        produced = [name for earlier in chain.jobs[:number] for name in produced_by(earlier)]
        found = [*job_problems(job, produced, cluster), *mount_problems(chain, job)]
        problems += [f"job {job.name}: {text}" for text in found]
        if job.config is not None:
            problems += [f"job {job.name}: {text}" for text in memory_problems(job.config, cluster, job.spec.nodes)]
            (later if _reads(job.config, produced) else ready).append(job)
    if not problems and chain.config.train_module == "megatron_dllm.train":
        # In a container the nodes' own Python may know nothing of training; then ask the one that submits.
        problems += training_problems(ready, later, list(dict.fromkeys([job_python(cluster), sys.executable])))
    return problems


def _reads(config: TrainConfig, produced: list[str]) -> bool:
    """Whether a training job reads something that an earlier job is yet to write."""
    inputs = [*config.train_corpora, config.data.validation, config.data.tokenizer, config.checkpoint.load]
    inputs.append(config.preference.scores_file)
    return any(_is_produced(path, produced) for path in inputs if path)


def training_problems(ready: list[Job], later: list[Job], pythons: Sequence[str]) -> list[str]:
    """What training itself would refuse, asked in a process of its own: this one need not have torch.

    Args:
        ready: jobs whose inputs are there.
        later: jobs whose inputs an earlier job makes.
        pythons: interpreters to ask, until one can import training; where none can, the nodes will have to tell.
    """
    if not ready and not later:
        return []
    with tempfile.TemporaryDirectory() as folder:
        for job in (*ready, *later):
            (Path(folder) / job.name).mkdir()
            (Path(folder) / job.name / "config.yaml").write_text(job.config_text, encoding="utf-8")
        names = [[str(Path(folder) / job.name) for job in jobs] for jobs in (ready, later)]
        reason = "no interpreter"
        for python in pythons:
            words = [python, "-m", "megatron_dllm.check", *names[0], "--without_inputs", *names[1]]
            try:
                done = subprocess.run(
                    words,
                    capture_output=True,
                    text=True,
                    check=False,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                )
            except OSError as error:
                reason = str(error)
                continue
            if done.returncode in (0, 2):
                return [f"job {line}" for line in done.stdout.splitlines()] if done.returncode else []
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    log.warning("the inputs were not checked as training does (%s): the nodes will have to", reason)
    return []


def memory_problems(config: TrainConfig, cluster: ClusterConfig, nodes: int) -> Iterator[str]:
    """Whether a job cannot fit into its GPUs, where the cluster says what they have."""
    # numpy is imported only here: no other part of launching needs it.
    from megatron_dllm.planning.fitting import why_not

    reason = why_not(config, cluster, nodes)
    if reason is not None:
        yield reason


def produced_by(job: Job) -> list[str]:
    """Paths below which a job writes: what a later job finds there cannot be checked yet."""
    named = [job.spec.output, str(job.run_folder) if job.run_folder else None]
    # A tool's --output says the same where the recipe names no output.
    words = job.spec.arguments
    named += [words[number + 1] for number, word in enumerate(words[:-1]) if word == "--output"]
    return [name for name in named if name]


def _is_produced(path: str, produced: list[str]) -> bool:
    wanted = Path(os.path.abspath(path))
    for name in produced:
        made = Path(os.path.abspath(name))
        if wanted == made or made in wanted.parents or made.with_suffix("") == wanted:
            return True
    return False


def job_problems(job: Job, produced: list[str], cluster: ClusterConfig) -> Iterator[str]:
    """Problems of one job's inputs and outputs."""
    config = job.config
    if job.spec.time_limit and time_limit_seconds(job.spec.time_limit) < 60:
        yield f"time_limit ({job.spec.time_limit}) must be at least a minute: SLURM counts whole minutes."
    if config is None:
        yield from tool_problems(job, produced, cluster)
        return
    corpora = [("data.train", prefix) for prefix in config.train_corpora]
    for key, prefix in (*corpora, ("data.validation", config.data.validation)):
        if prefix and not _is_produced(prefix, produced):
            yield from corpus_problems(key, prefix, config)
    tokenizer = config.data.tokenizer
    if tokenizer and not _is_produced(tokenizer, produced) and not Path(tokenizer).is_dir():
        yield f"data.tokenizer ({tokenizer}) is not a folder; give the folder that holds tokenizer.json."
    if config.checkpoint.load and not _is_produced(config.checkpoint.load, produced):
        try:
            folder = checkpoint_folder.resolve_checkpoint(Path(config.checkpoint.load))
            check_start(folder, config)
        except ValueError as error:
            yield f"checkpoint.load ({config.checkpoint.load}): {error}"
    scores = config.preference.scores_file
    if scores and not _is_produced(scores, produced) and not Path(scores).is_file():
        yield (
            f"preference.reference ({scores}) is not a file; write it first, with python -m megatron_dllm.evaluate and "
            f"scores={scores}."
        )
    assert job.run_folder is not None, "a training job has a run folder"
    yield from folder_problems(job.run_folder)


def tool_inputs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What a tool's arguments name that it reads: option or key, and path or prefix."""
    option = ""
    for word in arguments:
        key, _, value = word.partition("=")
        if word.startswith("--"):
            option = key
        elif option in _INPUT_OPTIONS:
            key, value = option, word
        if key in (*_INPUT_OPTIONS, *_INPUT_KEYS) and value:
            yield key, value


def tool_problems(job: Job, produced: list[str], cluster: ClusterConfig) -> Iterator[str]:
    """A module that is not there, or an input that neither exists nor is made by an earlier job."""
    module = job.spec.module
    assert module is not None, "a job without a configuration is a tool"
    package = module.partition(".")[0]
    # Other people's modules may lie in the image alone.
    is_here = cluster.container.kind == "none" or (ROOT / package).exists()
    if is_here and not _has_module(module):
        parent = module.rpartition(".")[0]
        folders = importlib.util.find_spec(parent) if parent and _has_module(parent) else None
        names = (
            [f"{parent}.{found.name}" for found in pkgutil.iter_modules(folders.submodule_search_locations)]
            if folders
            else []
        )
        near = difflib.get_close_matches(module, names, n=1)
        yield f"module ({module}) does not exist; {f'did you mean {near[0]}?' if near else 'correct its name.'}"
    for key, path in tool_inputs(job.spec.arguments):
        if not _is_produced(path, produced) and not output_exists(path):
            yield f"{key} ({path}) does not exist; correct the path, or list the job that makes it before this one."


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def mount_problems(chain: Chain, job: Job) -> Iterator[str]:
    """Paths that a job uses and its container does not show."""
    container = chain.config.cluster.container
    if container.kind == "none":
        return
    config = job.config
    named: list[tuple[str, str | None]] = [("output", job.spec.output), *tool_inputs(job.spec.arguments)]
    if config is not None:
        named = [
            *(("data.train", prefix) for prefix in config.train_corpora),
            ("data.validation", config.data.validation),
            ("data.tokenizer", config.data.tokenizer),
            ("checkpoint.load", config.checkpoint.load),
            ("preference.reference", config.preference.scores_file),
        ]
    shown = [*(mount.split(":")[1] for mount in container.mounts), os.getcwd(), str(chain.folder.absolute())]
    for key, path in named:
        if path and (key == "output" or output_exists(path)) and not _is_produced(path, shown):
            place = Path(os.path.abspath(path)).parent
            yield (
                f"{key} ({path}) lies under no mount of the container; add {place}:{place} to cluster.container.mounts."
            )


def corpus_problems(key: str, prefix: str, config: TrainConfig) -> Iterator[str]:
    """A corpus that is missing, damaged, or of another vocabulary."""
    paths = [Path(prefix + suffix) for suffix in (".bin", ".idx")]
    missing = [str(path) for path in paths if not path.is_file() or path.stat().st_size == 0]
    if missing:
        yield (
            f"{key} ({prefix}) has no {' and no '.join(missing)}; tokenize the text with "
            f"python -m megatron_dllm.data.tokenize --output {prefix}."
        )
        return
    with open(paths[1], "rb") as file:
        header = file.read(struct.calcsize("<9sQB"))
    if not header.startswith(_IDX_MAGIC):
        yield f"{key} ({prefix}): {paths[1]} is not a Megatron index; tokenize the text again."
    try:
        description = read_json(Path(prefix + ".json")) or {}
    except ValueError as error:
        yield f"{key} ({prefix}): {error}"
        return
    largest = description.get("max_token_id", 0)
    if largest >= config.model.vocab_size:
        yield (
            f"{key} ({prefix}) holds token {largest}, which must lie below model.vocab_size "
            f"({config.model.vocab_size}); tokenize the text with the model's own tokenizer."
        )
    stated = description.get("mask_token_id")
    if stated is not None and stated != config.model.mask_token_id:
        yield (
            f"model.mask_token_id ({config.model.mask_token_id}) differs from the corpus {prefix} ({stated}); "
            "tokenize the text with the model's own tokenizer, or correct the model's id."
        )


def folder_problems(folder: Path) -> Iterator[str]:
    """Whether files can be made in a folder that may not exist yet: tried, not asked."""
    place = folder.absolute()
    special = [letter for letter in str(place) if letter in _SPECIAL or not letter.isprintable()]
    if special:
        yield (
            f"{folder} has {special[0]!r} in its path ({place}), which sbatch or a container would misread; choose "
            "another run.root (root= for a chain)."
        )
        return
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return
    except OSError as error:
        yield f"{folder} cannot be written ({place}: {error.strerror}); choose another run.root (root= for a chain)."


def container_problems(cluster: ClusterConfig) -> Iterator[str]:
    """An image or a mounted folder that is not there."""
    container = cluster.container
    if container.kind == "none" or container.image is None:
        return
    is_file = container.image.startswith(("/", "./")) or container.image.endswith((".sqsh", ".sif"))
    if is_file and not Path(container.image).exists():
        yield (
            f"cluster.container.image ({container.image}) does not exist; build it (docs/slurm.md) or correct the path."
        )
    for mount in container.mounts:
        host = mount.split(":")[0]
        if not Path(host).exists():
            yield f"cluster.container.mounts ({mount}): {host} does not exist on this machine; correct the path."
