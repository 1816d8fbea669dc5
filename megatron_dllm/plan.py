"""Whether a training run fits, how fast it will be, and which layout is better: before anything is queued.

    python -m megatron_dllm.plan experiment=NAME cluster=NAME nodes=N [key=value ...]
    python -m megatron_dllm.plan experiment=NAME cluster=NAME nodes=N search=true [max_gpus=N] [objective=cost]
    python -m megatron_dllm.plan cluster=NAME calibrate=[RUN, ...]
    python -m megatron_dllm.plan experiment=NAME cluster=NAME nodes=N task=generate [texts.max_new_tokens=N ...]
    python -m megatron_dllm.plan experiment=NAME cluster=NAME nodes=N task=evaluate

Nothing is started and no GPU is needed. Keys are those of a training run. With data.train the corpora are read as a
start of the run reads them, and its rows are those that are packed; without, documents are assumed to be
assumptions.document_length tokens long. A plan that does not fit ends with exit code 2 and says what would. Most often
given, with their defaults:

    nodes=1                           nodes of the cluster
    task=train                        what is to run: train, evaluate (the ELBO) or generate (decode)
    texts.KEY=VALUE                   of generate (python -m megatron_dllm.config.reference texts)
    search=false                      look at every layout, recomputation and micro-batch (some seconds)
    max_gpus=null                     the search may take other numbers of nodes, up to so many GPUs
    objective=time                    what the search makes small: time, cost (GPU-hours) or gpus
    confirm=false                     ask the engine for the ranks that decide (some seconds to minutes each)
    assumptions.KEY=VALUE             constants of the prediction (python -m megatron_dllm.config.reference assumptions)
    output=null                       folder for plan.json and plan.png
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from megatron_dllm.checkpoint.brought import fill, open_model
from megatron_dllm.compose import compose_dict, to_train_config
from megatron_dllm.config import EvaluationConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.config.rules import check
from megatron_dllm.planning.inference import plan_inference
from megatron_dllm.planning.options import Option, near_options, remedy, words_of
from megatron_dllm.planning.record import record
from megatron_dllm.planning.run_plan import RunPlan, plan_run, plan_trial, setting_of
from megatron_dllm.planning.screen import screen, shortfall
from megatron_dllm.planning.search import Found, search
from megatron_dllm.planning.work import StageWork, assumed_work
from megatron_dllm.run.files import write_json

# Stands for a run and a corpus that do not exist yet.
_UNNAMED, _NO_CORPUS = "plan", "none"


def compose_words(words: Sequence[str]) -> Any:
    """Compose recipes/plan.yaml with the words of a command line.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    folder, rest = split_folder(words)
    schema = PlanConfig(model=open_model(), evaluation=EvaluationConfig(num_tokens=MISSING))
    ConfigStore.instance().store(name="plan_schema", node=schema)
    return compose_dict(rest, "plan", folder, PlanConfig)


def read_config(composed: Any) -> tuple[PlanConfig, bool]:
    """The configuration, validated, and whether it names corpora to be read.

    Raises:
        ValueError: a value that cannot work, for training or for planning.
    """
    has_corpora = not OmegaConf.is_missing(composed.data, "train")
    fill(composed.run, name=_UNNAMED)
    fill(composed.data, train=_NO_CORPUS)
    if composed.data.validation is None:
        composed.evaluation.num_tokens = 0
    config = to_train_config(composed)
    assert isinstance(config, PlanConfig), "recipes/plan.yaml starts from plan_schema"
    config.validate_plan()
    if config.task == "train":
        config.validate(config.num_gpus)
    else:
        config.model.validate()
        config.schedule.validate()
        config.evaluation.validate(config.schedule.context_length, has_validation=True)
    return config, has_corpora


def read_work(config: PlanConfig, has_corpora: bool) -> tuple[StageWork, ...]:
    """The stages: from the corpora as a start of the run finds them, or assumed.

    Raises:
        ValueError: what a start would refuse.
    """
    if not has_corpora:
        return assumed_work(config, config.assumptions)
    prepare()
    from megatron_dllm.planning.measured import measured_work

    return measured_work(config)


