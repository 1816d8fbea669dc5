"""Every form of a chat gives the same messages; what is no chat is refused with its reason."""

from __future__ import annotations

import pytest

from megatron_dllm.data.chat import Chat, chat_of, question_of
from megatron_dllm.data.reading import BadDocumentError

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [HI, HELLO]},
        {"messages": [HI, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": ""},
        {"conversations": [HI, HELLO]},
        {"prompt": "Hi", "response": "Hello"},
        {"instruction": "Hi", "output": "Hello", "input": ""},
    ],
)
def test_every_form_gives_the_same_messages(record: dict) -> None:
    assert chat_of(record) == Chat([HI, HELLO])


def test_system_input_and_tools_of_a_record() -> None:
    chat = chat_of(
        {"instruction": "Sort", "input": "b a", "output": "a b", "system": "Be brief", "tools": '[{"x": 1}]'}
    )
    assert chat.messages[0] == {"role": "system", "content": "Be brief"}
    assert chat.messages[1]["content"] == "Sort\n\nb a"
    assert chat.tools == [{"x": 1}] and chat.answers == [2]


@pytest.mark.parametrize(
    "call", [CALL, CALL["function"], {"function": {"name": "add", "arguments": '{"a": 1}'}, "type": "function"}]
)
def test_a_tool_call_in_every_form(call: dict) -> None:
    chat = chat_of({"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_a_function_call_of_sharegpt() -> None:
    items = [("human", "Hi"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "")]
    chat = chat_of({"conversations": [{"from": role, "value": value} for role, value in items]})
    assert chat.messages[1]["tool_calls"] == [CALL]
    assert chat.messages[2] == {"role": "tool", "content": ""}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"no messages, .* or instruction and output \(it has text\)"),
        ({"messages": "x"}, "messages is a str, not a list"),
        ({"messages": [3]}, "message 1 is a int, not an object"),
        ({"messages": []}, "no assistant message among its 0"),
        ({"messages": [HI]}, "no assistant message among its 1"),
        ({"messages": [HELLO, HI]}, "begins with the assistant"),
        ({"messages": [HI, {"role": "narrator", "content": "x"}]}, r"2 has an unknown role \(narrator; known are"),
        ({"messages": [HI, {"role": ["x"], "content": "x"}]}, "unknown role"),
        ({"messages": [HI, {"role": "assistant", "content": " \n"}]}, r"message 2 \(assistant\) is empty"),
        ({"messages": [{"role": "user", "content": None}, HELLO]}, r"message 1 \(user\) is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, HELLO]}, r"no text \(list\)"),
        ({"messages": [HI, HELLO | {"tool_calls": "x"}]}, "broken tool call .*not a list"),
        ({"messages": [HI, HELLO | {"tool_calls": [{"function": {}}]}]}, "broken tool call .it names no function"),
        ({"messages": [HI, HELLO | {"tool_calls": [{"name": "f", "arguments": "{a"}]}]}, "broken tool call .not JSON"),
        ({"messages": [HI, HELLO | {"tool_calls": [{"name": "f", "arguments": [1]}]}]}, "of f are no JSON object"),
        ({"messages": [HI, HELLO], "tools": "{"}, "tools .not JSON"),
        ({"messages": [HI, HELLO], "tools": [3]}, "tools is no list of JSON schemas"),
        ({"prompt": "x", "response": 3}, r"message 2 \(assistant\) has content that is no text \(int\)"),
    ],
)
def test_what_is_no_chat_says_why(record: dict, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        chat_of(record)


SYSTEM = {"role": "system", "content": "Be brief"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HI], [HI]),
        ([HI, HELLO], [HI]),
        ([SYSTEM, HI, HELLO, HI, HELLO, HELLO], [SYSTEM, HI, HELLO, HI]),
        ([HI, HELLO | {"tool_calls": [CALL]}, {"role": "tool", "content": "3"}], None),
    ],
)
def test_a_question_ends_where_the_assistant_is_to_speak(messages: list[dict], expected: list[dict] | None) -> None:
    assert question_of({"messages": messages}).messages == (messages if expected is None else expected)


@pytest.mark.parametrize("messages", [[], [HELLO], [SYSTEM], [SYSTEM, HELLO]])
def test_a_chat_in_which_nobody_asks_is_no_question(messages: list[dict]) -> None:
    with pytest.raises(BadDocumentError, match=rf"no message of the user .* among its {len(messages)}"):
        question_of({"messages": messages})
