"""Test a checkpoint in long contexts: needles hidden in texts, by depth and length, and the ELBO by position.

    python -m megatron_dllm.needle checkpoint=DIR data.validation=PREFIX output=FILE.json [key=value ...]
    torchrun --nproc_per_node N -m megatron_dllm.needle ... [parallel.context_parallel_size=2]

DIR is a run folder, a torch_dist checkpoint or an HF folder, autoregressive or not; PREFIX any tokenized corpus.
FILE.json holds the numbers, FILE.png the picture of both. Keys are those of evaluate; most often given, with their
defaults:

    lengths=[]                       an eighth, a quarter, a half and the whole of schedule.context_length
    depths=[0,0.25,0.5,0.75,1]
    num_needles=8 num_choices=8      at each length and depth; values that the model chooses from
    num_documents=8                  documents as long as the context, for the ELBO by position
    schedule.context_length=N        the training's

A longer context than the training's needs model.max_position_embeddings and, most often, model.rotary_scaling with
checkpoint.change_rotary=true (docs/long_context.md).
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_dllm.compose import compose_dict
from megatron_dllm.config import RunConfig
from megatron_dllm.config.evaluate import check_one_size, spelled_out
from megatron_dllm.config.needle import NeedleConfig
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.config.rules import check
from megatron_dllm.evaluation.by_position import Stretch, by_position, stretches_of
from megatron_dllm.evaluation.needle import Cell, cells_of, hide
from megatron_dllm.evaluation.request import Request, open_config, open_target, settle_questions
from megatron_dllm.run.files import parents_made, write_bytes, write_json
from megatron_dllm.run.names import NEEDLE
from megatron_dllm.run.place import is_rank_zero, world_size
from megatron_dllm.run.stream import check_new, check_writable


def compose_words(words: Sequence[str]) -> Any:
    """Compose recipes/needle.yaml with the words of a command line.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    folder, rest = split_folder(spelled_out(words))
    check_one_size(rest)
    ConfigStore.instance().store(name="needle_schema", node=open_config(NeedleConfig))
    return compose_dict(rest, "needle", folder, NeedleConfig)


def read_request(composed: Any) -> Request:
    """Read the checkpoint and check the whole.

    Args:
        composed: from `compose_words`; it is not changed.

    Raises:
        ValueError: what is missing or cannot work.
    """
    check(
        bool(composed.data.validation),
        f"data.validation ({composed.data.validation}) must name the texts in which needles are hidden; give the "
        "prefix of a tokenized corpus.",
    )
    return settle_questions(composed, world_size())


def measure(composed: Any) -> tuple[Request, Path, list[Cell], list[Stretch]]:
    """Load the checkpoint and ask everything (a collective); nothing is written.

    Raises:
        ValueError: what `read_request` refuses, texts that are too short, or a place that cannot be written or has a
            result.
    """
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    from megatron_dllm.data.corpus import Corpus
    from megatron_dllm.evaluation.harness.requests import Encoder
    from megatron_dllm.evaluation.likelihood import score_continuations
    from megatron_dllm.parallel.meeting import meet
    from megatron_dllm.training.measuring import measured_model

    def asked(request: Request) -> tuple[Any, Any]:
        config: Any = request.config
        ids = config.model
        encoder = Encoder.load(Path(config.data.tokenizer), ids.mask_token_id, ids.eos_token_id)
        corpus = Corpus(config.data.validation, ids, config.data.tokenizer)
        if is_rank_zero():
            corpus.verify()
        return hide(config, corpus, encoder.encode), stretches_of(config, corpus) if config.num_documents else []

    everything: list[tuple[Any, Any]] = []

    def decide() -> tuple[Request, Path]:
        request = read_request(composed)
        target = open_target(request, NEEDLE, lambda _: "an earlier result")
        check(target.suffix != ".png", f"output ({target}) is where the picture goes; name the .json file beside it.")
        (check_writable if request.config.overwrite else check_new)(_picture_of(target))
        everything.append(asked(request))
        return request, target

    timeout = composed.run.distributed_timeout_minutes
    meeting = meet(RunConfig(name="needle", distributed_timeout_minutes=timeout))
    request, target = meeting.decide(decide)
    config: Any = request.config
    questions, stretches = everything[0] if everything else asked(request)
    block_size = int(request.names[0]) if request.weights.is_diffusion else None
    with measured_model(request, meeting) as model:
        choices = [choice for question in questions for choice in question.choices]
        flat = score_continuations(model, choices, config.likelihood, block_size)
        curve = score_continuations(model, stretches, config.likelihood, block_size)
    size = config.num_choices
    found = [flat[start : start + size] for start in range(0, len(flat), size)]
    return request, target, cells_of(questions, found), by_position(stretches, curve)


def show(cells: Sequence[Cell], stretches: Sequence[Stretch]) -> None:
    """Print both tables."""
    console = Console(highlight=False, soft_wrap=True)
    if cells:
        table = Table("tokens", "depth", "right", "nats of the right value", "gain over wrong ones")
        for cell in cells:
            table.add_row(
                str(cell.length), f"{cell.depth:g}", f"{cell.accuracy:.2f}", f"{cell.nats:.2f}", f"{cell.gain:.2f}"
            )
        console.print(table)
    if stretches:
        table = Table("positions", "nats/token", "error")
        for item in stretches:
            error = "-" if item.standard_error is None else f"{item.standard_error:.3f}"
            table.add_row(f"{item.start} to {item.stop - 1}", f"{item.nats_per_token:.4f}", error)
        console.print(table)


def write(request: Request, target: Path, cells: Sequence[Cell], stretches: Sequence[Stretch]) -> None:
    """Write the numbers and the picture, and say where."""
    from megatron_dllm.reporting.needle import picture

    config: Any = request.config
    settings = ("needle", "question", "answer", "num_choices", "seed")
    content = {
        "checkpoint": str(request.weights.folder),
        "corpus": config.data.validation,
        "context_length": config.schedule.context_length,
        "rotary_base": config.model.rotary_base,
        "rotary_scaling": None if config.model.rotary_scaling is None else asdict(config.model.rotary_scaling),
        "block_size": request.names[0],
        "likelihood": asdict(config.likelihood),
        **{name: getattr(config, name) for name in settings},
        "needles": [asdict(cell) for cell in cells],
        "by_position": [asdict(item) for item in stretches],
    }
    with parents_made(target):
        write_json(target, content, indent=1)
        write_bytes(_picture_of(target), picture(cells, stretches, config.num_choices))
    Console(highlight=False, soft_wrap=True).print(Text(f"written to {target} and {_picture_of(target).name}"))


def _picture_of(target: Path) -> Path:
    return target.with_suffix(".png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in words or "--help" in words:
        Console(highlight=False, soft_wrap=True).print(Text(str(__doc__)))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    request, target, cells, stretches = measure(compose_words(words))
    if is_rank_zero():
        show(cells, stretches)
        write(request, target, cells, stretches)
    return 0


if __name__ == "__main__":
    run_command(main)
