"""A tokenizer and a tokenized corpus from a few text files, for the examples beside this file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_dllm.data.corpus_writing import tokenize_corpus
from megatron_dllm.data.stdlib_corpus import save_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 512  # of recipes/experiment/own_text.yaml


def documents_of(files: Sequence[Path]) -> list[str]:
    """The files as documents; without any file, the sections of this project's own pages."""
    if files:
        return [file.read_text(encoding="utf-8") for file in files]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [section for page in pages for section in re.split(r"\n(?=## )", page.read_text(encoding="utf-8"))]


def make_tokenizer(documents: list[str], folder: Path) -> None:
    """Train a byte-level BPE with `VOCAB_SIZE` tokens and write it as a Hugging Face tokenizer folder."""
    save_tokenizer(train_tokenizer(documents, VOCAB_SIZE), folder)


def make_corpus(documents: list[str], folder: Path) -> list[str]:
    """Write FOLDER/tokenizer and the tokenized corpus FOLDER/text.

    Returns:
        The overrides that make a run read them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(documents, folder / "tokenizer")
    lines = [json.dumps({"text": document}) for document in documents]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenize_corpus([str(folder / "text.jsonl")], str(folder / "tokenizer"), str(folder / "text"), overwrite=True)
    return [f"data.train={folder}/text", f"data.tokenizer={folder}/tokenizer"]
