"""Decode the same questions in many ways, and see what speed costs: accuracy against tokens per forward pass.

    python -m megatron_dllm.study checkpoint=DIR [checkpoint=DIR ...] output=study.json [key=value ...]
    torchrun --nproc_per_node N -m megatron_dllm.study ... [tensor_model_parallel_size=2]

Every DIR is a folder as of generate whose tokenizer has a chat template. The questions are held-out ones of tasks
whose answers a program can check (`tasks=[sort,add]`), tasks of lm-evaluation-harness that have a model write
(`tasks=[gsm8k]`, or a YAML file), or chats of a file (`chats_file=FILE`). Each is decoded at every block size, rule and
value: `block_sizes=[8,32] rules=[threshold,factor,hierarchy] thresholds=[0.7,0.9]`. The table, written to the JSON file
with a picture beside it, says which points no other beats. Keys and defaults: `config.StudyConfig`, and by `--help`.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_dllm.compose import compose_dict
from megatron_dllm.config import ParallelConfig, RotaryScalingConfig, RunConfig
from megatron_dllm.config.asking import AskingConfig
from megatron_dllm.config.command_line import taken_as_typed
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.config.reference import keys_of
from megatron_dllm.config.study import StudyConfig
from megatron_dllm.data.chat import question_of
from megatron_dllm.data.tokenizer import load_tokenizer
from megatron_dllm.evaluation.harness.installed import check_installed
from megatron_dllm.evaluation.questions import Question, read_questions
from megatron_dllm.evaluation.study_results import COLUMNS, Study, write_studies
from megatron_dllm.evaluation.tasks.catalogue import TASKS
from megatron_dllm.evaluation.tasks.task import questions
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from megatron_dllm.inference.prompts import encode_requests
from megatron_dllm.inference.source import read_source
from megatron_dllm.run.place import is_rank_zero, world_size
from megatron_dllm.run.stream import check_new

if TYPE_CHECKING:
    from megatron_dllm.evaluation.harness.decoded_tasks import WrittenTasks
    from megatron_dllm.evaluation.studying import Asked

log = logging.getLogger(__name__)
_AS_TYPED = ("checkpoint", "chats_file", "output", "tokenizer", "include_path", "system_instruction")
_TASK_SEED = 1
_WIDTH = 120


@dataclass(frozen=True)
class _Plan:
    """What rank 0 has read and decided."""

    questions: list[Question]
    asked: list[Asked]
    layouts: list[ParallelConfig]


def study(config: StudyConfig) -> list[Study]:
    """Measure all checkpoints (a collective); nothing is written.

    Raises:
        ValueError: an impossible setting, checkpoint or question; before weights are read wherever possible.
    """
    config.validate()
    # megatron-core takes seconds to import, which a wrong key should not cost.
    from megatron_dllm.parallel.meeting import meet

    run = RunConfig(name="study")
    meeting = meet(run)
    tasks: list[WrittenTasks] = []
    plan = meeting.decide(lambda: _plan(config, tasks))
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.evaluation.studying import study_checkpoint
    from megatron_dllm.parallel.groups import started

    # The other ranks find the data where rank 0 has put them.
    tasks = tasks or _tasks(config)
    with started(plan.layouts[0], run, meeting) as groups:
        return [
            study_checkpoint(config, name, plan.questions, asked, layout, groups, tasks[0] if tasks else None)
            for name, asked, layout in zip(config.checkpoint, plan.asked, plan.layouts, strict=True)
        ]


def _plan(config: StudyConfig, tasks: list[WrittenTasks]) -> _Plan:
    """Read what is asked; tasks of lm-evaluation-harness, which no other rank can be sent, go into a list."""
    from megatron_dllm.parallel.device import DeviceFacts

    if config.output is not None:
        for path in (Path(config.output), _picture_of(Path(config.output))):
            check_new(path)
    for warning in warnings(config):
        log.warning(warning)
    found = _questions(config)
    tasks += _tasks(config)
    asked = [_ask(config, checkpoint, found) for checkpoint in config.checkpoint]
    is_cuda = DeviceFacts.here().is_cuda
    layouts = [
        config.source(name).layout(one.source.model, world_size(), is_cuda)
        for name, one in zip(config.checkpoint, asked, strict=True)
    ]
    return _Plan(found, asked, layouts)


def _questions(config: StudyConfig) -> list[Question]:
    """What is asked: a file's chats, or held-out questions of the tasks."""
    if config.chats_file is not None:
        return read_questions(Path(config.chats_file), config.num_questions, "chats_file")
    return [
        Question(name, question_of({"messages": [{"role": "user", "content": text}]}), TASKS[name].answer(text))
        for name in (TASKS if not config.tasks else [name for name in config.tasks if name in TASKS])
        for text in islice(questions(TASKS[name], _TASK_SEED, held_out=True), config.num_questions)
    ]


