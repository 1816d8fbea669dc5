"""A tokenizer folder in HF's format (tokenizer.json, tokenizer_config.json), as far as tokenizing a corpus needs it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

# Looked for where tokenizer_config.json names no mask token.
_USUAL_MASK_TOKEN = "<|mask|>"


def tokenizer_fingerprint(folder: str | Path) -> str:
    """SHA-256 of a tokenizer folder's tokenizer.json: equal for equal tokenizers, wherever they lie."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer ({folder}) must be a folder with a tokenizer.json (a HF fast tokenizer).")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class TextTokenizer:
    """Turns text, and nothing but text, into tokens.

    A document may well contain the words "<|mask|>": they are encoded letter by letter, as special
    tokens never come from text.

    Attributes:
        fingerprint: of tokenizer.json.
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
        folder = Path(folder)
        fingerprint = tokenizer_fingerprint(folder)
        config = _read_object(folder / "tokenizer_config.json") | _read_object(folder / "special_tokens_map.json")
        description = _read_object(folder / "tokenizer.json")
        names = {name: _content(config.get(f"{name}_token")) for name in ("eos", "pad", "mask")}
        if names["eos"] is None:
            raise ValueError(
                f"tokenizer ({folder}) names no eos_token in tokenizer_config.json; "
                "name the token that ends a document."
            )
        for token in description.get("added_tokens", []):
            if token["content"] in names.values() or token["content"] == _USUAL_MASK_TOKEN:
                token["special"] = True  # or it would be found in text
        try:
            tokenizer = Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"tokenizer ({folder}) has a tokenizer.json that cannot be read: {error}.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        ids = {name: None if content is None else tokenizer.token_to_id(content) for name, content in names.items()}
        if ids["eos"] is None:
            raise ValueError(
                f"tokenizer ({folder}) has no token for its eos_token ({names['eos']}); correct tokenizer_config.json."
            )
        mask_token_id = tokenizer.token_to_id(_USUAL_MASK_TOKEN) if names["mask"] is None else ids["mask"]
        return cls(
            fingerprint=fingerprint,
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            eos_token_id=ids["eos"],
            mask_token_id=mask_token_id,
            pad_token_id=ids["pad"],
            _tokenizer=tokenizer,
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of every text, without special tokens at either end."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} (not JSON) must be a file of a HF tokenizer: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} ({type(value).__name__}) must hold a JSON object.")
    return value


def _content(token: str | dict[str, Any] | None) -> str | None:
    """HF writes a special token as a string, or as an object with its content."""
    return token["content"] if isinstance(token, dict) else token