def gpu_counts(config: PlanConfig) -> list[int]:
    """Numbers of GPUs that a search tries: those of `nodes`, or 1, 2, 3, 4, 6, 8, 12, ... nodes up to max_gpus."""
    if config.max_gpus is None:
        return [config.num_gpus]
    per_node = config.cluster.num_ranks_per_node
    most = config.max_gpus // per_node
    nodes = {factor << power for power in range(most.bit_length()) for factor in (1, 3)} | {config.nodes}
    return [count * per_node for count in sorted(nodes) if count <= most]


def found_options(config: PlanConfig, plan: RunPlan, found: Found) -> list[Option]:
    """What a search found, as an option beside the plan."""
    if found.best is None:
        return []
    words = words_of(config, found.best.candidate)
    return [Option(f"best for {config.objective}", words, found.best)] if words else []


def _write(config: PlanConfig, plan: RunPlan, cluster: str, options: Sequence[Option]) -> None:
    from megatron_dllm.planning.picture import picture

    assert config.output is not None, "a folder is named"
    folder = Path(config.output)
    folder.mkdir(parents=True)
    write_json(folder / "plan.json", record(plan, config.run.name, cluster, config.nodes, options))
    (folder / "plan.png").write_bytes(picture(plan))
    print(f"\nwritten to {folder}")


def run(words: Sequence[str]) -> int:
    """Plan what the words describe.

    Raises:
        ValueError: a value that cannot work, or a plan that does not fit.
    """
    composed = compose_words(words)
    if composed.calibrate is not None:
        return _calibrate(composed)
    config, has_corpora = read_config(composed)
    if config.output is not None:
        check(not Path(config.output).exists(), f"output ({config.output}) exists; name a folder that does not.")
    cluster = next((word.partition("=")[2] for word in words if word.startswith("cluster=")), "h100x8")
    if config.task != "train":
        print(plan_inference(config, cluster))
        return 0
    setting = setting_of(config)
    work = read_work(config, has_corpora)
    plan = plan_run(config, setting, work, config.num_gpus)
    options = _options(config, work, plan)
    print(screen(plan, config.run.name, cluster, config.nodes, options))
    if config.output is not None:
        _write(config, plan, cluster, options)
    if config.confirm:
        chosen = options[0] if config.search and options else None
        _confirm(config, plan if chosen is None else plan_trial(setting, work, chosen.trial))
    if not plan.fits:
        raise ValueError(f"{shortfall(plan)}; {remedy(config, setting, work, options)}")
    return 0


def _confirm(config: PlanConfig, plan: RunPlan) -> None:
    """Print what the engine says of a plan's tightest stage."""
    prepare()
    from megatron_dllm.planning.confirming import confirm, confirmation_lines

    print()
    for line in confirmation_lines(confirm(config, plan.tightest), plan.setting.limit):
        print(line)


def prepare() -> None:
    """Make megatron-core usable here, before the modules that import it."""
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()


def _calibrate(composed: Any) -> int:
    """Fit the constants to runs, whose own configurations count; the cluster and the assumptions are the command's.

    Raises:
        ValueError: hardware that is not known, or a folder that is no run.
    """
    from megatron_dllm.planning.calibration import calibrate
    from megatron_dllm.planning.calibration_screen import calibration_screen
    from megatron_dllm.planning.observed import read_observations

    cluster, assumptions = (OmegaConf.to_object(composed[name]) for name in ("cluster", "assumptions"))
    assert isinstance(cluster, ClusterConfig) and isinstance(assumptions, AssumptionsConfig), "as the schema says"
    cluster.validate()
    cluster.hardware.check_known()
    assumptions.validate()
    folders = [str(folder) for folder in composed.calibrate]
    observations = read_observations(folders, cluster, assumptions)
    name = "+".join(Path(folder).name for folder in folders)
    print(calibration_screen(calibrate(observations, assumptions, name)))
    return 0


def _options(config: PlanConfig, work: Sequence[StageWork], plan: RunPlan) -> list[Option]:
    if not config.search:
        return near_options(config, plan.setting, work, plan)
    found = search(plan.setting, config, work, gpu_counts(config), config.objective)
    print(f"search: {found.num_tried:,} layouts tried, {found.num_fitting:,} fit\n")
    return found_options(config, plan, found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in words or "--help" in words:
        print(__doc__)
        return 0
    return run(words)


if __name__ == "__main__":
    run_command(main)
