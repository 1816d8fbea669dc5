"""What lm-evaluation-harness asks, as tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron_dllm.config.rules import check
from megatron_dllm.data.chat_template import ChatTemplate
from megatron_dllm.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_dllm.evaluation.continuations import LARGEST_KEY
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles, chat_template


@dataclass(frozen=True)
class Encoder:
    """Turns texts into tokens.

    Attributes:
        folder: of the tokenizer.
        tokenizer: of questions and choices, where special tokens count as such: chat templates write them.
        text_tokenizer: of documents, which hold nothing but text.
        template: of chats; None: the folder has none.
        mask_token_id: which no text may hold.
        eot_token_id: stands for an empty context, and ends documents.
    """

    folder: Path
    tokenizer: Tokenizer
    text_tokenizer: TextTokenizer
    template: ChatTemplate | None
    mask_token_id: int
    eot_token_id: int

    @classmethod
    def load(cls, folder: Path, mask_token_id: int, eot_token_id: int) -> Encoder:
        """Read a tokenizer folder.

        Raises:
            ValueError: it cannot be read.
        """
        template = ChatTemplate.load(str(folder)) if chat_template(folder) is not None else None
        tokenizer = load_tokenizer(TokenizerFiles(folder))
        return cls(folder, tokenizer, TextTokenizer.load(folder), template, mask_token_id, eot_token_id)

    def check_chats(self) -> None:
        """Raise ValueError where the tokenizer has no template of chats."""
        check(
            self.template is not None,
            f"apply_chat_template (true) needs a chat template, and {self.folder} has none; put the model's "
            "chat_template.jinja beside its tokenizer.json.",
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens at either end.

        Raises:
            ValueError: the text holds the mask token.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.mask_token_id in ids:
            raise ValueError(
                f"a text ({text[:40]!r}) holds the mask token ({self.mask_token_id}), which stands for an unknown one; "
                "take it out of the task."
            )
        return ids

    def document(self, text: str) -> list[int]:
        """A document as a corpus holds it: its text, then the end-of-text token."""
        return [*self.text_tokenizer.encode([text])[0], self.eot_token_id]


def noise_key(task: str, question: int) -> int:
    """The noise of a question's choices: the same whatever else is asked, and in whatever order."""
    digest = hashlib.sha256(f"{task}\0{question}".encode()).digest()
    number: int = int.from_bytes(digest[:8], "big") & LARGEST_KEY
    return number
