"""What the studies of conversion train on: Python's standard library as text, and chats whose answers can be checked.

The vocabulary is small, so that a model of a few hundred thousand weights spends them on its layers.
"""

from __future__ import annotations

from pathlib import Path

from megatron_dllm.data.chat_encoding import ChatEncoding
from megatron_dllm.data.corpus_writing import tokenize_corpus
from megatron_dllm.data.stdlib_corpus import build
from megatron_dllm.evaluation.tasks.chats import write_chats

CONTEXT_LENGTH = 256
VOCAB_SIZE, EOS, PAD, MASK = 512, 0, 1, 2  # as `data.stdlib_corpus` numbers them
HELD_OUT = 0.125  # share of the documents

TEXT, VALIDATION, CHATS, QUESTIONS = "train", "validation", "chats", "questions/held_out.jsonl"
TOKENIZER = "text/tokenizer"


def write_corpora(folder: Path, max_bytes: int = 5_000_000, num_chats: int = 2000, num_questions: int = 20) -> None:
    """Write the tokenizer, the corpora TEXT, VALIDATION and CHATS, and the file QUESTIONS; once.

    Args:
        folder: of the study.
        max_bytes: of the text.
        num_chats: of each task.
        num_questions: of each task, held out.
    """
    if (folder / f"{CHATS}.json").is_file():  # the last one
        return
    print(f"writing the corpora of {folder}", flush=True)
    build(folder / "text", vocab_size=VOCAB_SIZE, validation_fraction=HELD_OUT, max_bytes=max_bytes)
    tokenizer, questions = str(folder / TOKENIZER), (folder / QUESTIONS).parent
    for name in (TEXT, VALIDATION):
        tokenize_corpus([str(folder / "text" / f"{name}.jsonl")], tokenizer, str(folder / name), overwrite=True)
    if not questions.is_dir():
        write_chats(questions, num_chats, num_questions)
    tokenize_corpus(
        [str(questions / "train.jsonl")],
        tokenizer,
        str(folder / CHATS),
        chats=ChatEncoding(tokenizer, max_length=CONTEXT_LENGTH),
        overwrite=True,
    )
