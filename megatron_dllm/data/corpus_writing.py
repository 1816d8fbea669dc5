"""From files of raw documents to a corpus, whose files are complete or absent.

Everything is written under temporary names, and moved into place together. The corpus does not depend on the number of
processes that tokenize.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_dllm.data.encoding import EncodedBatch, Encoding, TextEncoding, join_spans
from megatron_dllm.data.encoding_processes import encode_in_order, encoding_processes
from megatron_dllm.data.listing import list_files
from megatron_dllm.data.pair_encoding import TemplateEncoding
from megatron_dllm.data.reading import read_batches
from megatron_dllm.data.spans import Spans
from megatron_dllm.data.spans_file import write_spans
from megatron_dllm.data.sums_file import write_sums
from megatron_dllm.data.tokenizer import TextTokenizer
from megatron_dllm.hf.tokenizer_folder import chat_template_fingerprint
from megatron_dllm.run.command import uninterrupted
from megatron_dllm.run.files import naming, parents_made, write_json

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

logger = logging.getLogger(__name__)

_NUM_SHOWN = 20
_BATCHES_PER_WORKER = 4
_LONGEST_DOCUMENT = 2**31 - 1  # .idx holds lengths as int32
_OUTPUTS = (".bin", ".idx", ".spans", ".sums", ".json")


@dataclass
class TokenizeCounts:
    """What went in and what came out; `num_tokens` includes the end-of-text tokens, `tally` is of chats and pairs."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_empty_documents: int = 0
    num_bad_lines: int = 0
    max_token_id: int = 0
    tally: Counter[str] = field(default_factory=Counter)

    @property
    def num_seen(self) -> int:
        """Texts, chats or pairs that were read."""
        num_good = self.tally["num_chats"] + self.tally["num_pairs"] if self.tally else self.num_documents
        return num_good + self.num_empty_documents + self.num_bad_lines

    def described(self) -> dict[str, int]:
        """All counts by name."""
        own = {name: value for name, value in vars(self).items() if name != "tally"}
        return own | self.tally

    def add(self, batch: EncodedBatch) -> None:
        """Count one more batch."""
        self.num_documents += len(batch.lengths)
        self.num_tokens += len(batch.tokens)
        self.num_bytes += batch.num_bytes
        self.num_empty_documents += batch.num_empty
        self.num_bad_lines += len(batch.bad)
        self.max_token_id = max(self.max_token_id, int(batch.tokens.max(initial=0)))
        self.tally.update(batch.tally)


def tokenize_corpus(
    inputs: list[str],
    tokenizer: str,
    output: str,
    *,
    num_workers: int = 1,
    text_key: str = "text",
    chats: TemplateEncoding | None = None,
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
        chats: the inputs hold chats or pairs, which become documents in this way; None: they hold text.
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
    description = _describe_tokenizer(tokenizer, chats)
    key = None if chats else text_key
    listing = list_files(inputs, key)
    _note_left_out(listing.left_out)
    encoding = chats or TextEncoding(tokenizer, text_key)
    temporary = f"{output}.tmp-{os.getpid()}"
    with parents_made(Path(output)):
        try:
            counts = _write(listing.files, key, encoding, description["vocab_size"], temporary, num_workers)
            _move_bad_lines(temporary, output, counts)
            _check_counts(counts, max_bad_fraction, output, chats)
            description |= {"fingerprint": write_sums(temporary)}
            _describe(temporary + ".json", description, counts, inputs, listing.left_out)
            with uninterrupted():
                _move_into_place(temporary, output, is_chat=chats is not None)
        finally:
            for suffix in (*_OUTPUTS, ".bad_lines.txt"):
                Path(temporary + suffix).unlink(missing_ok=True)
    return counts


def _move_into_place(temporary: str, output: str, *, is_chat: bool) -> None:
    for suffix in reversed(_OUTPUTS):  # .json stands for a complete corpus: first to go, last to come
        Path(output + suffix).unlink(missing_ok=True)
    for suffix in _OUTPUTS:
        if suffix != ".spans" or is_chat:
            os.replace(temporary + suffix, output + suffix)


def _write(
    files: list[Path], text_key: str | None, encoding: Encoding, vocab_size: int, temporary: str, num_workers: int
) -> TokenizeCounts:
    counts, spans = TokenizeCounts(), list[Spans]()
    with encoding_processes(num_workers, encoding) as executor:
        executor.submit(int).result()  # forks while this process has no other thread
        builder = _open_builder(temporary + ".bin", vocab_size)
        with (
            open(temporary + ".bad_lines.txt", "w", encoding="utf-8", errors="backslashreplace") as bad_lines,
            _progress() as progress,
        ):
            task = progress.add_task("tokenizing", total=sum(file.stat().st_size for file in files), tokens=0)
            batches = read_batches(files, text_key)
            for raw, encoded in encode_in_order(executor, batches, num_workers * _BATCHES_PER_WORKER):
                with naming(Path(temporary)):
                    _append(builder, encoded)
                    _note_bad(bad_lines, encoded.bad, counts.num_bad_lines)
                counts.add(encoded)
                spans += [encoded.spans] if encoded.spans is not None else []
                progress.update(task, advance=raw.num_input_bytes, tokens=counts.num_tokens)
    with naming(Path(temporary)):
        builder.finalize(temporary + ".idx")
    if spans:
        write_spans(Path(temporary + ".spans"), join_spans(spans))
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


def _check_counts(counts: TokenizeCounts, max_bad_fraction: float, output: str, chats: TemplateEncoding | None) -> None:
    num_seen = counts.num_seen
    if counts.num_bad_lines > max_bad_fraction * num_seen:
        raise ValueError(
            f"bad documents ({counts.num_bad_lines} of {num_seen}) are more than max_bad_fraction "
            f"({max_bad_fraction}) allows; all are listed in {output}.bad_lines.txt: "
            "repair them or raise --max_bad_fraction."
        )
    if counts.num_documents == 0 and counts.tally and chats is not None:
        raise ValueError(
            f"the input ({num_seen} {chats.plural}, {counts.num_bad_lines} of them bad) holds no document to train on; "
            f"{chats.left_out(counts.tally)}: give more {chats.plural}, or a larger max_length."
        )
    if counts.num_documents == 0:
        raise ValueError(
            f"the input ({num_seen} documents, {counts.num_empty_documents} of them empty) holds no text; give some."
        )


def _describe_tokenizer(folder: str, chats: TemplateEncoding | None) -> dict[str, Any]:
    """What a corpus says of its tokenizer and of how chats became documents; refuses a folder that lacks either."""
    tokenizer = TextTokenizer.load(folder)
    description = {
        "format": 1,
        "tokenizer": os.path.abspath(folder),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    if chats is None:
        return description
    chats.validate()
    chats.load()  # refuses a template that is of no use
    settings = {"max_length": chats.max_length, "overlong": chats.overlong}
    template = {"kind": chats.kind, "chat_template_sha256": chat_template_fingerprint(Path(folder))}
    return description | template | settings


def _describe(
    path: str, tokenizer: dict[str, Any], counts: TokenizeCounts, inputs: list[str], left_out: list[str]
) -> None:
    sources = {"sources": [os.path.abspath(name) for name in inputs], "left_out": left_out}
    write_json(Path(path), tokenizer | counts.described() | sources, indent=2)
