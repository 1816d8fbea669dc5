"""The tokenizer files of a model folder, and the mask token in them.

The files are read as JSON; no tokenizer code runs. Serving engines take the mask token's id as given
(SGLang: 156895 for LLaDA2), so the id is settled when a model enters the pipeline, not when it leaves.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_dllm.run.files import read_json_object, write_json

# The id that serving uses, by the vocabulary's size, and the text SDAR and LLaDA2 give the token.
RESERVED_MASK_IDS = {157184: (156895, "<|mask|>"), 151936: (151669, "<|MASK|>")}
MASK_TEXTS = ("<|mask|>", "<|MASK|>", "<mask>", "[MASK]")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
# A token nobody has given a meaning yet.
_PLACEHOLDER = re.compile(r"reserved|unused|placeholder|extra_\d|dummy", re.IGNORECASE)


class TokenizerFiles:
    """What the JSON files of a tokenizer say."""

    def __init__(self, folder: Path) -> None:
        """Read the files; a folder without any is allowed.

        Raises:
            ValueError: a file is no JSON, or not of a tokenizer.
        """
        self.folder = folder
        self.tokenizer = _read_json(folder / "tokenizer.json")
        self.config = _read_json(folder / "tokenizer_config.json")
        self.special = _read_json(folder / "special_tokens_map.json")
        self.generation = _read_json(folder / "generation_config.json")
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
        ids |= {entry["content"]: int(entry["id"]) for entry in self.tokenizer.get("added_tokens") or []}
        return ids

    def special_id(self, name: str) -> int | None:
        """Id of a special token ("mask_token", "eos_token", "pad_token"), or None."""
        for source in (self.config, self.special):
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if text in self.ids:
                return self.ids[text]
        return None

    def mask_id(self) -> int | None:
        """Id of the mask token, or None."""
        declared = self.special_id("mask_token")
        if declared is not None:
            return declared
        return next((self.ids[text] for text in MASK_TEXTS if text in self.ids), None)

    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token: generation_config.json's first, else the tokenizer's."""
        value = self.generation.get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else self.special_id("eos_token")


def settle_mask_id(files: TokenizerFiles, vocab_size: int, stated: int, wanted: int | None) -> int:
    """Decide the mask token's id.

    Args:
        files: the tokenizer.
        vocab_size: rows of the embedding.
        stated: what config.json says, or -1.
        wanted: what the user says, or None.

    Raises:
        ValueError: the id is unknown, contradictory, without an embedding row, or means something else.
    """
    own = files.mask_id()
    reserved = RESERVED_MASK_IDS.get(vocab_size, (None, ""))[0]
    candidates = (wanted, stated if stated >= 0 else None, reserved, own)
    mask_id = next((candidate for candidate in candidates if candidate is not None), None)
    if mask_id is None:
        raise ValueError(
            "mask_token_id (auto) cannot be found: neither config.json nor the tokenizer of "
            f"{files.folder} has a mask token; add one to the tokenizer, or give --mask_token_id with "
            "the id of a reserved token."
        )
    if not 0 <= mask_id < vocab_size:
        raise ValueError(
            f"mask_token_id ({mask_id}) has no row in the embedding (vocab_size {vocab_size}); "
            "give the id of a reserved token below it."
        )
    if own is not None and own != mask_id:
        raise ValueError(
            f"mask_token_id ({mask_id}) differs from the tokenizer's own mask token ({own}, "
            f"{files.texts[own]}); serving would mask with the wrong token: use one id in both."
        )
    text = files.texts.get(mask_id)
    if text is not None and own != mask_id and not _PLACEHOLDER.search(text):
        raise ValueError(
            f"mask_token_id ({mask_id}) is {text} in the tokenizer of {files.folder}, which gives it "
            "another meaning; convert from the base model, or give --tokenizer with one whose mask token "
            "has this id (LLaDA2's moved the other token away)."
        )
    return mask_id


def copy_tokenizer(files: TokenizerFiles, target: Path, mask_id: int, vocab_size: int) -> list[str]:
    """Copy the tokenizer's files; give it the mask token if it has none.

    Args:
        files: the source.
        target: an existing folder.
        mask_id: from `settle_mask_id`.
        vocab_size: rows of the embedding.

    Returns:
        Names of the files written.
    """
    names = [name for name in TOKENIZER_FILES if (files.folder / name).is_file()]
    for name in names:
        shutil.copyfile(files.folder / name, target / name)
    if files.exists and files.special_id("mask_token") != mask_id:
        if not files.tokenizer:
            raise ValueError(
                f"{files.folder} has no tokenizer.json, so it cannot be given the mask token ({mask_id}); "
                "save it as a fast tokenizer first, or give --tokenizer."
            )
        own_text = files.texts.get(mask_id) if files.mask_id() == mask_id else None
        text = own_text or RESERVED_MASK_IDS.get(vocab_size, (None, "<|mask|>"))[1]
        _declare_mask(files, target, text, mask_id)
    return names


def _declare_mask(files: TokenizerFiles, target: Path, text: str, mask_id: int) -> None:
    """Write the mask token into the copied files, at exactly `mask_id`."""
    old = files.texts.get(mask_id)
    entry = {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    if files.tokenizer and {"id": mask_id, "content": text} not in [
        {"id": item["id"], "content": item["content"]} for item in files.tokenizer.get("added_tokens") or []
    ]:
        tokenizer = json.loads(json.dumps(files.tokenizer))
        added = [item for item in tokenizer.get("added_tokens") or [] if item["id"] != mask_id]
        tokenizer["added_tokens"] = sorted([*added, {"id": mask_id, **entry}], key=lambda item: item["id"])
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, dict):
            # In the vocabulary itself the id holds even where ids below it are unused.
            vocabulary.pop(old, None)
            vocabulary[text] = mask_id
        _write_json(target / "tokenizer.json", tokenizer)
    config = dict(files.config)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = dict(config["added_tokens_decoder"]) | {str(mask_id): entry}
    config["mask_token"] = text
    _write_json(target / "tokenizer_config.json", config)
    if files.special:
        _write_json(target / "special_tokens_map.json", files.special | {"mask_token": text})


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "download it again") if path.is_file() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_json(path, value, indent=2, ensure_ascii=False)
