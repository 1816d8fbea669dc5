"""From a command line to a chain: recipes composed, values checked, every job resolved to a command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from launch.jobs import Chain, Job, JobSpec, LaunchConfig
from megatron_dllm.compose import compose_dict, to_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.command_line import quoted
from megatron_dllm.config.recipe_source import CONFIG_DIR, RECIPES, recipe_names
from megatron_dllm.config.rules import check

LAUNCH_KEYS = (
    "cluster",
    "experiment",
    "name",
    "root",
    "inputs",
    "nodes",
    "min_nodes",
    "jobs",
    "requeue",
    "train_module",
)
# Modules that read recipes when they run as a tool.
COMPOSING = ("megatron_dllm.evaluate",)


def split_overrides(overrides: list[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Sort command line words into what selects, what configures the launch, and what goes to training.

    Returns:
        `experiment`, `nodes` and `min_nodes` by name; overrides of the launch; overrides of every training job.

    Raises:
        ValueError: a word without `=`.
    """
    selected: dict[str, str] = {}
    launch: list[str] = []
    train: list[str] = []
    for word in overrides:
        key, separator, value = word.partition("=")
        check(separator == "=", f"{word!r} is not of the form key=value.")
        top = key.lstrip("+~").split(".", 1)[0]
        if key in ("experiment", "nodes", "min_nodes"):
            selected[key] = value
        elif top in LAUNCH_KEYS:
            # Variables are the user's own keys: setting one adds it.
            launch.append(f"++{word}" if key.startswith("cluster.environment.") else word)
        else:
            train.append(word)
    return selected, launch, train


def compose_chain(overrides: list[str], recipes: Path = RECIPES) -> Chain:
    """Compose what the command line asks for.

    Raises:
        ValueError: an unknown experiment, cluster, key, or an impossible chain; nothing has been written.
    """
    ConfigStore.instance().store(name="launch_schema", node=LaunchConfig)
    selected, launch_overrides, train_overrides = split_overrides(overrides)
    name = selected.get("experiment", "")
    is_chain = _is_chain(name, recipes)
    choice = [f"chain={name}"] if is_chain else []
    composed = compose_dict([*choice, *launch_overrides], "launch", recipes, LaunchConfig)
    _check_inputs(name, composed)
    if is_chain:
        _place_chain(composed, name, selected, launch_overrides, train_overrides)
    else:
        train_overrides = _place_run(composed, name, launch_overrides, train_overrides, recipes)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, LaunchConfig), "recipes/launch.yaml must start from launch_schema"
    if not is_chain:
        config.jobs = {"train": _only_job(name, selected)}
    config.validate()
    folder = Path(config.root) / config.name
    jobs: list[Job] = []
    for job_name in config.jobs:
        home = [f"run.root={quoted(str(folder))}", f"run.name={job_name}"] if is_chain else []
        jobs.append(_resolve(job_name, config, home, train_overrides, jobs, recipes))
    return Chain(config, folder, tuple(jobs))


def _is_chain(name: str, recipes: Path) -> bool:
    """Whether a recipe is a chain rather than a single experiment; refuses one that is neither."""
    chains, experiments = (recipe_names(group, [recipes]) for group in ("chain", "experiment"))
    check(
        name in chains or name in experiments,
        f"experiment ({name!r}) is not a recipe; there are: {', '.join(sorted({*chains, *experiments}))}.",
    )
    return name in chains


def _check_inputs(name: str, composed: Any) -> None:
    """Refuse a chain whose inputs have not all been named."""
    missing = [key for key in composed.inputs if OmegaConf.is_missing(composed.inputs, key)]
    check(
        not missing,
        f"{', '.join(f'inputs.{key}' for key in missing)} must be given: {name} starts from what you "
        f"bring; add {' '.join(f'inputs.{key}=PATH' for key in missing)}.",
    )


