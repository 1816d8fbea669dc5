"""The one reader of a tokenizer folder: which tokens there are, and which of them end, pad and mask.

The files are read as JSON; no tokenizer code runs. See data/tokenizer.py for turning text into tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dllm.run.files import read_json_object, refuse_dead_link, write_json

# The id that serving uses, by the vocabulary's size, and the text SDAR and LLaDA2 give the token.
RESERVED_MASK_IDS = {157184: (156895, "<|mask|>"), 151936: (151669, "<|MASK|>")}
MASK_TEXTS = ("<|mask|>", "<|MASK|>", "<mask>", "[MASK]")
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
# From which the end of a document is taken where the tokenizer names none.
GENERATION_FILE = "generation_config.json"


def tokenizer_files(folder: Path) -> list[Path]:
    """What a copy of a folder's tokenizer consists of: not the weights that lie beside it in a model folder.

    Raises:
        ValueError: one of them is a link that leads nowhere.
    """
    paths = [folder / name for name in (*TOKENIZER_FILES, GENERATION_FILE)]
    for path in paths:
        refuse_dead_link(path)
    return [path for path in paths if path.is_file()]


def fingerprint(folder: Path) -> str | None:
    """SHA-256 of tokenizer.json: equal for equal tokenizers, wherever they lie; None without that file."""
    path = folder / TOKENIZER_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def chat_template(folder: Path) -> str | None:
    """The text of a folder's chat template (jinja), None without one; of several that have names, the default.

    Raises:
        ValueError: a file that may hold it is not JSON.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _read_json(folder / name).get("chat_template")
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    return None


def chat_template_fingerprint(folder: Path) -> str | None:
    """SHA-256 of a folder's chat template, None without one."""
    text = chat_template(folder)
    return None if text is None else hashlib.sha256(text.encode("utf-8")).hexdigest()


class TokenizerFiles:
    """What the JSON files of a tokenizer say."""

    def __init__(self, folder: Path) -> None:
        """Read the files; a folder without any is allowed.

        Raises:
            ValueError: a file is not JSON, does not belong to a tokenizer, or is a link that leads nowhere.
        """
        tokenizer_files(folder)
        self.folder = folder
        self.tokenizer = _read_json(folder / TOKENIZER_FILE)
        self.config = _read_json(folder / "tokenizer_config.json")
        self.special = _read_json(folder / "special_tokens_map.json")
        self.generation = _read_json(folder / GENERATION_FILE)
        try:
            self.ids = self._ids()
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: the tokenizer's files name its tokens in an unknown way ({error!r}); download them again."
            ) from error
        self.texts = {token_id: text for text, token_id in self.ids.items()}

    @property
    def exists(self) -> bool:
        """Whether the folder has a tokenizer at all."""
        return bool(self.tokenizer or self.config)

    def _ids(self) -> dict[str, int]:
        vocabulary = (self.tokenizer.get("model") or {}).get("vocab") or {}
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {text: n for n, (text, *_) in enumerate(vocabulary)}
        ids |= {str(text): int(n) for text, n in _read_json(self.folder / "added_tokens.json").items()}
        ids |= {entry["content"]: int(n) for n, entry in (self.config.get("added_tokens_decoder") or {}).items()}
        ids |= {entry["content"]: entry["id"] for entry in self.tokenizer.get("added_tokens") or []}
        wrong = next((text for text, n in ids.items() if type(text) is not str or type(n) is not int or n < 0), None)
        if wrong is not None:
            raise ValueError(f"token {wrong!r} has the id {ids[wrong]!r}")
        return ids

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1, special tokens included; 0 without a tokenizer."""
        return max(self.ids.values(), default=-1) + 1

    def special_text(self, name: str) -> str | None:
        """Text that the files declare for "mask_token", "eos_token" or "pad_token", whether it is a token or not."""
        for source in (self.config, self.special):
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if text is not None:
                return str(text)
        return None

    def special_id(self, name: str) -> int | None:
        """Id of a declared special token ("mask_token", "eos_token", "pad_token"), or None."""
        return self.ids.get(self.special_text(name) or "")

    def mask_id(self) -> int | None:
        """Id of the mask token: the declared one, else one whose text is known for it, or None."""
        declared = self.special_id("mask_token")
        if declared is not None:
            return declared
        return next((self.ids[text] for text in MASK_TEXTS if text in self.ids), None)

    def stop_ids(self) -> list[int]:
        """Tokens at which generation stops, by generation_config.json; often several, a chat's end of turn first."""
        value = self.generation.get("eos_token_id")
        return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]

    def eos_id(self) -> int | None:
        """Id of the token that ends a document: the tokenizer's eos_token, else the first at which generation stops.

        Documents of a corpus end in the tokenizer's own token, whatever stops a chat.
        """
        own = self.special_id("eos_token")
        return own if own is not None else next(iter(self.stop_ids()), None)


