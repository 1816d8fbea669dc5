"""A tokenized corpus on disk: Megatron's PREFIX.bin and PREFIX.idx, and PREFIX.json that says what they are.

PREFIX.spans, where there is one, says which tokens may carry a loss; without it all of them may. PREFIX.sums has
checksums of all these files.

Whatever is wrong with the files is a ValueError when the corpus is opened or verified, or, for the tokens themselves,
when a segment is read. Opening takes the same time whatever the size; verifying reads the index, and not the tokens.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.index_file import check_files, check_index
from megatron_dllm.data.preference import PAIRS
from megatron_dllm.data.spans import Spans
from megatron_dllm.data.spans_file import read_spans
from megatron_dllm.data.sums_file import Sums, content_fingerprint, read_sums, sampled_fingerprint
from megatron_dllm.data.tokenizer import known_fingerprints
from megatron_dllm.hf.tokenizer_folder import chat_template_fingerprint
from megatron_dllm.run.files import read_json_object

_PAGES_LOOKED_AT = 1024  # of .bin, before a run starts
# What is read of PREFIX.json, where it is there.
_DESCRIBED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("num_tokens", "num_bytes", "max_token_id"), (int,)),
    **dict.fromkeys(("eos_token_id", "mask_token_id"), (int, type(None))),
    **dict.fromkeys(("tokenizer_fingerprint", "chat_template_sha256", "fingerprint", "kind"), (str, type(None))),
}


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
        chat_template: SHA-256 of the template that rendered the chats; None for text.
        is_paired: whether they are preference pairs, see `data.preference`.

    Raises:
        ValueError: where a file is missing, cut off, empty, or made with another tokenizer.
    """

    def __init__(self, prefix: str, model: ModelConfig, tokenizer: str | None = None) -> None:
        self.prefix = prefix
        self._opened_with = (prefix, model, tokenizer)
        self._vocab_size, self._mask_token_id = model.vocab_size, model.mask_token_id
        check_files(prefix)
        self._index = IndexedDataset(prefix)
        self._token_bytes: int = DType.size(self._index.index.dtype)
        self.document_lengths: NDArray[np.int32] = self._index.sequence_lengths
        spans_path = Path(prefix + ".spans")
        self.spans: Spans | None = read_spans(spans_path, len(self.document_lengths)) if spans_path.is_file() else None
        self.num_tokens = Path(prefix + ".bin").stat().st_size // self._token_bytes
        description = _read_description(prefix)
        self.num_bytes: int | None = description.get("num_bytes")
        self.chat_template: str | None = description.get("chat_template_sha256")
        self.is_paired: bool = description.get("kind") == PAIRS
        _check_description(prefix, description, model, tokenizer, self.num_tokens)
        if self.is_paired and (self.spans is None or len(self.document_lengths) % 2):
            raise ValueError(
                f"corpus {prefix} ({len(self.document_lengths)} documents, {'no' if self.spans is None else 'with'} "
                f"{spans_path.name}) must hold two documents of each pair, with their spans; tokenize the pairs again."
            )
        self._sums = read_sums(prefix)
        self._bin: NDArray[np.uint8] = np.memmap(prefix + ".bin", mode="r", dtype=np.uint8)
        self._stated_fingerprint = _stated_fingerprint(prefix, description, self._sums)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the files are opened again: mapped memory is not copied."""
        return type(self), self._opened_with

    @property
    def name(self) -> str:
        """The prefix."""
        return self.prefix

    @cached_property
    def fingerprint(self) -> str:
        """What tells this content from any other; from a sample of it where none was recorded when it was written."""
        return self._stated_fingerprint or sampled_fingerprint(self.prefix)

    def verify(self) -> None:
        """Look for damage before a run starts, on one rank: it takes time with the number of documents.

        Lengths are compared with pointers, .idx and .spans with all of their checksums, .bin with some of its own:
        the others are compared when they are read. Without PREFIX.sums, a recorded fingerprint is computed anew.

        Raises:
            ValueError: naming the file and place.
        """
        check_index(self.prefix)
        if self._sums is None:
            if self._stated_fingerprint not in (None, content_fingerprint(self.prefix)):
                raise ValueError(
                    f"corpus {self.prefix} differs from the fingerprint in {self.prefix}.json: it was damaged or "
                    "changed after it was written; copy or tokenize it again."
                )
            return
        for suffix, of_file in self._sums.files.items():
            of_file.check_some(_PAGES_LOOKED_AT if suffix == ".bin" else len(of_file.checksums))

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """[length] int64 tokens of a document from `offset` on; only these are read.

        Raises:
            ValueError: where one of them is outside the model's vocabulary, or is the mask token, or the file was
                damaged there.
        """
        if self._sums is not None:
            start = self._first_byte(document) + offset * self._token_bytes
            of_file = self._sums.files[".bin"]
            of_file.check(self._bin, of_file.pages_of(start, start + length * self._token_bytes))
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
        """Place of a token in the whole corpus: a number that identifies the segment that begins there.

        Of pairs it is the document's number, see `data.preference`; a later part of a document gets a number further
        on, which is even or odd as the document's is.
        """
        if self.is_paired:
            return document + offset * len(self.document_lengths)
        return self._first_byte(document) // self._token_bytes + offset

    def _first_byte(self, document: int) -> int:
        first_byte: int = self._index.index.sequence_pointers[document].item()
        return first_byte


def _read_description(prefix: str) -> dict[str, Any]:
    path = Path(prefix + ".json")
    if not path.is_file():
        return {}
    remedy = "copy the corpus again, or tokenize the text again"
    description = read_json_object(path, remedy)
    for name, kinds in _DESCRIBED.items():
        if name in description and type(description[name]) not in kinds:
            raise ValueError(f"{path}: {name} ({description[name]!r}) must be of type {kinds[0].__name__}; {remedy}.")
    return description


def recorded_fingerprint(prefix: str) -> str | None:
    """The fingerprint that was recorded when a corpus was written, if one was.

    Raises:
        ValueError: PREFIX.sums or PREFIX.json is damaged, or they are of different runs.
    """
    return _stated_fingerprint(prefix, _read_description(prefix), read_sums(prefix))


def _stated_fingerprint(prefix: str, description: dict[str, Any], sums: Sums | None) -> str | None:
    stated: str | None = description.get("fingerprint")
    of_sums = None if sums is None else sums.fingerprint
    if of_sums is not None and stated not in (None, of_sums):
        raise ValueError(
            f"{prefix}.sums (fingerprint {of_sums[:12]}) must be of the same run as {prefix}.json (fingerprint "
            f"{str(stated)[:12]}); copy or tokenize the corpus again."
        )
    return of_sums or stated


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