def _place_chain(
    composed: Any, name: str, selected: dict[str, str], launch_overrides: list[str], train_overrides: list[str]
) -> None:
    """Decide where a chain lies: where its recipe, the command line or the cluster says."""
    check(
        not OmegaConf.is_missing(composed, "name"),
        f"name (???) is required: recipes/chain/{name}.yaml must name the chain, or the command line with name=.",
    )
    check(
        "nodes" not in selected and "min_nodes" not in selected,
        "nodes has no effect on a chain, whose jobs have their own; use jobs.NAME.nodes.",
    )
    misplaced = [word for word in train_overrides if word.startswith(("run.name=", "run.root="))]
    check(not misplaced, f"{misplaced} would put every job into one folder; use name= and root=.")
    if composed.cluster.run_root and not any(word.startswith("root=") for word in launch_overrides):
        composed.root = composed.cluster.run_root


def _place_run(
    composed: Any, name: str, launch_overrides: list[str], train_overrides: list[str], recipes: Path
) -> list[str]:
    """Decide where a single run lies, which names the chain; the overrides of training, with that place."""
    misplaced = [word for word in launch_overrides if word.startswith(("name=", "root="))]
    check(not misplaced, f"{misplaced} would have no effect: {name} is a single run; use run.name= and run.root=.")
    if composed.cluster.run_root and not any(word.startswith("run.root=") for word in train_overrides):
        train_overrides = [f"run.root={quoted(composed.cluster.run_root)}", *train_overrides]
    run = to_train_config(_compose_train(name, train_overrides, recipes)).run
    composed.name, composed.root = run.name, run.root
    return train_overrides


def _only_job(experiment: str, selected: dict[str, str]) -> JobSpec:
    nodes = _integer(selected, "nodes")
    return JobSpec(
        experiment=experiment, nodes=1 if nodes is None else nodes, min_nodes=_integer(selected, "min_nodes")
    )


def _integer(selected: dict[str, str], key: str) -> int | None:
    value = selected.get(key)
    check(value is None or value.isdecimal(), f"{key} ({value}) must be a whole number.")
    return None if value is None else int(value)


def _compose_train(experiment: str, overrides: list[str], recipes: Path) -> Any:
    return compose_dict([f"experiment={experiment}", *overrides], "train", recipes)


def _resolve(
    name: str, config: LaunchConfig, home: list[str], train_overrides: list[str], earlier: list[Job], recipes: Path
) -> Job:
    """Turn one job of the recipe into a command."""
    spec = config.jobs[name]
    after = tuple(spec.after) if spec.after is not None else tuple(s.name for s in earlier[-1:])
    train: TrainConfig | None = None
    text = ""
    run_folder = None
    # A tool that composes recipes itself needs the user's folder too; training gets its configuration frozen.
    folder = (CONFIG_DIR[0], str(recipes)) if spec.module in COMPOSING and recipes != RECIPES else ()
    arguments = ("-m", spec.module or config.train_module, *spec.arguments, *folder)
    if spec.experiment is not None:
        try:
            composed = _compose_train(spec.experiment, [*home, *spec.overrides, *train_overrides], recipes)
            train = to_train_config(composed)
        except ValueError as error:
            raise ValueError(f"job {name}: {error}") from error
        train.run.validate()
        run_folder = Path(train.run.root) / train.run.name
        text = frozen_yaml(train)
    upstream = [job.digest for job in earlier if job.name in after]
    content = json.dumps([arguments, text, upstream])
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Job(name, spec, after, arguments, train, text, run_folder, digest)


def frozen_yaml(config: TrainConfig) -> str:
    """The resolved configuration as a primary Hydra config: values only, still bound to the schema.

    Hydra's own settings are taken along, so that a rerun from the frozen file also writes no `outputs/` folders.
    """
    hydra = dict(OmegaConf.to_container(OmegaConf.load(RECIPES / "train.yaml")).get("hydra", {}))  # type: ignore[union-attr]
    del hydra["sweep"]  # of several runs, which a job never is
    defaults = ["train_schema", "_self_", {"override hydra/job_logging": "none"}]
    frozen = {"defaults": defaults, **OmegaConf.to_container(OmegaConf.structured(config)), "hydra": hydra}  # type: ignore[dict-item]
    return OmegaConf.to_yaml(frozen)
