"""The text of a chat whose answer has begun."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dllm.config.likelihood import LikelihoodConfig
from tests.conftest import NOT_RUN

pytest.importorskip("lm_eval", reason=f"{NOT_RUN}no lm-evaluation-harness here; pip install -e '.[eval]'")

from megatron_dllm.evaluation.harness.model import HarnessModel


class Trimming:
    """A chat template that takes white space off the ends of messages."""

    def render(self, messages: list[dict[str, str]], tools: None, is_prompt: bool) -> str:
        return "".join(f"<{message['content'].strip()}>" for message in messages) + "<" * is_prompt


def test_a_chat_ends_where_the_answer_begins_or_goes_on() -> None:
    encoder: Any = SimpleNamespace(template=Trimming(), folder=Path("folder"))
    model = HarnessModel(None, encoder, LikelihoodConfig(), 4)  # type: ignore[arg-type]
    question, begun = {"role": "user", "content": "So?"}, {"role": "assistant", "content": "So"}
    assert model.apply_chat_template([question]) == "<So?><"
    assert model.apply_chat_template([question, begun], add_generation_prompt=False) == "<So?><So"
    with pytest.raises(ValueError, match=r"gen_prefix \('So '\), .* template of folder changes it; take spaces off"):
        model.apply_chat_template([question, begun | {"content": "So "}], add_generation_prompt=False)
