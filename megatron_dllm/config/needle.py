"""What a test of long contexts hides, asks and writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dllm.config.evaluate import EvaluateConfig
from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.config.rules import check, check_positive

# The shortest haystack: a needle, its question and some text.
SHORTEST = 64
# What each text must hold.
_MADE_UP = {"needle": ("{name}", "{value}"), "question": ("{name}",), "answer": ("{value}",)}


@dataclass
class NeedleConfig(EvaluateConfig):
    """A configuration of which model, layout, corpus and questions count; the checkpoint brings the rest."""

    # What is hidden in the text; {name} and {value} are made up.
    needle: str = " The secret number of {name} is {value}."
    # What stands behind the text; the right value is to follow.
    question: str = " The secret number of {name} is"
    # The value as it follows.
    answer: str = " {value}"
    # Tokens of text, question and answer together; empty: an eighth, a quarter, a half and the whole of the context.
    lengths: list[int] = field(default_factory=list)
    # Where the needle lies, in [0, 1]: 0 at the beginning of the text, 1 before the question.
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    # Needles that are hidden one after the other at each length and depth; 0: none.
    num_needles: int = 8
    # Values that the model chooses from by their likelihood.
    num_choices: int = 8
    # Documents whose ELBO is measured by position; 0: none.
    num_documents: int = 8
    # Tokens of each stretch of positions; null: an eighth of the context.
    stretch: int | None = None
    # Null: the block size that the checkpoint was trained with.
    block_size: int | None = None
    # Of names, values and texts.
    seed: int = 0
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)

    @property
    def asked_lengths(self) -> list[int]:
        """`lengths` with its default filled in, each once."""
        whole = self.schedule.context_length
        return sorted({*(self.lengths or [max(whole // part, min(SHORTEST, whole)) for part in (8, 4, 2, 1)])})

    @property
    def stretch_length(self) -> int:
        """`stretch` with its default filled in."""
        return self.stretch or max(self.schedule.context_length // 8, 1)

    def validate(self, world_size: int) -> None:
        """Raise ValueError for what cannot be asked."""
        super().validate(world_size)
        context = self.schedule.context_length
        for length in self.lengths:
            check(
                SHORTEST <= length <= context,
                f"lengths ({length}) must lie in [{SHORTEST}, schedule.context_length] = [{SHORTEST}, {context}]; "
                "a longer context needs schedule.context_length and a model with such positions.",
            )
        check(bool(self.depths), "depths ([]) is empty; give one or more, in [0, 1].")
        for depth in self.depths:
            check(0.0 <= depth <= 1.0, f"depths ({depth}) must lie in [0, 1]; 0 is the beginning of the text.")
        for name in ("num_needles", "num_documents"):
            value = getattr(self, name)
            check(value >= 0, f"{name} ({value}) must not be negative; 0 leaves that part out.")
        check(
            self.num_needles > 0 or self.num_documents > 0,
            "num_needles (0) and num_documents (0) measure nothing; give one of them.",
        )
        check(self.num_choices >= 2, f"num_choices ({self.num_choices}) must be at least 2: one of them is right.")
        if self.stretch is not None:
            check_positive("stretch", self.stretch)
        check(len({*self.depths}) == len(self.depths), f"depths ({self.depths}) holds one twice; give each once.")
        for key, parts in _MADE_UP.items():
            _check_text(key, getattr(self, key), parts)
        self.likelihood.validate()


def _check_text(key: str, text: str, parts: tuple[str, ...]) -> None:
    """Refuse a text without the parts that are made up, or with other braces."""
    rest = text.replace("{{", "").replace("}}", "")
    for part in parts:
        check(part in rest, f"{key} ({text!r}) must hold {part}, which stands for what is made up.")
        rest = rest.replace(part, "")
    check(
        "{" not in rest and "}" not in rest,
        f"{key} ({text!r}) must have {' and '.join(parts)} alone in braces; write other braces twice.",
    )
