"""Tokenizes text into Megatron's .bin/.idx, the documents in the order of the input.

    python -m megatron_dllm.data.tokenize --input PATH ... --tokenizer DIR --output PREFIX

Every document ends in the tokenizer's end-of-text token. Writes PREFIX.bin and PREFIX.idx, and
PREFIX.json that says from what and with which tokenizer they were made; all under temporary names until
they are complete. The output does not depend on the number of workers. Documents that cannot be read are
counted and listed in PREFIX.bad_lines.txt; more of them than `--max_bad_fraction` is an error. What is left out of a
folder (unknown extensions, hidden files, second links to a file) is listed in PREFIX.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_dllm.data.formats import KNOWN
from megatron_dllm.data.listing import list_files
from megatron_dllm.data.reading import BadDocumentError, RawBatch, RawDocument, decode_document, read_batches
from megatron_dllm.data.tokenizer import TextTokenizer
from megatron_dllm.run.files import write_json

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

logger = logging.getLogger("megatron_dllm.data.tokenize")  # also where this module runs as __main__

_NUM_SHOWN = 20
_BATCHES_PER_WORKER = 4
_LONGEST_DOCUMENT = 2**31 - 1  # .idx holds lengths as int32
_OUTPUTS = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of a batch as tokens, each with its end-of-text token.

    Attributes:
        tokens: [n] int32 of all documents, one after the other.
        lengths: [d] tokens of every document.
        num_bytes: UTF-8 bytes of their text.
        num_empty: documents without text, left out.
        bad: `source: reason` of every document that could not be read.
    """

    tokens: NDArray[np.int32]
    lengths: list[int]
    num_bytes: int
    num_empty: int
    bad: list[str]


@dataclass
class TokenizeCounts:
    """What went in and what came out; `num_tokens` includes the end-of-text tokens."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_empty_documents: int = 0
    num_bad_lines: int = 0
    max_token_id: int = 0

    def add(self, batch: EncodedBatch) -> None:
        """Count one more batch."""
        self.num_documents += len(batch.lengths)
        self.num_tokens += len(batch.tokens)
        self.num_bytes += batch.num_bytes
        self.num_empty_documents += batch.num_empty
        self.num_bad_lines += len(batch.bad)
        self.max_token_id = max(self.max_token_id, int(batch.tokens.max(initial=0)))


def encode_batch(tokenizer: TextTokenizer, documents: list[RawDocument], text_key: str) -> EncodedBatch:
    """Decode and tokenize documents; empty and bad ones are left out and counted."""
    texts, bad, num_empty = [], [], 0
    for document in documents:
        try:
            text = decode_document(document, text_key)
        except BadDocumentError as error:
            bad.append(f"{document.source}: {error}")
            continue
        if text:
            texts.append(text)
        else:
            num_empty += 1
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer.encode(texts)]
    tokens = np.concatenate([np.zeros(0, np.int32), *[np.array(ids, np.int32) for ids in encoded]])
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return EncodedBatch(tokens, [len(ids) for ids in encoded], num_bytes, num_empty, bad)


class _Worker:
    """What a worker process needs, loaded once when it starts."""

    tokenizer: TextTokenizer
    text_key: str

    @classmethod
    def start(cls, folder: str, text_key: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism
        cls.tokenizer, cls.text_key = TextTokenizer.load(folder), text_key

    @classmethod
    def encode(cls, documents: list[RawDocument]) -> EncodedBatch:
        return encode_batch(cls.tokenizer, documents, cls.text_key)


def tokenize_corpus(
    inputs: list[str],
    tokenizer: str,
    output: str,
    *,
    num_workers: int = 1,
    text_key: str = "text",
    max_bad_fraction: float = 0.01,
    overwrite: bool = False,
) -> TokenizeCounts:
    """Tokenize `inputs` into the corpus `output`.

    Args:
        inputs: files and folders, in order.
        tokenizer: folder of a HF fast tokenizer.
        output: prefix of the files to write.
        num_workers: processes that tokenize.
        text_key: key or column that holds the text.
        max_bad_fraction: share of documents that may be unreadable.
        overwrite: replace an existing corpus.

    Returns:
        The counts, which PREFIX.json holds too.

    Raises:
        ValueError: for unusable inputs, an existing output, no text at all, or too many bad documents;
            the output then is as it was.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers ({num_workers}) must be at least 1.")
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction ({max_bad_fraction}) must lie in [0, 1].")
    existing = [output + suffix for suffix in _OUTPUTS if os.path.exists(output + suffix)]
    if existing and not overwrite:
        raise ValueError(f"output ({', '.join(existing)}) exists; choose another --output or add --overwrite.")
    listing = list_files(inputs, text_key)
    _note_left_out(listing.left_out)
    loaded = TextTokenizer.load(tokenizer)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{output}.tmp-{os.getpid()}"
    try:
        counts = _write(listing.files, tokenizer, loaded, temporary, num_workers, text_key)
        _move_bad_lines(temporary, output, counts)
        _check_counts(counts, max_bad_fraction, output)
        _describe(temporary + ".json", counts, loaded, tokenizer, inputs, listing.left_out)
        for suffix in reversed(_OUTPUTS):  # .json stands for a complete corpus: first to go, last to come
            Path(output + suffix).unlink(missing_ok=True)
        for suffix in _OUTPUTS:
            os.replace(temporary + suffix, output + suffix)
    finally:
        for suffix in (*_OUTPUTS, ".bad_lines.txt"):
            Path(temporary + suffix).unlink(missing_ok=True)
    return counts


