"""Measure the validation ELBO of a checkpoint: a merged or exported one, say, or an old one at other block sizes.

    python -m megatron_dllm.evaluate checkpoint=DIR data.validation=PREFIX [block_sizes=[1,4,32]] [key=value ...]
    torchrun --nproc_per_node N -m megatron_dllm.evaluate ... [parallel.tensor_model_parallel_size=2]

DIR is a run folder, a torch_dist checkpoint or an HF folder, and brings the model; of an autoregressive one the exact
NLL is measured. The result is printed and written beside the weights as validation.json, or to a file of yours. Keys
are those of a training run, and an experiment may be named for its layout and evaluation settings. Most often given,
with their defaults (checkpoint= and block_sizes= are short for the full names):

    evaluation.block_sizes=[...]      the checkpoint's own; the first one ranks checkpoints
    evaluation.num_tokens=2e6         document tokens, or the whole corpus
    evaluation.micro_batch_size=1     rows of a forward pass
    evaluation.clean_block_size=null  as a server computes; 1: clean tokens see no later ones (docs/methods.md)
    evaluation.with_ar=false          also the exact NLL of the next token by the same weights
    schedule.context_length=N         the training's; of another's HF folder max_position_embeddings, 4096 at most
    parallel.precision=fp32           the run's; of an HF folder bf16 on a GPU, fp32 without one
    output=FILE                       instead of validation.json beside the weights
    overwrite=false                   replace an earlier result

    torchrun --nproc_per_node N -m megatron_dllm.evaluate experiment=dpo checkpoint.load=DIR scores=PREFIX.scores

scores the pairs of PREFIX instead, once: the words are those of the run of preferences that will read the file.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_dllm.checkpoint.validation import Validation, read_validation_file, write_validation_file
from megatron_dllm.compose import compose_dict
from megatron_dllm.config import RunConfig
from megatron_dllm.config.evaluate import EvaluateConfig, spelled_out
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.evaluation.request import Request, open_config, open_target, read_request
from megatron_dllm.run.files import parents_made
from megatron_dllm.run.names import VALIDATION
from megatron_dllm.run.place import is_rank_zero, world_size


@dataclass(frozen=True)
class Measured:
    """An evaluation that has been made, and where it is to be written."""

    request: Request
    target: Path
    validation: Validation


def compose_words(words: Sequence[str]) -> Any:
    """Compose recipes/evaluate.yaml with the words of a command line.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    folder, rest = split_folder(spelled_out(words))
    ConfigStore.instance().store(name="evaluate_schema", node=open_config())
    return compose_dict(rest, "evaluate", folder, EvaluateConfig)


def measure(composed: Any) -> Measured:
    """Load the checkpoint that the configuration names and measure it (a collective); nothing is written.

    Args:
        composed: from `compose_words`.

    Raises:
        ValueError: what `read_request` refuses, a corpus of another model, or a place that cannot be written or has a
            result.
    """
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    from megatron_dllm.data.corpus import Corpus
    from megatron_dllm.evaluation.elbo import check_corpus, evaluate
    from megatron_dllm.parallel.meeting import meet
    from megatron_dllm.training.measuring import measured_model

    def decide() -> tuple[Request, Path]:
        request = read_request(composed, world_size())
        config = request.config
        corpus = _open(config, Corpus)
        corpus.verify()
        check_corpus(config, corpus, request.names, request.weights.sft, request.weights.shift)
        return request, open_target(request, VALIDATION, _earlier)

    timeout = composed.run.distributed_timeout_minutes
    meeting = meet(RunConfig(name="evaluation", distributed_timeout_minutes=timeout))
    request, target = meeting.decide(decide)
    with measured_model(request, meeting) as model:
        corpus = _open(request.config, Corpus)
        names, sft, shift = list(request.names), request.weights.sft, request.weights.shift
        where = (model.groups, corpus, names, model.device)
        validation = evaluate(model.chunks, model.config, *where, sft=sft, shift=shift, is_watched=True)
    return Measured(request, target, validation)


def _open(config: EvaluateConfig, corpus: Any) -> Any:
    return corpus(config.data.validation, config.model, config.data.tokenizer)


def _earlier(target: Path) -> str:
    """What an earlier result came to."""
    try:
        found = read_validation_file(target)
    except ValueError:
        return "no result of an evaluation"
    values = ", ".join(f"{name}: {value:.4f}" for name, value in found.nats_per_token.items())
    return f"nats per token {values}"


def show(measured: Measured) -> None:
    """Print what was measured, on what, and what came of it."""
    validation, config = measured.validation, measured.request.config
    console = Console(highlight=False, soft_wrap=True)
    table = Table("block size", "nats/token", "bits/byte")
    for name, value in validation.nats_per_token.items():
        bits = validation.bits_per_byte.get(name)
        label = "autoregressive, exact NLL" if name == "ar" else name
        table.add_row(label, f"{value:.4f}", "-" if bits is None else f"{bits:.4f}")
    console.print(table)
    conditions = validation.conditions
    assert conditions is not None, "a measurement knows its conditions"
    console.print(
        Text(
            f"{measured.request.weights.folder}: {conditions.num_tokens:,} document tokens of {config.data.validation} "
            f"({conditions.corpus[:12]}), context length {conditions.context_length}, blocks by {conditions.blocks}, "
            f"{conditions.precision}"
        )
    )


def write(measured: Measured) -> None:
    """Write the result, and say where.

    Raises:
        ValueError: the disk is full, say; the result has been printed.
    """
    try:
        with parents_made(measured.target):
            write_validation_file(measured.target, measured.validation)
    except OSError as error:
        raise ValueError(
            f"{measured.target} could not be written: {error.strerror}; the result stands above."
        ) from None
    Console(highlight=False, soft_wrap=True).print(Text(f"written to {measured.target}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in words or "--help" in words:
        Console(highlight=False, soft_wrap=True).print(Text(str(__doc__)))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    if any(word.startswith("scores=") for word in words):
        from megatron_dllm.training.score_command import score

        score(words)
        return 0
    measured = measure(compose_words(words))
    if is_rank_zero():
        show(measured)
        write(measured)
    return 0


if __name__ == "__main__":
    run_command(main)
