"""Special tokens that a tokenizer is given, at the first ids that no token has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_dllm.hf.tokenizer_folder import TOKENIZER_FILE, TokenizerFiles, with_special_tokens
from megatron_dllm.run.files import write_json


def added_ids(files: TokenizerFiles, texts: Sequence[str]) -> dict[str, int]:
    """The id of each new token.

    Args:
        files: the tokenizer.
        texts: of the tokens, in the order of their ids.

    Raises:
        ValueError: a text is empty, stands there twice, or is a token already; or the tokenizer takes none.
    """
    for number, text in enumerate(texts):
        if not text or text in texts[:number]:
            raise ValueError(f"tokens ({text!r}) must be texts of their own, none of them empty; name each once.")
        if text in files.ids:
            raise ValueError(
                f"tokens ({text}) is token {files.ids[text]} of {files.folder} already; leave it out of the list."
            )
    if texts and not files.tokenizer:
        raise ValueError(
            f"{files.folder} has no {TOKENIZER_FILE}, so tokens ({texts[0]}) cannot be added; save it as a fast "
            "tokenizer first."
        )
    return {text: files.vocab_size + number for number, text in enumerate(texts)}


def write_added_tokens(files: TokenizerFiles, target: Path, ids: dict[str, int]) -> None:
    """Write the tokens into the copy of a tokenizer, as special tokens that are never split.

    Args:
        files: the original.
        target: folder of the copy, which has the original's files.
        ids: by text, of `added_ids`; none: the copy stays as it is.
    """
    if not ids:
        return
    tokenizer, config = with_special_tokens(files, ids)
    write_json(target / TOKENIZER_FILE, tokenizer, indent=2, ensure_ascii=False)
    if config != files.config:
        write_json(target / "tokenizer_config.json", config, indent=2, ensure_ascii=False)
