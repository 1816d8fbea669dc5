"""What the assistant says, and nothing else, carries a loss, after exactly the tokens that a server would give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dllm.data.chat import Chat, chat_of
from megatron_dllm.data.chat_template import ChatDocument, ChatTemplate
from megatron_dllm.data.noisy_blocks import Turns
from megatron_dllm.data.reading import BadDocumentError
from megatron_dllm.data.spans import FIXED, MASKABLE, Spans
from megatron_dllm.data.stdlib_corpus import MASK_TOKEN
from tests.unit.data.chat_folders import CHATML, GENERATION, MERGING, REASONING, write_chat_tokenizer

PLAIN = [
    ("user", "Hi"),
    ("assistant", "Hello"),
    ("user", "And?"),
    ("assistant", "größe"),
    ("user", "a"),
    ("assistant", "b"),
]
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
WITH_TOOLS = [
    {"role": "user", "content": "What is 1 + 2, and twice that?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "three"},
    {"role": "assistant", "content": "3 and 6"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL_TEXT = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def chat(pairs: list[tuple[str, str]]) -> Chat:
    return chat_of({"messages": [{"role": role, "content": content} for role, content in pairs]})


def load(folder: Path, template: str) -> ChatTemplate:
    return ChatTemplate.load(write_chat_tokenizer(folder, template))


def answers(template: ChatTemplate, document: ChatDocument) -> list[str]:
    """Text of the spans, by the library's own decoder."""
    assert all(kind == MASKABLE for *_, kind in document.spans)
    return [template.tokenizer.decode(document.ids[a:b], skip_special_tokens=False) for a, b, _ in document.spans]


