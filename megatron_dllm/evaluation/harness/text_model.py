"""A model that writes texts as lm-evaluation-harness sees it: prompts as tokens, chats, and what is written."""

from __future__ import annotations

import time
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from megatron_dllm.config.rules import check
from megatron_dllm.diffusion.generation import Generation
from megatron_dllm.evaluation.harness.requests import Encoder
from megatron_dllm.evaluation.harness.writing import Writer


class TextModel(TemplateLM):
    """What `lm_eval.simple_evaluate` asks for texts.

    Args:
        encoder: of the checkpoint's tokenizer.
        writer: writes texts; None: no task asks for any.

    Attributes:
        written: the task and the text of every prompt so far, in order.
        seconds: that writing them took.
    """

    def __init__(self, encoder: Encoder, writer: Writer | None) -> None:
        super().__init__()
        self._encoder, self._writer = encoder, writer
        self.written: list[tuple[str, Generation]] = []
        self.seconds = 0.0

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also stands for an empty context."""
        return self._encoder.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which the harness would keep prompts; they are not kept."""
        return str(self._encoder.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; none is added, as this program's corpora begin with text."""
        return self._encoder.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat: up to where the assistant begins to speak, or goes on with its last message.

        Raises:
            ValueError: the template refuses the chat, or does not write that message as it stands.
        """
        template = self._encoder.template
        assert template is not None, "a run that asks for chats has a template"
        text = template.render(chat_history, None, is_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rfind(last)
        check(
            start >= 0,
            f"gen_prefix ({last!r}), with which the answer is to begin, must stand in the chat as it is, and the "
            f"template of {self._encoder.folder} changes it; take spaces off its ends in the task.",
        )
        return text[: start + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the record."""
        return None if self._encoder.template is None else self._encoder.template.text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind every prompt, up to where the task ends it."""
        assert self._writer is not None, "a run with such a task has a writer"
        begun = time.perf_counter()
        found = self._writer.write(requests)
        self.seconds += time.perf_counter() - begun
        self.written += [(str(request.task_name), one.generation) for request, one in zip(requests, found, strict=True)]
        return [one.text for one in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        raise AssertionError("tasks with choices need a model that scores")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not here."""
        raise AssertionError("tasks with documents need a model that scores")
