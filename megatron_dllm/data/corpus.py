"""A tokenized corpus on disk: Megatron's PREFIX.bin and PREFIX.idx, and PREFIX.json that says what they are.

PREFIX.spans, where there is one, says which tokens may carry a loss; without it all of them may.

Whatever is wrong with the files is a ValueError when the corpus is opened, or, for the tokens
themselves, when a segment is read: nothing here reads the whole corpus.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.spans import Spans
from megatron_dllm.data.spans_file import read_spans
from megatron_dllm.data.tokenizer import known_fingerprints
from megatron_dllm.hf.tokenizer_folder import chat_template_fingerprint

_IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_IDX_MAGIC = b"MMIDIDX\x00\x00"


class Corpus:
    """Documents of tokens, memory-mapped.

    Args:
        prefix: path without suffix.
        model: whose vocabulary and special tokens the corpus must agree with.
        tokenizer: folder of the run's tokenizer, compared with the one that made the corpus; None: not compared.

    Attributes:
        document_lengths: [d] int32 tokens of every document, memory-mapped.
        num_tokens: tokens of all documents together.
        spans: of every document, memory-mapped; None where there is no PREFIX.spans.
        num_bytes: UTF-8 bytes of the text they came from; None where PREFIX.json is missing.

    Raises:
        ValueError: where a file is missing, cut off, empty, or made with another tokenizer.
    """

    def __init__(self, prefix: str, model: ModelConfig, tokenizer: str | None = None) -> None:
        self.prefix = prefix
        self._vocab_size, self._mask_token_id = model.vocab_size, model.mask_token_id
        _check_files(prefix)
        self._index = IndexedDataset(prefix)
        self._token_bytes: int = DType.size(self._index.index.dtype)
        self.document_lengths: NDArray[np.int32] = self._index.sequence_lengths
        spans_path = Path(prefix + ".spans")
        self.spans: Spans | None = read_spans(spans_path, len(self.document_lengths)) if spans_path.is_file() else None
        self.num_tokens = Path(prefix + ".bin").stat().st_size // self._token_bytes
        description = _read_description(prefix)
        self.num_bytes: int | None = description.get("num_bytes")
        _check_description(prefix, description, model, tokenizer, self.num_tokens)

    @property
    def name(self) -> str:
        """The prefix."""
        return self.prefix

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """[length] int64 tokens of a document from `offset` on; only these are read.

        Raises:
            ValueError: where one of them is outside the model's vocabulary, or is the mask token.
        """
        tokens: NDArray[np.int64] = self._index.get(document, offset, length).astype(np.int64)
        wrong = (tokens < 0) | (tokens >= self._vocab_size) | (tokens == self._mask_token_id)
        if wrong.any():
            place = int(np.argmax(wrong))
            rule = (
                "is the mask token, which no text may hold"
                if tokens[place] == self._mask_token_id
                else f"must lie in [0, model.vocab_size) = [0, {self._vocab_size})"
            )
            raise ValueError(
                f"token {int(tokens[place])} of corpus {self.prefix} (document {document}, token "
                f"{offset + place}) {rule}; tokenize the text with the model's own tokenizer."
            )
        return tokens

    def sample_id(self, document: int, offset: int) -> int:
        """Place of a token in the whole corpus: a number that identifies the segment that begins there."""
        first_byte: int = self._index.index.sequence_pointers[document].item()
        return first_byte // self._token_bytes + offset


@dataclass(frozen=True)
class _Header:
    token_bytes: int
    num_sequences: int
    num_boundaries: int

    @property
    def file_size(self) -> int:
        """Bytes of the .idx file: lengths, pointers and document boundaries behind the header."""
        return _IDX_HEADER.size + self.num_sequences * (4 + 8) + self.num_boundaries * 8


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        raw = file.read(_IDX_HEADER.size)
    if len(raw) < _IDX_HEADER.size or not raw.startswith(_IDX_MAGIC):
        raise ValueError(f"{path} ({len(raw)} bytes of header) must be a Megatron index; tokenize the corpus again.")
    _, version, code, num_sequences, num_boundaries = _IDX_HEADER.unpack(raw)
    names = {dtype.value: dtype.name for dtype in DType}
    if version != 1 or "int" not in names.get(code, ""):
        raise ValueError(
            f"{path} (version {version}, dtype code {code}) must be a version 1 index of integers; "
            "tokenize the corpus again."
        )
    return _Header(DType.size(code), num_sequences, num_boundaries)


def _check_files(prefix: str) -> None:
    paths = {suffix: Path(prefix + suffix) for suffix in (".bin", ".idx")}
    for path in paths.values():
        if not path.is_file():
            raise ValueError(
                f"corpus {prefix} has no {path.name}; give the prefix, without suffix, that "
                "python -m megatron_dllm.data.tokenize wrote (--output)."
            )
    header = _read_header(paths[".idx"])
    idx_size, bin_size = (paths[suffix].stat().st_size for suffix in (".idx", ".bin"))
    if idx_size != header.file_size:
        raise ValueError(
            f"{paths['.idx']} ({idx_size} bytes) must have {header.file_size} bytes for its "
            f"{header.num_sequences} documents; it is cut off or damaged: tokenize or copy it again."
        )
    if header.num_sequences == 0 or bin_size == 0:
        raise ValueError(
            f"corpus {prefix} ({header.num_sequences} documents, {bin_size} bytes) is empty; tokenize text that is not."
        )
    if header.num_boundaries != header.num_sequences + 1:
        raise ValueError(
            f"corpus {prefix} ({header.num_sequences} sequences in {header.num_boundaries - 1} documents) "
            "must have one sequence a document; tokenize it without splitting sentences."
        )
    expected = _end_of_last_sequence(paths[".idx"], header)
    if bin_size != expected:
        raise ValueError(
            f"{paths['.bin']} ({bin_size} bytes) must have the {expected} bytes that its .idx names; "
            "it is cut off or belongs to another index: tokenize or copy it again."
        )


def _end_of_last_sequence(path: Path, header: _Header) -> int:
    last = header.num_sequences - 1
    index = np.memmap(path, mode="r", dtype=np.uint8, offset=0)
    lengths_end = _IDX_HEADER.size + 4 * header.num_sequences
    length = index[_IDX_HEADER.size + 4 * last : lengths_end].view(np.int32)[0]
    pointer = index[lengths_end + 8 * last : lengths_end + 8 * header.num_sequences].view(np.int64)[0]
    return int(pointer) + int(length) * header.token_bytes


def _read_description(prefix: str) -> dict[str, Any]:
    path = Path(prefix + ".json")
    if not path.is_file():
        return {}
    description = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(description, dict):
        raise ValueError(f"{path} ({type(description).__name__}) must hold a JSON object; tokenize the corpus again.")
    return description


def _check_description(
    prefix: str, description: dict[str, Any], model: ModelConfig, tokenizer: str | None, num_tokens: int
) -> None:
    """What PREFIX.json says must agree with the model and the files; what it does not say is not checked."""
    stated = description.get("num_tokens", num_tokens)
    if stated != num_tokens:
        raise ValueError(
            f"corpus {prefix} ({num_tokens} tokens) must have the {stated} tokens that {prefix}.json "
            "names; the files are of different runs: tokenize again."
        )
    largest = description.get("max_token_id", 0)
    if largest >= model.vocab_size:
        raise ValueError(
            f"corpus {prefix} (largest token {largest}) must lie in [0, model.vocab_size) = "
            f"[0, {model.vocab_size}); tokenize the text with the model's own tokenizer."
        )
    for name in ("eos_token_id", "mask_token_id"):
        value = description.get(name)
        if value is not None and value != getattr(model, name):
            raise ValueError(
                f"model.{name} ({getattr(model, name)}) differs from the corpus {prefix} ({value}); "
                "tokenize the text with the model's own tokenizer, or correct the model's id."
            )
    fingerprint = description.get("tokenizer_fingerprint")
    if tokenizer is not None and fingerprint is not None and fingerprint not in known_fingerprints(tokenizer):
        raise ValueError(
            f"data.tokenizer ({tokenizer}) is not the tokenizer that made corpus {prefix} (it encodes text in another "
            "way); tokenize the text again with it."
        )
    template = description.get("chat_template_sha256")
    if tokenizer is not None and template is not None and chat_template_fingerprint(Path(tokenizer)) != template:
        raise ValueError(
            f"data.tokenizer ({tokenizer}) has another chat template than corpus {prefix} was made with, or none; "
            "tokenize the chats again with it, or give the tokenizer that made them."
        )
