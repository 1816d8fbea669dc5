"""What the studies of conversion train on: questions with answers that can be checked, as text and as chats.

A model of a hundred thousand weights learns documents of a few questions with their answers in minutes: the AR model
then knows something that a conversion can keep or lose, and what is left to learn is large beside the spread between
seeds. On source code, studies as short moved the ELBO by less than their seeds did. Held-out documents ask held-out
questions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from megatron_dllm.data.chat_encoding import ChatEncoding
from megatron_dllm.data.corpus_writing import tokenize_corpus
from megatron_dllm.data.stdlib_corpus import build
from megatron_dllm.evaluation.tasks.catalogue import TASKS
from megatron_dllm.evaluation.tasks.chats import write_chats
from megatron_dllm.evaluation.tasks.task import is_held_out
from megatron_dllm.run.files import write_text

CONTEXT_LENGTH = 256
VOCAB_SIZE, EOS, PAD, MASK = 512, 0, 1, 2  # as `data.stdlib_corpus` numbers them

TEXT, VALIDATION, CHATS, QUESTIONS = "train", "validation", "chats", "questions/held_out.jsonl"
TOKENIZER = "code/tokenizer"
_FEWEST, _MOST = 4, 12  # questions of a document
_HELD_OUT = 0.05  # held-out documents for a document to train on


def documents(number: int, held_out: bool) -> Iterator[str]:
    """So many documents of questions with their answers, the same ones each time; questions may recur."""
    source = random.Random(f"documents:{held_out}")
    tasks = list(TASKS.values())
    for _ in range(number):
        lines = []
        for _ in range(source.randint(_FEWEST, _MOST)):
            task = source.choice(tasks)
            question = task.ask(source)
            while is_held_out(question) != held_out:
                question = task.ask(source)
            lines += [question, task.answer(question)]
        yield "".join(f"{line}\n" for line in lines)


def write_corpora(
    folder: Path,
    num_documents: int = 16_000,
    max_bytes: int = 1_000_000,
    num_chats: int = 2000,
    num_questions: int = 20,
) -> None:
    """Write the tokenizer, the corpora TEXT, VALIDATION and CHATS, and the file QUESTIONS; once.

    Args:
        folder: of the study.
        num_documents: to train on.
        max_bytes: of the source code from which the tokenizer is learned.
        num_chats: of each task.
        num_questions: of each task, held out.
    """
    if (folder / f"{CHATS}.json").is_file():  # the last one
        return
    print(f"writing the corpora of {folder}", flush=True)
    build(folder / "code", vocab_size=VOCAB_SIZE, validation_fraction=0.125, max_bytes=max_bytes)
    tokenizer, questions = str(folder / TOKENIZER), (folder / QUESTIONS).parent
    for name, number in ((TEXT, num_documents), (VALIDATION, round(_HELD_OUT * num_documents))):
        lines = (json.dumps({"text": text}) + "\n" for text in documents(number, held_out=name == VALIDATION))
        write_text(folder / f"{name}.jsonl", "".join(lines))
        tokenize_corpus([str(folder / f"{name}.jsonl")], tokenizer, str(folder / name), overwrite=True)
    if not questions.is_dir():
        write_chats(questions, num_chats, num_questions)
    tokenize_corpus(
        [str(questions / "train.jsonl")],
        tokenizer,
        str(folder / CHATS),
        chats=ChatEncoding(tokenizer, max_length=CONTEXT_LENGTH),
        overwrite=True,
    )
