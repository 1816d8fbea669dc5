"""What is to be decoded: texts to continue, or chats to answer, as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_dllm.config import GenerateConfig
from megatron_dllm.data.chat import Chat, question_of
from megatron_dllm.data.chat_template import ChatTemplate
from megatron_dllm.data.reading import BadDocumentError
from megatron_dllm.diffusion.decode import DecodingContract, check_prompt
from megatron_dllm.inference.source import CheckpointSource


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        text: with the special tokens that a chat template writes.
        ids: its tokens.
    """

    text: str
    ids: list[int]


def read_requests(config: GenerateConfig) -> list[str | Chat]:
    """The prompts or the chats that the configuration names.

    Raises:
        ValueError: a file is missing, holds nothing, or a line that is neither; with its number.
    """
    if config.prompt is not None:
        return [config.prompt]
    if config.messages is not None:
        return [_chat(parse_line(config.messages, "messages"), "messages")]
    if config.chats_file is not None:
        return [*read_chats(Path(config.chats_file))]
    assert config.prompts_file is not None, "validate() asks for one of the four"
    return [*_read_texts(Path(config.prompts_file))]


def _read_texts(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f'prompts_file ({path}) is not a file; name a text file, or .jsonl with a "prompt" a line.')
    is_json = path.suffix == ".jsonl"
    prompts = [_json_prompt(line, place) if is_json else line for line, place in numbered_lines(path)]
    if not prompts:
        raise ValueError(f"prompts_file ({path}) holds no prompt; write one a line.")
    return prompts


def read_chats(path: Path) -> list[Chat]:
    """The chats of a file, a JSON object a line, each without the answer that it may end with.

    Raises:
        ValueError: the file is missing or empty, or a line is no chat that asks for an answer; with its number.
    """
    if not path.is_file():
        raise ValueError(f'chats_file ({path}) is not a file; name a .jsonl file with "messages" a line.')
    chats = [_chat(parse_line(line, place), place) for line, place in numbered_lines(path)]
    if not chats:
        raise ValueError(f"chats_file ({path}) holds no chat; write one a line.")
    return chats


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that hold anything, each with its place. A byte order mark is no text."""
    # Lines end at line feeds alone: splitlines() also cuts at U+2028, inside a prompt.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield line, f"{path}:{number}"


def _chat(value: Any, place: str) -> Chat:
    """A list of messages, or a record of a data set of chats."""
    try:
        return question_of({"messages": value} if isinstance(value, list) else value)
    except BadDocumentError as error:
        raise ValueError(f"{place}: {error}; give messages with role and content, the last one of the user.") from None


def parse_line(text: str, place: str) -> Any:
    """The JSON that stands at a place.

    Raises:
        ValueError: it is none, naming the place.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} ({text[:80]}) is no JSON ({error}); write it as JSON.") from None


def _json_prompt(line: str, place: str) -> str:
    value = parse_line(line, place)
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'{place} ({line[:80]}) must be an object with a non-empty text "prompt".')
    return prompt


def encode_requests(
    requests: Sequence[str | Chat], tokenizer: Tokenizer, source: CheckpointSource
) -> tuple[list[Prompt], DecodingContract]:
    """Token ids of every prompt, and how to decode them: an answer also ends with the token that ends a turn.

    No token is added to a text, but special tokens that stand in it (chat markers) count as such.

    Raises:
        ValueError: naming the prompt that cannot be decoded, before any is.
    """
    if any(isinstance(request, Chat) for request in requests):
        template = ChatTemplate.load(str(source.tokenizer))
        contract = chat_contract(source.contract, template)
        texts = [_render(template, request, number) for number, request in enumerate(requests, start=1)]
    else:
        contract, texts = source.contract, [str(request) for request in requests]
    prompts = [Prompt(text, tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    for number, prompt in enumerate(prompts, start=1):
        _check(prompt, f"prompt {number} of {len(prompts)}", contract, source)
    return prompts, contract


def chat_contract(contract: DecodingContract, template: ChatTemplate) -> DecodingContract:
    """The contract with the end of a turn among the tokens that end the text."""
    return replace(contract, eos_token_ids=(*contract.eos_token_ids, template.end_of_turn()))


def _render(template: ChatTemplate, request: str | Chat, number: int) -> str:
    assert isinstance(request, Chat), "texts and chats do not come together"
    try:
        return template.prompt(request)
    except BadDocumentError as error:
        raise ValueError(f"chat {number}: {error}; correct it.") from None


def _check(prompt: Prompt, name: str, contract: DecodingContract, source: CheckpointSource) -> None:
    vocab_size = source.model.vocab_size
    if prompt.ids and max(prompt.ids) >= vocab_size:
        raise ValueError(
            f"tokenizer ({source.tokenizer}) gives token {max(prompt.ids)}, the model's vocabulary ends at "
            f"{vocab_size - 1}; name the tokenizer that belongs to the checkpoint."
        )
    try:
        check_prompt(prompt.ids, contract)
    except ValueError as error:
        raise ValueError(f"{name} ({prompt.text[:40]!r}): {error}") from None
