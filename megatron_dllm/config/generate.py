"""How text is decoded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from megatron_dllm.config.placement import PlacementConfig
from megatron_dllm.config.rules import check, check_choice, check_positive, check_values

RULES = ("threshold", "factor", "hierarchy", "entropy_bound", "credit")
REQUESTS = ("prompt", "prompts_file", "messages", "chats_file")


@dataclass
class DecodingConfig:
    """How a block of masks becomes tokens. Lengths count tokens, probabilities lie in [0, 1]."""

    # Which predicted tokens a step keeps: threshold, factor, hierarchy, entropy_bound or credit
    # (docs/decoding.md).
    rule: str = "threshold"
    # Rules threshold, hierarchy and credit keep every token whose probability exceeds this.
    threshold: float = 0.95
    # Rule factor keeps the n surest tokens for the largest n with (n + 1)(1 - probability of the n-th) below this.
    factor: float = 1.0
    # Rule hierarchy also keeps the surest token of each run of masked neighbours if its probability exceeds this.
    low_threshold: float = 0.4
    # Rule entropy_bound keeps the surest tokens while their entropies, without the largest, add up to at most so many
    # nats.
    entropy_bound: float = 0.1
    # Rule credit adds so much times log(1 + credit) to the logit of a token that passes over its block have had first.
    credit_weight: float = 0.7
    # What is left of a token's credit after each further pass, in [0, 1).
    credit_decay: float = 0.8
    # A pass gives its most probable token a credit of its probability to this power; 0 gives all the same.
    credit_exponent: float = 0.2
    # Tokens that every step keeps at least, whatever the rule.
    min_tokens_per_step: int = 1
    # Most tokens that are generated.
    max_new_tokens: int = 256
    # 0 takes the most probable token; above 0, tokens are sampled within `top_p` and `top_k` (0: all tokens).
    temperature: float = 0.0
    # Sample among the most probable tokens that have this probability together, in (0, 1]; 1: all tokens.
    top_p: float = 1.0
    # Sample among so many most probable tokens; 0: all tokens.
    top_k: int = 0
    # Of sampling; a prompt with index i uses seed + i.
    seed: int = 1234

    def validate(self) -> None:
        """Raise ValueError for values that decoding cannot follow."""
        check(
            0.0 < self.threshold <= 1.0,
            f"threshold ({self.threshold}) must lie in (0, 1]; 1 accepts min_tokens_per_step tokens a step.",
        )
        check_choice("rule", self.rule, RULES)
        check(
            0.0 <= self.low_threshold <= 1.0,
            f"low_threshold ({self.low_threshold}) must lie in [0, 1]; 0 keeps one token of every run.",
        )
        check(
            0.0 <= self.credit_decay < 1.0,
            f"credit_decay ({self.credit_decay}) must lie in [0, 1); 0 gives credit to the last pass alone.",
        )
        for name in ("credit_weight", "credit_exponent"):
            value = getattr(self, name)
            check(0.0 <= value < float("inf"), f"{name} ({value}) must be finite and not negative; give 0 or more.")
        for name in ("factor", "entropy_bound"):
            value = getattr(self, name)
            check(0.0 <= value < float("inf"), f"{name} ({value}) must be finite and not negative; 0 is the strictest.")
        for name in ("min_tokens_per_step", "max_new_tokens"):
            check_positive(name, getattr(self, name))
        check(
            0.0 <= self.temperature < float("inf"),
            f"temperature ({self.temperature}) must be finite and not negative; 0 takes the most probable token.",
        )
        check(0.0 < self.top_p <= 1.0, f"top_p ({self.top_p}) must lie in (0, 1]; 1 keeps the whole distribution.")
        check(self.top_k >= 0, f"top_k ({self.top_k}) must not be negative; 0 keeps the whole vocabulary.")
        check(0 <= self.seed < 2**63, f"seed ({self.seed}) must lie in [0, 2^63).")


@dataclass
class GenerateConfig(DecodingConfig, PlacementConfig):
    """What `megatron_dllm.generate` loads, decodes and writes."""

    # An HF folder, a run folder, its checkpoints folder, or one torch_dist checkpoint folder.
    checkpoint: str = MISSING
    # A text. Give exactly one of prompt, prompts_file, messages and chats_file.
    prompt: str | None = None
    # A file with one prompt a line (.jsonl: an object with "prompt" a line).
    prompts_file: str | None = None
    # A chat as a JSON list of messages; an answer that it ends with is left out.
    messages: str | None = None
    # A .jsonl file with one chat a line; an answer that a chat ends with is left out.
    chats_file: str | None = None
    # JSON lines, one for each prompt; the file must not exist yet.
    output: str | None = None
    # Go on behind the lines that an interrupted start with the same prompts and settings has left in OUTPUT.partial.
    resume: bool = False
    # Null: the block size that the checkpoint was trained with.
    block_size: int | None = None
    # Strings that end a text; they are looked for after every block, and cut off.
    stop: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raise ValueError where the request is incomplete or contradicts itself; files are checked when opened."""
        DecodingConfig.validate(self)
        self.validate_placement()
        check(self.checkpoint not in ("", MISSING), "checkpoint (not given) is required: name an HF or a run folder.")
        given = {name: getattr(self, name) for name in REQUESTS if getattr(self, name) is not None}
        check(
            len(given) == 1,
            f"{', '.join(REQUESTS)} ({', '.join(given) or 'none is given'}): give exactly one of the four.",
        )
        check(self.prompt != "", "prompt ('') is empty; give at least one token to continue from.")
        check(
            self.output is not None or not self.resume,
            "resume (true) goes on with the lines of an output, and output is not given; name it.",
        )
        check("" not in self.stop, f"stop ({self.stop}) must not hold an empty string; every text would end at once.")
        check(
            self.block_size is None or self.block_size > 0,
            f"block_size ({self.block_size}) must be positive; null takes the checkpoint's.",
        )
        # A stop string may be white space.
        check_values(replace(self, stop=[]), unbounded=("seed",))
