"""Ask a checkpoint the tasks of lm-evaluation-harness, with likelihoods that block diffusion can stand for.

    python -m megatron_dllm.harness checkpoint=DIR tasks=[arc_easy,piqa] [num_fewshot=5] [apply_chat_template=true]
    torchrun --nproc_per_node N -m megatron_dllm.harness ... [parallel.tensor_model_parallel_size=2]

DIR is a run folder, a torch_dist checkpoint or an HF folder. The harness itself is an extra, which
pip install 'megatron_dllm[eval]' brings. A table is printed; the numbers, all that decides them, and every question
with its scores are written beside the weights as harness.json, or to a file of yours. Keys are those of a training
run, beside these (docs/harness.md):

    tasks=[NAME,FILE.yaml]            tasks, groups or tags of the harness, or YAML files
    limit=N                           questions of each task; all without it
    block_size=N                      the checkpoint's own
    likelihood.estimator=auto         exact, stratified, counts, t_uniform, left_to_right
    likelihood.num_views=8            noisy views of a choice
    likelihood.fill=mask              what stands behind a choice in its last block: mask, none, eos
    decoding.threshold=0.95           of texts that the model writes; batch_size=16 of them at a time
    output=FILE  overwrite=true       instead of harness.json; replace an earlier result
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_dllm.compose import compose_dict
from megatron_dllm.config import RunConfig
from megatron_dllm.config.evaluate import check_one_size, spelled_out
from megatron_dllm.config.harness import HarnessConfig
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.config.rules import check
from megatron_dllm.evaluation.harness.installed import check_installed
from megatron_dllm.evaluation.request import Request, open_config, open_target, settle_questions
from megatron_dllm.evaluation.task_results import metrics_of
from megatron_dllm.run.files import parents_made, write_text
from megatron_dllm.run.names import HARNESS
from megatron_dllm.run.place import is_rank_zero, world_size


def compose_words(words: Sequence[str]) -> Any:
    """Compose recipes/harness.yaml with the words of a command line.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    folder, rest = split_folder(spelled_out(words))
    check_one_size(rest)
    ConfigStore.instance().store(name="harness_schema", node=open_config(HarnessConfig))
    return compose_dict(rest, "harness", folder, HarnessConfig)


def read_request(composed: Any) -> Request:
    """Read the checkpoint and check the whole.

    Args:
        composed: from `compose_words`; it is not changed.

    Raises:
        ValueError: what is missing or cannot work.
    """
    check(not OmegaConf.is_missing(composed, "tasks"), "tasks (not given) is required: name a task or a YAML file.")
    return settle_questions(composed, world_size())


def run(composed: Any) -> tuple[Path, dict[str, Any]]:
    """Load the checkpoint, ask the tasks (a collective); nothing is written.

    Returns:
        Where the results go, and the results, on the rank 0 of each node; elsewhere none.

    Raises:
        ValueError: what `read_request` refuses, a task that is unknown or whose data are not here, or a place that
            cannot be written or has a result.
    """
    check_installed()
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    from megatron_dllm.evaluation.harness.asking import ask
    from megatron_dllm.evaluation.harness.model import HarnessModel
    from megatron_dllm.evaluation.harness.requests import Encoder
    from megatron_dllm.evaluation.harness.results import results_of, settings_of
    from megatron_dllm.evaluation.harness.tasks import check_tasks, greedy_tasks, load_tasks, writing_tasks
    from megatron_dllm.evaluation.harness.writing import Writer, contract_of
    from megatron_dllm.parallel.meeting import meet
    from megatron_dllm.training.measuring import measured_model

    def encoder_of(request: Request) -> Encoder:
        ids = request.config.model
        return Encoder.load(Path(str(request.config.data.tokenizer)), ids.mask_token_id, ids.eos_token_id)

    tasks: list[Any] = []

    def decide() -> tuple[Request, Path]:
        request = read_request(composed)
        config: Any = request.config
        target = open_target(request, HARNESS, lambda _: "an earlier result")
        encoder = encoder_of(request)
        if config.apply_chat_template:
            encoder.check_chats()
        tasks.extend(load_tasks(config.tasks, config.include_path))
        why_not = config.why_not_write(request.weights.is_diffusion)
        check_tasks(tasks, why_not_write=why_not, has_confirmed=config.confirm_unsafe_code)
        return request, target

    timeout = composed.run.distributed_timeout_minutes
    meeting = meet(RunConfig(name="harness", distributed_timeout_minutes=timeout))
    request, target = meeting.decide(decide)
    config: Any = request.config
    # The other ranks find the data where rank 0 has put them.
    tasks = tasks or load_tasks(config.tasks, config.include_path)
    with measured_model(request, meeting) as model:
        block_size = int(request.names[0]) if request.weights.is_diffusion else None
        encoder, writer = encoder_of(request), None
        if block_size is not None and writing_tasks(tasks):
            weights, is_chat = request.weights, config.apply_chat_template
            trained = weights.shift, weights.clean_block_size
            contract = contract_of(block_size, config.schedule.context_length, encoder, is_chat, *trained)
            may_cut = config.likelihood.truncate
            writer = Writer.of(model, encoder, config.decoding, contract, config.batch_size, may_cut)
        harness = HarnessModel(model, encoder, config.likelihood, block_size, writer, greedy_tasks(tasks))
        found = ask(
            harness,
            tasks,
            config,
            limit=config.limit,
            bootstrap_iters=config.bootstrap_iters,
            log_samples=config.log_samples,
        )
    if found is None:
        return target, {}
    return target, results_of(found, harness.scored, harness.written, settings_of(request, config))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in words or "--help" in words:
        Console(highlight=False, soft_wrap=True).print(Text(str(__doc__)))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    target, results = run(compose_words(words))
    if is_rank_zero():
        show(results)
        write(target, results)
    return 0


def show(results: dict[str, Any]) -> None:
    """Print the metrics of every task, and how many decisions are too close to call."""
    table = Table("task", "metric", "value", "error", "unsure")
    for metric in metrics_of(results["results"], results["texts"]):
        unsure = results["decisions"].get(metric.task)
        shown = "-" if metric.error is None else f"{metric.error:.4f}"
        share = f"{unsure['num_unsure']} of {unsure['num_questions']}" if unsure and metric.name == "acc" else "-"
        table.add_row(metric.task, metric.name, f"{metric.value:.6g}", shown, share)
    Console(highlight=False, soft_wrap=True).print(table)


def write(target: Path, results: dict[str, Any]) -> None:
    """Write the results, and say where.

    Raises:
        ValueError: the disk is full, say; the table has been printed.
    """
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=1, ensure_ascii=False, default=handle_non_serializable)
    try:
        with parents_made(target):
            write_text(target, text)
    except OSError as error:
        raise ValueError(f"{target} could not be written: {error.strerror}; the result stands above.") from None
    Console(highlight=False, soft_wrap=True).print(Text(f"written to {target}"))


if __name__ == "__main__":
    run_command(main)
