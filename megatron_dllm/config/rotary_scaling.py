"""How the rotary embedding is stretched to contexts beyond those of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_dllm.config.rules import LARGEST_LENGTH, check, check_choice, check_positive

YARN, NTK, LLAMA3 = "yarn", "ntk", "llama3"
KINDS = (YARN, NTK, LLAMA3)
# The kind that reads each field; the others are read by every kind.
_KIND_OF = {
    "beta_fast": YARN,
    "beta_slow": YARN,
    "attention_factor": YARN,
    "distance_ahead": NTK,
    "low_freq_factor": LLAMA3,
    "high_freq_factor": LLAMA3,
}
# Beyond any published model; no context is that much longer than another.
_LARGEST_FACTOR = 1e4


@dataclass
class RotaryScalingConfig:
    """Lower frequencies for longer contexts. Lengths count tokens; a factor of 1 changes nothing, bit for bit."""

    # Which frequencies fall, and how far. yarn: slow ones by the factor, fast ones not (arXiv 2309.00071). ntk: the
    # base grows until the slowest pair that training has turned once turns once in the longer context (LongLLaDA,
    # UltraLLaDA). llama3: as Llama 3.1.
    kind: str = YARN
    # How many times longer the context becomes.
    factor: float = 1.0
    # Context length before it was stretched; must be given.
    original_max_position_embeddings: int = 0
    # yarn: pairs that turn at least so often in the original context keep their frequency.
    beta_fast: float = 32.0
    # yarn: pairs that turn at most so often take the whole factor.
    beta_slow: float = 1.0
    # yarn: factor on the rotated features of queries and keys; null: 0.1 ln(factor) + 1.
    attention_factor: float | None = None
    # ntk: tokens ahead of itself that a token saw in training. 0: autoregressive. The block size: block diffusion.
    # original_max_position_embeddings: whole segments (MDLM); then both ranges are doubled, as in UltraLLaDA.
    distance_ahead: int = 0
    # llama3: pairs with wavelengths above original_max_position_embeddings over this take the whole factor.
    low_freq_factor: float = 1.0
    # llama3: pairs with wavelengths below original_max_position_embeddings over this keep their frequency.
    high_freq_factor: float = 4.0

    @classmethod
    def of(cls, table: Mapping[str, Any] | str | None) -> RotaryScalingConfig | None:
        """From its values by name; None for null, and for ???, which has been left open."""
        return cls(**table) if isinstance(table, Mapping) else None

    @property
    def stretched_length(self) -> int:
        """Tokens of the longer context."""
        return int(self.factor * self.original_max_position_embeddings)

    @property
    def temperature(self) -> float:
        """Factor on the rotated features of queries and of keys."""
        if self.kind != YARN or self.factor == 1.0:
            return 1.0
        return self.attention_factor if self.attention_factor is not None else 0.1 * math.log(self.factor) + 1.0

    def ntk_base(self, base: float, num_features: int) -> float:
        """The base with which ntk turns, never below the model's own.

        Args:
            base: of the model.
            num_features: of a head that are rotated.
        """
        if self.factor == 1.0:
            return base
        ahead, length = self.distance_ahead, self.original_max_position_embeddings
        trained = length + ahead
        wanted = self.factor * length + (self.factor * ahead if ahead == length else ahead)
        # Pairs below half of this have turned at least once within the trained range.
        critical = 2 * math.ceil(num_features / 2 * math.log(trained / (2 * math.pi), base))
        return max(base, math.pow(wanted / (2 * math.pi), num_features / max(critical, 2)))

    def validate(self, key: str, longest: int = LARGEST_LENGTH) -> None:
        """Raise ValueError for a scaling that is incomplete or contradicts itself.

        Args:
            key: name of this group in messages.
            longest: max_position_embeddings of the model, where it is known.
        """
        check_choice(f"{key}.kind", self.kind, KINDS)
        self._refuse_what_another_kind_reads(key)
        check(
            1.0 <= self.factor <= _LARGEST_FACTOR,
            f"{key}.factor ({self.factor:g}) must lie in [1, {_LARGEST_FACTOR:g}]; 1 changes nothing.",
        )
        check(
            8 <= self.original_max_position_embeddings <= longest,
            f"{key}.original_max_position_embeddings ({self.original_max_position_embeddings}) must lie in [8, "
            f"{longest}]; give the context length that the model was made for, before it is stretched.",
        )
        if self.kind == YARN:
            self._validate_yarn(key)
        if self.kind == LLAMA3:
            check(
                0.0 < self.low_freq_factor < self.high_freq_factor,
                f"{key}.low_freq_factor ({self.low_freq_factor:g}) must be positive and below high_freq_factor "
                f"({self.high_freq_factor:g}); Llama 3.1 has 1 and 4.",
            )
        check(
            0 <= self.distance_ahead <= self.original_max_position_embeddings,
            f"{key}.distance_ahead ({self.distance_ahead}) must lie in [0, original_max_position_embeddings] = "
            f"[0, {self.original_max_position_embeddings}]; give 0, the block size, or the original length.",
        )

    def _refuse_what_another_kind_reads(self, key: str) -> None:
        """Refuse a value that would be passed over, as angles other than the asked ones look like any others."""
        for field in fields(self):
            kind, value = _KIND_OF.get(field.name, self.kind), getattr(self, field.name)
            check(
                kind == self.kind or value == field.default,
                f"{key}.{field.name} ({value}) has no effect with kind {self.kind}; leave it out, or set {key}.kind to "
                f"{kind}.",
            )

    def _validate_yarn(self, key: str) -> None:
        check(
            0.0 < self.beta_slow < self.beta_fast,
            f"{key}.beta_slow ({self.beta_slow:g}) must be positive and below beta_fast ({self.beta_fast:g}); "
            "YaRN has 1 and 32.",
        )
        if self.attention_factor is not None:
            check_positive(f"{key}.attention_factor", self.attention_factor)
            check(
                self.factor > 1.0,
                f"{key}.attention_factor ({self.attention_factor:g}) needs a factor above 1; a factor of 1 changes "
                "nothing: leave it out.",
            )
