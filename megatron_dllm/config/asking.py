"""How tasks of lm-evaluation-harness are asked."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.rules import check


@dataclass
class AskingConfig:
    """Where tasks come from, and what stands in front of each question."""

    # Folder with YAML files of further tasks, known by their names; null: none.
    include_path: str | None = None
    # Solved examples in front of each question; null: what the task says.
    num_fewshot: int | None = None
    # Ask in the form of chats, by the tokenizer's template.
    apply_chat_template: bool = False
    # In a chat, examples are earlier turns; false: they stand in the question.
    fewshot_as_multiturn: bool = True
    # A text that every question is preceded by; null: none.
    system_instruction: str | None = None
    # Of the choice of examples.
    fewshot_seed: int = 1234
    # Allow tasks that run what the model writes as a program on this machine.
    confirm_unsafe_code: bool = False

    def validate_asking(self) -> None:
        """Raise ValueError for impossible numbers; tasks are looked up when they are loaded."""
        for name in ("num_fewshot", "fewshot_seed"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"{name} ({value}) must not be negative; give 0 or more.")
