"""What a study of decoding measures."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from megatron_dllm.config.asking import AskingConfig
from megatron_dllm.config.generate import RULES, DecodingConfig, GenerateConfig
from megatron_dllm.config.placement import PlacementConfig
from megatron_dllm.config.rules import check, check_choice, check_positive, check_values

# The setting that each rule is tried with, and the key of a study that lists its values.
SWEPT = {
    "threshold": ("threshold", "thresholds"),
    "factor": ("factor", "factors"),
    "hierarchy": ("threshold", "thresholds"),
    "entropy_bound": ("entropy_bound", "entropy_bounds"),
    "credit": ("threshold", "thresholds"),
}


@dataclass
class StudyConfig(PlacementConfig, AskingConfig):
    """Checkpoints, questions, and the grid of block sizes and rules that all of them are decoded with."""

    # Folders as of generate, one for each time that the key is given.
    checkpoint: list[str] = field(default_factory=list)
    # Names of tasks whose answers a program can check, or tasks of lm-evaluation-harness that have a model write: names
    # or YAML files. Empty: all of the former.
    tasks: list[str] = field(default_factory=list)
    # The filter that takes answers out of texts, where a task of lm-evaluation-harness has several (gsm8k: strict-match
    # and flexible-extract). Null: the first that each task lists.
    filter: str | None = None
    # Held-out questions of each task.
    num_questions: int = 60
    # A .jsonl file of chats that end with a right answer, instead of the questions of the tasks.
    chats_file: str | None = None
    # Rules that are tried; each with every value of its setting.
    rules: list[str] = field(default_factory=lambda: ["threshold"])
    # Of the rules threshold, hierarchy and credit.
    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99])
    # Of the rule factor.
    factors: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    # Of the rule entropy_bound, in nats.
    entropy_bounds: list[float] = field(default_factory=lambda: [0.05, 0.2, 0.8])
    # Empty: the block size that each checkpoint was trained with.
    block_sizes: list[int] = field(default_factory=list)
    # Longest answer.
    max_new_tokens: int = 64
    # JSON file to write; the picture lies beside it, under the same name with .png. Neither must exist yet.
    output: str | None = None

    def settings(self) -> list[DecodingConfig]:
        """One for each rule and each value of its setting."""
        return [
            DecodingConfig(rule=rule, max_new_tokens=self.max_new_tokens, **{SWEPT[rule][0]: value})
            for rule in self.rules
            for value in getattr(self, SWEPT[rule][1])
        ]

    def source(self, checkpoint: str) -> GenerateConfig:
        """How one of the checkpoints is opened."""
        placement = {item.name: getattr(self, item.name) for item in fields(PlacementConfig)}
        return GenerateConfig(checkpoint=checkpoint, max_new_tokens=self.max_new_tokens, **placement)

    def validate(self) -> None:
        """Raise ValueError where the study is incomplete, or names a setting that decoding cannot follow."""
        self.validate_placement()
        self.validate_asking()
        check(bool(self.checkpoint), "checkpoint (not given) is required: name an HF or a run folder.")
        check(bool(self.rules), "rules ([]) is empty; name one or more.")
        check(
            not (self.tasks and self.chats_file),
            f"tasks ({self.tasks}) and chats_file ({self.chats_file}) are two sources of questions; give one of them.",
        )
        check(
            self.output is None or Path(self.output).suffix != ".png",
            f"output ({self.output}) is where the picture goes; name the .json file beside it.",
        )
        check_positive("num_questions", self.num_questions)
        for rule in self.rules:
            check_choice("rules", rule, RULES)
            name = SWEPT[rule][1]
            check(bool(getattr(self, name)), f"{name} ([]) is empty; rule {rule} needs a value.")
        for config in self.settings():
            config.validate()
        for size in self.block_sizes:
            check_positive("block_sizes", size)
        check_values(self)