def named_tokenizer(named: Path | None, otherwise: Path) -> TokenizerFiles:
    """The tokenizer of the folder that a user names, which must have one; without a name, of another folder.

    Raises:
        ValueError: the named folder holds no tokenizer.
    """
    files = TokenizerFiles(named or otherwise)
    if named is not None and not files.exists:
        raise ValueError(f"tokenizer ({named}) holds no tokenizer file; name the folder of a Hugging Face tokenizer.")
    return files


def copy_tokenizer(files: TokenizerFiles, target: Path, mask_id: int, vocab_size: int) -> None:
    """Copy the tokenizer's files; give it the mask token if it has none.

    Args:
        files: the source.
        target: an existing folder.
        mask_id: of the model, as `settle_special_tokens` decided it.
        vocab_size: rows of the embedding.
    """
    for path in tokenizer_files(files.folder):
        if path.name != GENERATION_FILE:
            shutil.copyfile(path, target / path.name)
    if files.exists and files.special_id("mask_token") != mask_id:
        if not files.tokenizer:
            raise ValueError(
                f"{files.folder} has no tokenizer.json, so it cannot be given the mask token ({mask_id}); "
                "save it as a fast tokenizer first, or give --tokenizer."
            )
        own_text = files.texts.get(mask_id) if files.mask_id() == mask_id else None
        text = own_text or RESERVED_MASK_IDS.get(vocab_size, (None, "<|mask|>"))[1]
        _declare_mask(files, target, text, mask_id)


def name_tokenizer_class(folder: Path) -> None:
    """Name the class of a tokenizer.json that every transformers has: 4.57 guesses none for a model of its own code.

    Args:
        folder: of an export; a class that is named is kept, but for transformers 5's new name of the same one.
    """
    path = folder / "tokenizer_config.json"
    config = _read_json(path)
    if (folder / TOKENIZER_FILE).is_file() and config.get("tokenizer_class") in (None, "TokenizersBackend"):
        _write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def with_special_tokens(files: TokenizerFiles, ids: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer.json and of tokenizer_config.json with special tokens, which are never split.

    Args:
        files: the tokenizer; it stays as it is.
        ids: of the tokens by text, which hold exactly; another token with one of them gives way.
    """
    entries = {token_id: _special_token(text) for text, token_id in ids.items()}
    added = files.tokenizer.get("added_tokens") or []
    stated = [(item["id"], item["content"]) for item in added]
    new = {token_id: entry for token_id, entry in entries.items() if (token_id, entry["content"]) not in stated}
    tokenizer = json.loads(json.dumps(files.tokenizer))
    if tokenizer and new:
        kept = [item for item in added if item["id"] not in new]
        described = [{"id": token_id, **entry} for token_id, entry in new.items()]
        tokenizer["added_tokens"] = sorted([*kept, *described], key=lambda item: item["id"])
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, dict):
            # In the vocabulary itself an id holds even where ids below it are unused.
            for token_id, entry in new.items():
                vocabulary.pop(files.texts.get(token_id), None)
                vocabulary[entry["content"]] = token_id
    config = dict(files.config)
    if "added_tokens_decoder" in config:
        decoder = {str(token_id): entry for token_id, entry in entries.items()}
        config["added_tokens_decoder"] = dict(config["added_tokens_decoder"]) | decoder
    return tokenizer, config


def _special_token(text: str) -> dict[str, Any]:
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _declare_mask(files: TokenizerFiles, target: Path, text: str, mask_id: int) -> None:
    """Write the mask token into the copied files, at exactly `mask_id`."""
    tokenizer, config = with_special_tokens(files, {text: mask_id})
    if tokenizer != files.tokenizer:
        _write_json(target / TOKENIZER_FILE, tokenizer)
    _write_json(target / "tokenizer_config.json", config | {"mask_token": text})
    if files.special:
        _write_json(target / "special_tokens_map.json", files.special | {"mask_token": text})


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "download it again") if path.is_file() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_json(path, value, indent=2, ensure_ascii=False)
