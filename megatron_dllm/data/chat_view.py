"""Chats and pairs on the screen as the model will see them: what it reads, and what it learns to say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_dllm.config.rules import check
from megatron_dllm.data.chat_template import ChatDocument
from megatron_dllm.data.pair_encoding import TemplateEncoder, TemplateEncoding
from megatron_dllm.data.reading import BadDocumentError, read_batches
from megatron_dllm.data.spans import FIXED

_PROMPT, _SUPERVISED, _FILL, _BAD = "dim", "bold green", "cyan", "red"


def show_chats(
    files: list[Path],
    chats: TemplateEncoding,
    num_chats: int,
    block_size: int | None = None,
    console: Console | None = None,
) -> None:
    """Print the first chats or pairs of some files; a bad one with the reason why it is bad.

    Args:
        files: in order.
        chats: how they become documents; shown whole, whatever `max_length` is.
        num_chats: how many chats, or pairs.
        block_size: of the stage that will train them, whose rows fill up the last block of an answer; None: no fill.
        console: where to; None: standard output.

    Raises:
        ValueError: the tokenizer has no chat template, or `num_chats` is below 1.
    """
    check(num_chats >= 1, f"inspect ({num_chats}) must be at least 1.")
    check(block_size is None or block_size >= 1, f"block_size ({block_size}) must be at least 1.")
    encoder, console = chats.load(), console or Console()
    legend = Text.assemble(("prompt", _PROMPT), "   ", ("[supervised]", _SUPERVISED))
    if block_size is not None:
        legend.append("   ").append("{fill x tokens}, supervised too", _FILL)
    console.print(legend)
    for source, content in islice(_chats(files, encoder), num_chats):
        if isinstance(content, BadDocumentError):
            console.print(Text(f"{source}: {content}", _BAD), soft_wrap=True)
            continue
        for number, document in enumerate(content, start=1):
            title = encoder.title(number, len(content))
            console.rule(f"{source}, {title}, {len(document.ids)} tokens", align="left")
            console.print(_coloured(document, encoder, block_size), soft_wrap=True)


def _chats(files: list[Path], encoder: TemplateEncoder) -> Iterator[tuple[str, list[ChatDocument] | BadDocumentError]]:
    for batch in read_batches(files, None):
        for document in batch.documents:
            try:
                yield document.source, encoder.documents(document)
            except BadDocumentError as error:
                yield document.source, error


def _coloured(document: ChatDocument, encoder: TemplateEncoder, block_size: int | None) -> Text:
    """A document as text; brackets mark what is supervised where there are no colours."""
    text, done = Text(), 0
    spans = [(start, stop) for start, stop, kind in document.spans if kind != FIXED]
    for number, (start, stop) in enumerate(spans, start=1):
        text.append(encoder.decode(document.ids[done:start]), _PROMPT)
        text.append(f"[{encoder.decode(document.ids[start:stop])}]", _SUPERVISED)
        is_end = number == len(spans) or spans[number][0] != stop  # parts that touch are one turn
        if block_size is not None and is_end and stop % block_size:
            text.append(f"{{{encoder.fill} x {-stop % block_size}}}", _FILL)
        done = stop
    return text.append(encoder.decode(document.ids[done:]), _PROMPT)