def expected_prompt(template: ChatTemplate, chat: Chat, place: int) -> list[int]:
    """What a server gives the model before message `place`: transformers' own apply_chat_template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(template.folder)
    return tokenizer.apply_chat_template(
        chat.messages[:place], tools=chat.tools, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("has_tools", [False, True])
def test_three_turns_are_one_document_and_every_prompt_is_what_a_server_gives(tmp_path: Path, has_tools: bool) -> None:
    template = load(tmp_path, CHATML)
    given = chat_of({"messages": WITH_TOOLS, "tools": TOOLS}) if has_tools else chat(PLAIN)
    (document,) = template.documents(given)
    expected = [CALL_TEXT * 2, "3 and 6", "You are welcome"] if has_tools else ["Hello", "größe", "b"]
    assert answers(template, document) == [text + "<|im_end|>" for text in expected]
    for place, (start, _, _) in zip(given.answers, document.spans, strict=True):
        assert document.ids[:start] == expected_prompt(template, given, place)
    assert document.spans[-1][1] == len(document.ids)
    # The whole conversation is the document, and what the template writes behind its end.
    whole = template.render(given.messages, given.tools, is_prompt=False)
    assert whole == document.text + "\n"
    assert template.tokenizer.encode(document.text).ids == document.ids


def test_a_template_that_drops_reasoning_gives_a_document_for_each_question(tmp_path: Path) -> None:
    template = load(tmp_path, REASONING)
    given = chat(PLAIN)
    for place in given.answers:
        given.messages[place]["reasoning_content"] = f"why {place}"
    documents = template.documents(given)
    found = [answers(template, document) for document in documents]
    expected = [(1, "Hello"), (3, "größe"), (5, "b")]
    assert found == [[f"<think>\nwhy {place}\n</think>\n{text}<|im_end|>"] for place, text in expected]
    for place, document in zip(given.answers, documents, strict=True):
        assert document.ids[: document.spans[0][0]] == expected_prompt(template, given, place)
    assert "why 1" not in documents[1].text


def test_steps_of_one_question_share_a_document_where_the_reasoning_of_an_earlier_one_is_gone(tmp_path: Path) -> None:
    template = load(tmp_path, REASONING)
    roles = ["user", "assistant", "user", "assistant", "tool", "assistant"]
    first, second = template.documents(chat([(role, f"text {n}") for n, role in enumerate(roles)]))
    assert (len(first.spans), len(second.spans)) == (1, 2)


def test_a_template_that_marks_what_is_generated(tmp_path: Path) -> None:
    template = load(tmp_path, GENERATION)
    (document,) = template.documents(chat(PLAIN))
    assert answers(template, document) == ["Hello<|im_end|>", "größe<|im_end|>", "b<|im_end|>"]
    assert document.text.count("Bot: ") == 3


def test_an_answer_that_the_template_marks_in_parts_is_one_turn(tmp_path: Path) -> None:
    """A span of fixed tokens joins its parts, so that nothing is filled in between."""
    parts = "{{- m.content }}{%- endgeneration %}{{- ' :: ' }}{%- generation %}{{- m.content }}{%- endgeneration"
    template = load(tmp_path, GENERATION.replace("{{- m.content }}{%- endgeneration", parts, 1))
    (document,) = template.documents(chat([("user", "Hi"), ("assistant", "Hello"), ("user", "So"), ("assistant", "b")]))
    assert [kind for *_, kind in document.spans] == [MASKABLE, FIXED, MASKABLE] * 2
    texts = [template.tokenizer.decode(document.ids[a:b], skip_special_tokens=False) for a, b, _ in document.spans]
    assert texts == ["Hello", " :: ", "Hello<|im_end|>", "b", " :: ", "b<|im_end|>"]
    turns = Turns.of(Spans.of_lists([document.spans]))
    assert turns.of_span.tolist() == [0, 0, 0, 1, 1, 1] and not turns.is_cut.any()


def test_a_template_whose_mark_misses_the_answer(tmp_path: Path) -> None:
    template = load(tmp_path, GENERATION.replace("{{- m.content }}{%- endgeneration", "{%- endgeneration", 1))
    with pytest.raises(BadDocumentError, match=r"message 2 \(assistant\): .*"):
        template.documents(chat(PLAIN))


def test_tokens_that_would_merge_across_the_beginning_of_an_answer(tmp_path: Path) -> None:
    template = load(tmp_path, MERGING)
    given = chat([("user", "x"), ("assistant", "wer"), ("user", "y"), ("assistant", "wer")])
    merged = template.tokenizer.token_to_id("answer")
    first, second = template.documents(given)
    assert answers(template, first) == ["wer<|im_end|>"] and merged not in first.ids
    assert first.ids[: first.spans[0][0]] == expected_prompt(template, given, 1)
    # In the next prompt a server reads the merged token: its answer is learned in a document of its own.
    assert merged in second.ids[: second.spans[0][0]] and len(second.spans) == 1
    assert second.ids[: second.spans[0][0]] == expected_prompt(template, given, 3)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (MASK_TOKEN + CHATML, "writes .*, the mask token"),
        (CHATML.replace("<|im_end|>", "END"), "must end what the assistant says with a special token"),
        ("{% if %}", r"is no jinja \(line 1"),
    ],
)
def test_a_template_that_is_of_no_use_ends_everything(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, template).documents(chat(PLAIN))
    assert not isinstance(caught.value, BadDocumentError)


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        (CHATML, "a <|im_end|> b", r"message 1 holds <\|im_end\|>, a special token"),
        (CHATML, "\ud800", "half a surrogate pair"),
        ("{{ raise_exception('no such turn') }}", "a", r"the chat template refuses it \(no such turn\)"),
        (CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"), "a", "is no beginning of the answer"),
    ],
)
def test_a_chat_that_cannot_be_rendered_says_why(tmp_path: Path, template: str, text: str, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        load(tmp_path, template).documents(chat([("user", text), ("assistant", "b")]))


def test_a_folder_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer \(.*\) has no chat template"):
        ChatTemplate.load(write_chat_tokenizer(tmp_path, None))


def test_a_template_in_tokenizer_config(tmp_path: Path) -> None:
    folder = Path(write_chat_tokenizer(tmp_path, None))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for value in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
        assert ChatTemplate.load(str(folder)).text == CHATML


def test_the_mask_id_of_serving_is_known_by_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    """In Ling's chat tokenizer that id ends turns."""
    tokens = [{"id": 156895, "content": "<|role_end|>", "special": True}, {"id": 156896, "content": "x"}]
    description = json.loads((Path(write_chat_tokenizer(tmp_path)) / "tokenizer.json").read_text())
    description["added_tokens"] += [{**description["added_tokens"][0], **token} for token in tokens]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert 156895 in ChatTemplate.load(str(tmp_path)).mask_ids


@pytest.mark.parametrize("template", [CHATML, REASONING, GENERATION])
def test_a_prompt_is_what_a_server_gives_and_the_end_of_a_turn_is_known(tmp_path: Path, template: str) -> None:
    loaded = load(tmp_path, template)
    asked = Chat(chat(PLAIN).messages[:3])
    ids = loaded.tokenizer.encode(loaded.prompt(asked), add_special_tokens=False).ids
    assert ids == expected_prompt(loaded, asked, 3)
    assert loaded.tokenizer.id_to_token(loaded.end_of_turn()) == "<|im_end|>"


def test_a_prompt_must_not_write_special_tokens(tmp_path: Path) -> None:
    with pytest.raises(BadDocumentError, match=r"message 1 holds <\|im_end\|>"):
        load(tmp_path, CHATML).prompt(Chat([{"role": "user", "content": "a<|im_end|>"}]))
