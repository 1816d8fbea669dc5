"""Records of preference data sets as they are published, and what is no pair."""

from __future__ import annotations

import pytest

from megatron_dllm.data.pair import EmptyAnswerError, pair_of
from megatron_dllm.data.reading import BadDocumentError

ASKED = {"role": "user", "content": "Hi"}
GOOD, BAD = ({"role": "assistant", "content": said} for said in ("Hello", "Go"))
SYSTEM = {"role": "system", "content": "Be kind"}
FORMS = {
    "texts": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
    "orca": {"question": "Hi", "chosen": "Hello", "rejected": "Go"},
    "ultrafeedback": {"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score_chosen": 8.0},
    "answers alone": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "answers to a text": {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
    "whole chats": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "mixed": {"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": "Go"},
    "hh-rlhf": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
    "hh-rlhf with a prompt": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go"},
}
WRONG = [
    ({"prompt": "Hi", "chosen": "Hello"}, r"no rejected \(it has chosen, prompt\)"),
    ({"text": "x"}, r"no chosen and no rejected \(it has text\)"),
    ({"chosen": "Hello", "rejected": "Go"}, "no prompt, question or instruction, and chosen is no text of Human: and"),
    ({"prompt": 3, "chosen": "Hello", "rejected": "Go"}, "prompt is a int, neither a text nor a list"),
    ({"prompt": "Hi", "chosen": {"a": 1}, "rejected": "Go"}, "chosen is a dict, neither a text nor a list"),
    ({"chosen": [ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]}, r"the prompt differs .* \(message 1\)"),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, r"the prompt differs .* \(message 2\)"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: x", "rejected": "\n\nHuman: Ho\n\nAssistant: x"}, "the prompt differs"),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED]}, "rejected: no assistant message among its 1"),
    ({"chosen": [ASKED, GOOD, ASKED], "rejected": [ASKED, BAD]}, "chosen ends with user, not with an answer"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "chosen: begins with the assistant"),
    ({"prompt": "Hi", "chosen": ["Hello"], "rejected": "Go"}, "chosen: message 2 is a str, not an object"),
    ({"prompt": "", "chosen": "Hello", "rejected": "Go"}, "chosen: message 1 .user. is empty"),
]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_pair(name: str) -> None:
    pair = pair_of(FORMS[name])
    said = [
        [(message["role"], message["content"].strip()) for message in side.messages] for side in vars(pair).values()
    ]
    assert said == [[("user", "Hi"), ("assistant", "Hello")], [("user", "Hi"), ("assistant", "Go")]]


def test_both_sides_get_system_and_tools() -> None:
    pair = pair_of({**FORMS["texts"], "system": "Be kind", "tools": '[{"name": "f"}]'})
    for side in (pair.chosen, pair.rejected):
        assert side.messages[0] == SYSTEM and side.tools == [{"name": "f"}]


def test_an_answer_that_begins_with_a_call_stands_behind_its_prompt() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    seen, said = {"from": "observation", "value": "3"}, {"from": "gpt", "value": "Three"}
    pair = pair_of({"prompt": "Hi", "chosen": [call], "rejected": [{"from": "gpt", "value": "Two"}]})
    assert [message["role"] for message in pair.chosen.messages] == ["user", "assistant"]
    with pytest.raises(BadDocumentError, match=r"the prompt differs .* \(message 2\)"):
        pair_of({"prompt": "Hi", "chosen": [call, seen, said], "rejected": [said]})


def test_earlier_turns_belong_to_the_prompt() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
    pair = pair_of({"chosen": f"{text} Bye!", "rejected": f"{text} No."})
    assert [message["content"] for message in pair.chosen.messages] == ["Hi", "Yes?", "Bye", "Bye!"]
    assert pair.rejected.messages[:-1] == pair.chosen.messages[:-1] and len(pair.chosen.answers) == 2


@pytest.mark.parametrize(("record", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_what_is_no_pair_is_refused_with_a_reason(record: dict, reason: str) -> None:
    with pytest.raises(BadDocumentError, match=reason):
        pair_of(record)


@pytest.mark.parametrize("side", ["", "  ", [], [ASKED, {"role": "assistant", "content": ""}]], ids=str)
def test_an_empty_answer_is_told_apart(side: object) -> None:
    with pytest.raises(EmptyAnswerError, match="rejected is empty"):
        pair_of({"prompt": "Hi", "chosen": "Hello", "rejected": side})
