"""Text into tokens, with the tokenizer that a folder holds (see hf/tokenizer_folder.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_dllm.hf.encoding_fingerprint import encoding_fingerprint
from megatron_dllm.hf.tokenizer_folder import MASK_TEXTS, TokenizerFiles, fingerprint


def tokenizer_fingerprint(folder: str | Path) -> str:
    """Hash of how a tokenizer folder encodes text: equal with and without a mask token, wherever the folder lies.

    Raises:
        ValueError: the folder has no tokenizer.json.
    """
    found = encoding_fingerprint(TokenizerFiles(Path(folder)))
    if found is None:
        raise ValueError(f"tokenizer ({folder}) must be a folder with a tokenizer.json (a HF fast tokenizer).")
    return found


def known_fingerprints(folder: str | Path) -> set[str | None]:
    """What a corpus made with this tokenizer may say of it: the above, or a hash of tokenizer.json by earlier versions.

    Raises:
        ValueError: the folder has no tokenizer.json.
    """
    return {tokenizer_fingerprint(folder), fingerprint(Path(folder))}


def load_tokenizer(files: TokenizerFiles, description: dict[str, Any] | None = None) -> Tokenizer:
    """The library's tokenizer, which finds special tokens in text; it neither cuts nor pads.

    Args:
        files: the folder.
        description: content of tokenizer.json to use instead of the folder's.

    Raises:
        ValueError: the library cannot read it.
    """
    try:
        tokenizer = Tokenizer.from_str(json.dumps(files.tokenizer if description is None else description))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"tokenizer ({files.folder}) has a tokenizer.json that cannot be read: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class TextTokenizer:
    """Turns text, and nothing but text, into tokens.

    A document may well contain the words "<|mask|>": they are encoded letter by letter, as special
    tokens never come from text.

    Attributes:
        fingerprint: of how it encodes text.
        vocab_size: largest token id + 1, special tokens included.
        eos_token_id: ends every document.
        mask_token_id: None where the tokenizer has none.
        pad_token_id: None where the tokenizer has none.
    """

    fingerprint: str
    vocab_size: int
    eos_token_id: int
    mask_token_id: int | None
    pad_token_id: int | None
    _tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        """Read a tokenizer folder.

        Raises:
            ValueError: where a file is missing or unreadable, or no end-of-text token is named.
        """
        found = tokenizer_fingerprint(folder)
        files = TokenizerFiles(Path(folder))
        eos = files.eos_id()
        if eos is None:
            raise ValueError(_no_eos(files))
        ids = {"eos": eos, "pad": files.special_id("pad_token"), "mask": files.mask_id()}
        tokenizer = load_tokenizer(files, _with_special_tokens(files, set(ids.values())))
        tokenizer.encode_special_tokens = True
        return cls(found, files.vocab_size, eos, ids["mask"], ids["pad"], tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of every text, without special tokens at either end."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _no_eos(files: TokenizerFiles) -> str:
    text = files.special_text("eos_token")
    if text is None:
        return (
            f"tokenizer ({files.folder}) names no eos_token in tokenizer_config.json; "
            "name the token that ends a document."
        )
    return f"tokenizer ({files.folder}) has no token for its eos_token ({text}); correct tokenizer_config.json."


def _with_special_tokens(files: TokenizerFiles, ids: set[int | None]) -> dict[str, Any]:
    """tokenizer.json with these tokens marked special, or they would be found in text; and all known mask tokens."""
    added = [
        {**token, "special": token.get("special") or token["id"] in ids or token["content"] in MASK_TEXTS}
        for token in files.tokenizer.get("added_tokens") or []
    ]
    return {**files.tokenizer, "added_tokens": added}