def warnings(config: StudyConfig) -> list[str]:
    """Settings without effect, a sentence each."""
    if any(name not in TASKS for name in config.tasks):
        return []
    theirs = {item.name for item in fields(AskingConfig)} | {"filter"}
    return [
        f"{item.name} ({getattr(config, item.name)}) has no effect without a task of lm-evaluation-harness; name one "
        "in tasks, or leave it out."
        for item in fields(StudyConfig)
        if item.name in theirs and getattr(config, item.name) != item.default
    ]


def _tasks(config: StudyConfig) -> list[WrittenTasks]:
    """The tasks of lm-evaluation-harness as one, or none.

    Raises:
        ValueError: a task that neither this program nor the harness knows, or that writes no text.
    """
    names = [name for name in config.tasks if name not in TASKS]
    if not names:
        return []
    check_installed()
    from megatron_dllm.host import quiet_libraries

    quiet_libraries()
    from megatron_dllm.evaluation.harness.decoded_tasks import WrittenTasks

    try:
        return [WrittenTasks.load(names, config, config.num_questions, config.filter)]
    except ValueError as error:
        raise ValueError(f"{error} Tasks of this program are {', '.join(TASKS)}.") from None


def _ask(config: StudyConfig, checkpoint: str, found: Sequence[Question]) -> Asked:
    from megatron_dllm.evaluation.studying import Asked

    source = read_source(config.source(checkpoint))
    if source.contract.shift:
        raise ValueError(
            f"{source.folder}: contract.shift (true) predicts tokens at the slot before them, and a study judges those "
            "at their own; ask for texts with megatron_dllm.generate or megatron_dllm.harness."
        )
    tokenizer = load_tokenizer(TokenizerFiles(source.tokenizer))
    prompts, contract = encode_requests([question.chat for question in found], tokenizer, source)
    answers = [tokenizer.encode(question.expected, add_special_tokens=False).ids for question in found]
    end = contract.eos_token_ids[-1]
    return Asked(source, [prompt.ids for prompt in prompts], [[*ids, end] for ids in answers], contract)


def show(studies: Sequence[Study]) -> None:
    """Print a table of all points; a star marks those that no other point of the checkpoint beats."""
    table = Table("checkpoint", *COLUMNS, "")
    for one in studies:
        front = one.front()
        for point in one.points:
            table.add_row(*map(Text, (one.name, *point.cells(), "*" if point in front else "")))
    # A file or a narrow terminal would cut the columns short.
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, _WIDTH))
    console.print(table)
    for one in studies:
        console.print(Text(f"{one.checkpoint}: {one.conditions}"))


def write(path: Path, studies: Sequence[Study]) -> None:
    """Write the file and the picture beside it."""
    from megatron_dllm.reporting.study import picture
    from megatron_dllm.run.files import write_bytes

    write_studies(path, studies)
    write_bytes(_picture_of(path), picture(studies))
    log.info("wrote %s and %s", path, _picture_of(path))


def _picture_of(path: Path) -> Path:
    return path.with_suffix(".png")


def parse_arguments(arguments: Sequence[str]) -> StudyConfig:
    """Compose study.yaml with `key=value` arguments; paths are taken as they are typed.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    recipes, words = split_folder(arguments)
    texts, others = taken_as_typed(words, _AS_TYPED)
    # Open, not null: Hydra can put a group of values in the place of what has none, but not of null.
    ConfigStore.instance().store(name="study_schema", node=StudyConfig(rotary_scaling=MISSING))
    composed: Any = OmegaConf.to_container(compose_dict(others, "study", recipes, StudyConfig), resolve=True)
    composed["rotary_scaling"] = RotaryScalingConfig.of(composed["rotary_scaling"])
    checkpoints = texts.pop("checkpoint", [])
    for key, values in texts.items():
        if len(values) > 1:
            raise ValueError(f"{key} ({values[1][:80]}) is given twice; give it once.")
    return StudyConfig(**(composed | {"checkpoint": checkpoints} | {key: value for key, (value,) in texts.items()}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "-h" in arguments or "--help" in arguments:
        defaults = "\n".join(f"    {key.name}={key.default}" for key in keys_of(StudyConfig))
        Console(highlight=False, soft_wrap=True).print(Text(f"{__doc__}\n{defaults}"))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_dllm").setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    # A notebook's display has no part in pictures that go to a file.
    os.environ.pop("MPLBACKEND", None)
    config = parse_arguments(arguments)
    studies = study(config)
    if is_rank_zero():
        show(studies)
        if config.output is not None:
            write(Path(config.output), studies)
    return 0


if __name__ == "__main__":
    run_command(main)
