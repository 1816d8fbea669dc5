r"""From a record of a preference data set to two chats; a record that is no usable pair is refused with a reason.

Both sides are the same messages, the prompt, and an answer each. They are told by these keys:

    chosen, rejected    texts, or lists of messages: the answer alone, or the whole chat
    prompt              a text (also called question or instruction) or a list of messages; not needed with whole chats,
                        and the user's message where they begin with the assistant

A chat may also be one text in the form of HH-RLHF: "\n\nHuman: ...\n\nAssistant: ...", with or without a prompt of
its own. Beside these a record may have `system` and `tools`, as chats have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_dllm.data.chat import Chat, chat_of, role_of
from megatron_dllm.data.reading import BadDocumentError

_PROMPTS = ("prompt", "question", "instruction")
_SIDES = ("chosen", "rejected")
_NAME_SHOWN = 40
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class EmptyAnswerError(BadDocumentError):
    """A pair with a side that says nothing."""


@dataclass(frozen=True)
class Pair:
    """Two chats that differ in their last message, an answer of the assistant, or not at all.

    Attributes:
        chosen: the chat with the better answer.
        rejected: the chat with the worse one.
    """

    chosen: Chat
    rejected: Chat


def pair_of(record: dict[str, Any]) -> Pair:
    """The pair that a record holds.

    Raises:
        EmptyAnswerError: one of its answers is empty.
        BadDocumentError: the record is no pair, or its sides answer different prompts; says why.
    """
    missing = [name for name in _SIDES if record.get(name) is None]
    if missing:
        keys = [key[:_NAME_SHOWN] for key in sorted(record)[:12]]
        raise BadDocumentError(f"no {' and no '.join(missing)} (it has {', '.join(keys) or 'none'})")
    chosen, rejected = (_side(record, name) for name in _SIDES)
    differing = _first_difference(chosen, rejected)
    if differing is not None:
        raise BadDocumentError(f"the prompt differs between chosen and rejected (message {differing})")
    return Pair(chosen, rejected)


def _side(record: dict[str, Any], name: str) -> Chat:
    """One side as a chat that ends with its answer."""
    messages = _messages(record, name)
    if record[name] == [] or not messages or _says_nothing(messages[-1]):
        raise EmptyAnswerError(f"{name} is empty")
    shared = {key: record[key] for key in ("system", "tools") if record.get(key) is not None}
    try:
        chat = chat_of({"messages": messages, **shared})
    except BadDocumentError as error:
        raise BadDocumentError(f"{name}: {error}") from error
    if chat.messages[-1]["role"] != "assistant":
        raise BadDocumentError(f"{name} ends with {chat.messages[-1]['role']}, not with an answer of the assistant")
    return chat


def _says_nothing(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("tool_calls"):
        return False
    said = message.get("content", message.get("value"))
    return not said or (isinstance(said, str) and not said.strip())


def _messages(record: dict[str, Any], name: str) -> list[Any]:
    """The messages of a side, each still in the form of its data set."""
    prompt, side = _prompt(record), record[name]
    if isinstance(side, str):
        if prompt is None or _is_dialogue(side):
            return _dialogue(side, name)
        return [*prompt, {"role": "assistant", "content": side}]
    if not isinstance(side, list):
        raise BadDocumentError(f"{name} is a {type(side).__name__}, neither a text nor a list of messages")
    begins = role_of(side[0]) if side and isinstance(side[0], dict) else None
    is_whole = prompt is None or begins not in (None, "assistant")
    return [*([] if is_whole else prompt or []), *side]


def _prompt(record: dict[str, Any]) -> list[Any] | None:
    """The messages of a record's prompt; None where it has none."""
    prompt = next((record[name] for name in _PROMPTS if record.get(name) is not None), None)
    if isinstance(prompt, str):
        return _dialogue(prompt, "prompt") if _is_dialogue(prompt) else [{"role": "user", "content": prompt}]
    if prompt is not None and not isinstance(prompt, list):
        raise BadDocumentError(f"prompt is a {type(prompt).__name__}, neither a text nor a list of messages")
    return prompt


def _is_dialogue(text: str) -> bool:
    found = _SPEAKER.match(text.lstrip())
    return found is not None and found[1] == "Human"


def _dialogue(text: str, name: str) -> list[Any]:
    """The messages of a text of HH-RLHF; of a prompt the empty answer at its end is left out."""
    if not _is_dialogue(text):
        raise BadDocumentError(f"no prompt, question or instruction, and {name} is no text of Human: and Assistant:")
    _, *parts = _SPEAKER.split(text.strip())
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages = [{"role": _ROLES[speaker], "content": said.strip()} for speaker, said in turns]
    return messages[:-1] if name == "prompt" and messages[-1] == {"role": "assistant", "content": ""} else messages


def _first_difference(chosen: Chat, rejected: Chat) -> int | None:
    """Number of the first message of the prompts, from 1, that is not the same; None where all of them are."""
    ours, others = chosen.messages[:-1], rejected.messages[:-1]
    for number, (message, other) in enumerate(zip(ours, others, strict=False), start=1):
        if message != other:
            return number
    return None if len(ours) == len(others) else min(len(ours), len(others)) + 1
