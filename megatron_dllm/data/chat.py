"""From a record of a data set to the messages of a chat; a record that is no usable chat is refused with a reason.

Three forms are known, told by their keys:

    messages        [{"role": "user", "content": "..."}, ...], with tool_calls, tool results and reasoning_content
    conversations   ShareGPT's: [{"from": "human", "value": "..."}, ...]
    a pair          prompt and response; or instruction, input (may be missing) and output

Beside them a record may have `system` (a text) and `tools` (JSON schemas, or a JSON text of them).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_dllm.data.reading import BadDocumentError

Message = dict[str, Any]

# Of a parquet file; the last three are those of preference pairs (`data.pair`).
COLUMNS = (
    *("messages", "conversations", "prompt", "response", "instruction", "input", "output", "system", "tools"),
    *("question", "chosen", "rejected"),
)
_PAIRS = (("prompt", "response"), ("instruction", "output"))
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_NAME_SHOWN = 40


@dataclass(frozen=True)
class Chat:
    """A chat as chat templates take it.

    Attributes:
        messages: each with role (system, user, assistant or tool) and content, and what else its record had.
        tools: JSON schemas of the tools that the assistant may call; None where the record names none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's messages."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]


def chat_of(record: dict[str, Any]) -> Chat:
    """The chat that a record holds.

    Raises:
        BadDocumentError: the record is no chat, or one that nothing can be learned from; says why.
    """
    chat = _chat(record)
    if not chat.answers:
        raise BadDocumentError(f"no assistant message among its {len(chat.messages)}")
    if chat.answers[0] == 0:
        raise BadDocumentError("begins with the assistant, which answers nothing")
    return chat


def question_of(record: dict[str, Any]) -> Chat:
    """The chat that a record holds, up to where the assistant is to speak: without an answer that it ends with.

    Raises:
        BadDocumentError: the record is no chat, or nobody asks for an answer; says why.
    """
    if not isinstance(record, dict):
        raise BadDocumentError(f"is a {type(record).__name__}, not an object")
    chat = _chat(record)
    messages = list(chat.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise BadDocumentError(f"no message of the user before an answer among its {len(chat.messages)}")
    return Chat(messages, chat.tools)


def _chat(record: dict[str, Any]) -> Chat:
    """The messages and tools of a record."""
    messages = [_message(item, number) for number, item in enumerate(_items(record), start=1)]
    system = record.get("system")
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    return Chat(messages, _tools(record.get("tools")))


def _items(record: dict[str, Any]) -> list[Any]:
    """The messages of a record, each still in the form of its data set."""
    for name in ("messages", "conversations"):
        if record.get(name) is not None:
            if not isinstance(record[name], list):
                raise BadDocumentError(f"{name} is a {type(record[name]).__name__}, not a list")
            return list(record[name])
    for asked, answered in _PAIRS:
        if record.get(asked) is not None and record.get(answered) is not None:
            return [
                {"role": "user", "content": _question(record, asked)},
                {"role": "assistant", "content": record[answered]},
            ]
    forms = ["messages", "conversations", *(" and ".join(pair) for pair in _PAIRS)]
    keys = [key[:_NAME_SHOWN] for key in sorted(record)[:12]]
    raise BadDocumentError(f"no {', '.join(forms[:-1])} or {forms[-1]} (it has {', '.join(keys) or 'none'})")


def _question(record: dict[str, Any], asked: str) -> Any:
    """What the user says; Alpaca's `input` is a text that the instruction is about."""
    question = record[asked]
    return f"{question}\n\n{record['input']}" if asked == "instruction" and record.get("input") else question


def role_of(item: dict[str, Any]) -> str | None:
    """The role that templates know of a message in the form of its data set; None where it is unknown."""
    written = item.get("role", item.get("from"))
    return _ROLES.get(written) if isinstance(written, str) else None


def _message(item: Any, number: int) -> Message:
    """A message with the role and content that templates know."""
    if not isinstance(item, dict):
        raise BadDocumentError(f"message {number} is a {type(item).__name__}, not an object")
    message = {key: value for key, value in item.items() if key not in ("from", "value")}
    written, role = item.get("role", item.get("from")), role_of(item)
    if role is None:
        known = ", ".join(_ROLES)
        raise BadDocumentError(
            f"message {number} has an unknown role ({str(written)[:_NAME_SHOWN]}; known are {known})"
        )
    where = f"message {number} ({role})"
    content = message.get("content", item.get("value"))
    if written == "function_call":
        message["tool_calls"], content = [_json(content, f"{where}: broken tool call")], ""
    message |= {"role": role, "content": _text(content, where)}
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    elif role != "tool" and not message["content"].strip():
        raise BadDocumentError(f"{where} is empty")
    return message


def _text(content: Any, where: str) -> str:
    """Content as text; a list of text parts is one text."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_text(part.get("text"), where) for part in content)
    if not isinstance(content, str):
        raise BadDocumentError(f"{where} has content that is no text ({type(content).__name__})")
    return content


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls as {"type": "function", "function": {"name", "arguments"}}, the arguments an object and not its JSON."""
    if not isinstance(calls, list):
        raise BadDocumentError(f"{where}: broken tool call (tool_calls is a {type(calls).__name__}, not a list)")
    return [_tool_call(call, f"{where}: broken tool call") for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise BadDocumentError(f"{where} (it names no function)")
    assert isinstance(call, dict) and isinstance(function, dict)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, where) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise BadDocumentError(f"{where} (arguments of {name[:_NAME_SHOWN]} are no JSON object)")
    rest = {key: value for key, value in call.items() if key in ("id", "index")}
    return {**rest, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadDocumentError("tools is no list of JSON schemas")
    return tools


def _json(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadDocumentError(f"{where} (not JSON: {error})") from error
