r"""Chats as tokens, by the tokenizer's own chat template, with the spans of what the assistant says.

For every answer, the chat before it is rendered as a server renders it (the prompt, up to where the assistant begins
to speak), then the chat with the answer. The first must begin the second. The rest is the answer, up to the special
token that ends the turn:

    prompt   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n      fixed
    answer   Hello!<|im_end|>                                            maskable

A template with {% generation %} says itself what the assistant says; other parts of the answer are fixed then.

The tokens of the prompt are those that a server gives the model, also where tokens could merge across the cut. The
answers of a chat share a document as long as the tokens up to the end of one begin the prompt of the next. Where they
do not, as the template drops the reasoning of earlier turns or tokens merge, the next answer begins a document of its
own, with its own prompt. A document ends with the end of its last answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer

from megatron_dllm.data.chat import Chat, Message
from megatron_dllm.data.reading import BadDocumentError
from megatron_dllm.data.spans import FIXED, MASKABLE
from megatron_dllm.data.tokenizer import load_tokenizer
from megatron_dllm.hf.tokenizer_folder import MASK_TEXTS, RESERVED_MASK_IDS, TokenizerFiles, chat_template

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class ChatDocument:
    """A chat, or the part of it up to an answer.

    Attributes:
        ids: its tokens.
        spans: (start, stop, kind) of what carries a loss.
        text: that the tokens are made of.
    """

    ids: list[int]
    spans: list[tuple[int, int, int]]
    text: str


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer and its chat template.

    Attributes:
        folder: where they come from.
        text: of the template, in jinja.
        tokenizer: finds special tokens in text.
        special_texts: of the tokens that only the template may write, such as the end of a turn.
        mask_ids: tokens that no document may hold.
        variables: texts of special tokens, by the names that templates use.
    """

    folder: str
    text: str
    tokenizer: Tokenizer
    special_texts: re.Pattern[str]
    mask_ids: frozenset[int]
    variables: dict[str, str]

    @classmethod
    def load(cls, folder: str) -> ChatTemplate:
        """Read a tokenizer folder.

        Raises:
            ValueError: it has no chat template, or no special token.
        """
        text, files = chat_template(Path(folder)), TokenizerFiles(Path(folder))
        if text is None:
            raise ValueError(
                f"tokenizer ({folder}) has no chat template, which chats need; put the model's "
                "chat_template.jinja beside its tokenizer.json."
            )
        special = _special_texts(files)
        if not special:
            raise ValueError(f"tokenizer ({folder}) has no special tokens, so no turn can end; add one to it.")
        pattern = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        named = {name: files.special_text(name) for name in _SPECIAL_NAMES}
        variables = {name: value for name, value in named.items() if value is not None}
        return cls(folder, text, load_tokenizer(files), pattern, _mask_ids(files), variables)

    def documents(self, chat: Chat) -> list[ChatDocument]:
        """The documents of a chat: one if the template allows it, else one for each answer that cannot share.

        Raises:
            BadDocumentError: this chat cannot be rendered; says why.
            ValueError: the template is of no use for training: it writes the mask token, or does not end turns.
        """
        self._check_texts(chat)
        documents: list[ChatDocument] = []
        for place in chat.answers:
            answer = self._answer(chat, place)
            if documents and answer.ids[: len(documents[-1].ids)] == documents[-1].ids:
                earlier = documents.pop()
                answer = ChatDocument(answer.ids, earlier.spans + answer.spans, answer.text)
            documents.append(answer)
        return documents

    def last_answer(self, chat: Chat) -> ChatDocument:
        """A chat that ends with an answer, which alone carries a loss, whatever the assistant said before.

        Raises:
            BadDocumentError, ValueError: as for `documents`.
        """
        self._check_texts(chat)
        return self._answer(chat, len(chat.messages) - 1)

    def prompt(self, chat: Chat) -> str:
        """The text that a server gives the model when the assistant is to speak.

        Raises:
            BadDocumentError: this chat cannot be rendered; says why.
        """
        self._check_texts(chat)
        return self.render(chat.messages, chat.tools, is_prompt=True)

    def end_of_turn(self) -> int:
        """The token that ends what the assistant says.

        Raises:
            ValueError: the template ends it with no special token.
        """
        chat = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        return self.documents(chat)[-1].ids[-1]

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, is_prompt: bool) -> str:
        """The text of messages, with the beginning of an answer where it is a prompt."""
        return self._render(messages, tools, is_prompt)[0]

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, is_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where in it the template says that the assistant speaks."""
        # Imported here because it takes seconds. It is what apply_chat_template calls, and it alone gives characters.
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation promises one string, but it returns two lists
        has_mask = _GENERATION.search(self.text) is not None and not is_prompt
        try:
            texts, generated = render(
                conversations=[messages],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=has_mask,
                add_generation_prompt=is_prompt,
                **self.variables,
            )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"chat template of {self.folder} is no jinja (line {error.lineno}: {error.message}); correct it."
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise BadDocumentError(f"the chat template refuses it ({error})") from error
        return texts[0], [(int(start), int(stop)) for start, stop in generated[0]] if has_mask else []

    def _answer(self, chat: Chat, place: int) -> ChatDocument:
        """The chat up to and with one answer; the answer alone carries a loss."""
        prompt, _ = self._render(chat.messages[:place], chat.tools, is_prompt=True)
        full, generated = self._render(chat.messages[: place + 1], chat.tools, is_prompt=False)
        where = f"message {place + 1} (assistant)"
        if not full.startswith(prompt):
            raise BadDocumentError(f"{where}: the prompt that the chat template makes is no beginning of the answer")
        parts = [(len(prompt), len(full))]
        if _GENERATION.search(self.text):
            parts = [(max(start, len(prompt)), stop) for start, stop in generated if stop > max(start, len(prompt))]
            if not parts:
                raise BadDocumentError(f"{where}: the chat template's generation block holds nothing of it")
        start, stop = parts[-1]
        parts[-1] = (start, self._end_of_turn(full, start, stop))
        return self._encode(full[: parts[-1][1]], len(prompt), parts, where)

    def _encode(self, text: str, prompt: int, parts: list[tuple[int, int]], where: str) -> ChatDocument:
        ids, done = self._ids(text[:prompt]), prompt
        spans: list[tuple[int, int, int]] = []
        for start, stop in parts:
            ids = ids if start == done else self._extend(ids, text, done, start)
            first, ids, done = len(ids), self._extend(ids, text, start, stop), stop
            if spans and spans[-1][1] < first < len(ids):
                spans.append((spans[-1][1], first, FIXED))  # the answer goes on behind what is fixed
            if first < len(ids):
                spans.append((first, len(ids), MASKABLE))
        if not spans:
            raise BadDocumentError(f"{where}: none of its tokens carries a loss")
        wrong = self.mask_ids.intersection(ids)
        if wrong:
            shown = ", ".join(f"{self.tokenizer.id_to_token(token)} ({token})" for token in sorted(wrong))
            raise ValueError(
                f"chat template of {self.folder} writes {shown}, the mask token, which no document may hold; use the "
                "tokenizer of the diffusion model, whose template does not."
            )
        return ChatDocument(ids, spans, text)

    def _extend(self, ids: list[int], text: str, start: int, stop: int) -> list[int]:
        """Tokens of text[:stop], where `ids` are those of text[:start]; a token never lies across the cut."""
        whole = self._ids(text[:stop])
        return whole if whole[: len(ids)] == ids else ids + self._ids(text[start:stop])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _end_of_turn(self, text: str, start: int, stop: int) -> int:
        """Where the special token ends that ends the turn text[start:stop], inside it or right behind it."""
        inside = [found.end() for found in self.special_texts.finditer(text, start, stop)]
        if inside and not text[inside[-1] : stop].strip():
            return inside[-1]
        behind = self.special_texts.match(text, stop)
        if behind is None:
            raise ValueError(
                f"chat template of {self.folder} must end what the assistant says with a special token, or the model "
                f"never learns to stop; it ends with {text[max(start, stop - 20) : stop]!r}: correct the template."
            )
        return behind.end()

    def _check_texts(self, chat: Chat) -> None:
        """Text must not write special tokens: they would end or begin turns."""
        for where, text in _texts([*chat.messages, *(chat.tools or [])]):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadDocumentError(f"half a surrogate pair (character {error.start} of a text)") from error
            found = self.special_texts.search(text)
            if found:
                owner = f"message {where + 1}" if where < len(chat.messages) else "a tool"
                raise BadDocumentError(f"{owner} holds {found[0]}, a special token that only the template may write")


def _texts(value: list[Any]) -> Iterator[tuple[int, str]]:
    """(number of the item, text) of all texts in a list of JSON values, keys included."""
    for number, item in enumerate(value):
        pending = [item]
        while pending:
            found = pending.pop()
            if isinstance(found, str):
                yield number, found
            elif isinstance(found, dict):
                pending += [*found.keys(), *found.values()]
            elif isinstance(found, list):
                pending += found


def _special_texts(files: TokenizerFiles) -> set[str]:
    added = files.tokenizer.get("added_tokens") or []
    texts = {str(token["content"]) for token in added if token.get("special") or token["content"] in MASK_TEXTS}
    ids = [files.eos_id(), files.mask_id(), files.special_id("pad_token"), *files.stop_ids()]
    return texts | {files.texts[token] for token in ids if token is not None and token in files.texts}


def _mask_ids(files: TokenizerFiles) -> frozenset[int]:
    """The tokenizer's mask token, and the id that serving takes for the mask in a vocabulary of this size."""
    own = files.mask_id()
    reserved = [mask for size, (mask, _) in RESERVED_MASK_IDS.items() if mask < files.vocab_size <= size]
    return frozenset([*reserved, *([] if own is None else [own])])