def _write(
    files: list[Path], folder: str, tokenizer: TextTokenizer, temporary: str, num_workers: int, text_key: str
) -> TokenizeCounts:
    counts = TokenizeCounts()
    with ProcessPoolExecutor(num_workers, get_context("fork"), _Worker.start, (folder, text_key)) as executor:
        executor.submit(int).result()  # forks while this process has no other thread
        builder = _open_builder(temporary + ".bin", tokenizer.vocab_size)
        with (
            open(temporary + ".bad_lines.txt", "w", encoding="utf-8", errors="backslashreplace") as bad_lines,
            _progress() as progress,
        ):
            task = progress.add_task("tokenizing", total=sum(file.stat().st_size for file in files), tokens=0)
            batches = read_batches(files, text_key)
            for raw, encoded in _encode_in_order(executor, batches, num_workers * _BATCHES_PER_WORKER):
                _append(builder, encoded)
                _note_bad(bad_lines, encoded.bad, counts.num_bad_lines)
                counts.add(encoded)
                progress.update(task, advance=raw.num_input_bytes, tokens=counts.num_tokens)
    builder.finalize(temporary + ".idx")
    return counts


def _open_builder(path: str, vocab_size: int) -> IndexedDatasetBuilder:
    """The writer of `path`, in the smallest integers that hold the vocabulary."""
    # Imported here because it takes seconds, and a mistake in the arguments should show at once.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about optimizers that are not installed
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    return IndexedDatasetBuilder(path, dtype=DType.optimal_dtype(vocab_size))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _encode_in_order(
    executor: ProcessPoolExecutor, batches: Iterable[RawBatch], num_ahead: int
) -> Iterator[tuple[RawBatch, EncodedBatch]]:
    """Results in the order of the batches, reading at most `num_ahead` batches ahead of the slowest."""
    pending: deque[tuple[RawBatch, Future[EncodedBatch]]] = deque()
    for batch in batches:
        pending.append((batch, executor.submit(_Worker.encode, batch.documents)))
        if len(pending) > num_ahead:
            raw, future = pending.popleft()
            yield raw, future.result()
    for raw, future in pending:
        yield raw, future.result()


def _append(builder: IndexedDatasetBuilder, batch: EncodedBatch) -> None:
    start = 0
    for length in batch.lengths:
        if length > _LONGEST_DOCUMENT:
            raise ValueError(
                f"a document of {length} tokens is too long for an .idx file ({_LONGEST_DOCUMENT}); split the text."
            )
        builder.add_document(batch.tokens[start : start + length], [length])
        start += length


def _note_bad(file: TextIO, bad: list[str], num_before: int) -> None:
    for number, line in enumerate(bad, start=num_before):
        file.write(line + "\n")
        if number < _NUM_SHOWN:
            logger.warning("bad document %s", line)


def _note_left_out(left_out: list[str]) -> None:
    for entry in left_out[:_NUM_SHOWN]:
        logger.warning("left out %s", entry)
    if len(left_out) > _NUM_SHOWN:
        logger.warning("left out %d more, listed in the corpus's .json", len(left_out) - _NUM_SHOWN)


def _move_bad_lines(temporary: str, output: str, counts: TokenizeCounts) -> None:
    """The list stays also where the corpus is refused: it is what the user needs then."""
    if counts.num_bad_lines:
        os.replace(temporary + ".bad_lines.txt", output + ".bad_lines.txt")
    else:
        Path(output + ".bad_lines.txt").unlink(missing_ok=True)


def _check_counts(counts: TokenizeCounts, max_bad_fraction: float, output: str) -> None:
    num_seen = counts.num_documents + counts.num_empty_documents + counts.num_bad_lines
    if counts.num_bad_lines > max_bad_fraction * num_seen:
        raise ValueError(
            f"bad documents ({counts.num_bad_lines} of {num_seen}) are more than max_bad_fraction "
            f"({max_bad_fraction}) allows; all are listed in {output}.bad_lines.txt: "
            "repair them or raise --max_bad_fraction."
        )
    if counts.num_documents == 0:
        raise ValueError(
            f"the input ({num_seen} documents, {counts.num_empty_documents} of them empty) holds no text; give some."
        )


def _describe(
    path: str, counts: TokenizeCounts, tokenizer: TextTokenizer, folder: str, inputs: list[str], left_out: list[str]
) -> None:
    description = {
        "format": 1,
        "tokenizer": os.path.abspath(folder),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        **vars(counts),
        "sources": [os.path.abspath(name) for name in inputs],
        "left_out": left_out,
    }
    write_json(Path(path), description, indent=2)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dllm.data.tokenize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, help=f"files or folders: {KNOWN}")
    parser.add_argument("--tokenizer", required=True, help="folder of a HF fast tokenizer")
    parser.add_argument("--output", required=True, help="prefix of the files to write")
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)), help="tokenizing processes")
    parser.add_argument("--text_key", default="text", help="JSON key or parquet column of the text")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="share of unreadable documents allowed")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        counts = tokenize_corpus(
            options.input,
            options.tokenizer,
            options.output,
            num_workers=options.num_workers,
            text_key=options.text_key,
            max_bad_fraction=options.max_bad_fraction,
            overwrite=options.overwrite,
        )
    except (ValueError, OSError, BrokenProcessPool) as error:
        logger.error("%s", error)
        return 1
    logger.info(
        f"wrote {options.output}.bin, .idx and .json: {counts.num_documents:,} documents, "
        f"{counts.num_tokens:,} tokens, {counts.num_bytes:,} bytes of text "
        f"({counts.num_bytes / counts.num_tokens:.2f} a token); left out "
        f"{counts.num_empty_documents:,} empty and {counts.num_bad_lines:,} bad documents"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
