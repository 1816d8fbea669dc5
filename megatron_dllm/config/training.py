"""How the model is trained, beyond its sizes: what is no part of the weights' meaning and not stored with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dllm.config.rules import check, check_choice

ATTENTION_BACKENDS = ("auto", "dense", "chunked", "shared_prefix", "flex")


@dataclass
class TrainingConfig:
    """Settings that may change from one run to the next, or within a run, without making it another model."""

    # Implementation of attention: auto, dense, chunked, shared_prefix or flex (docs/performance.md).
    attention_backend: str = "auto"
    # Compute the last layer's outputs only for tokens with a loss (exact; set false to compare).
    skip_unused_outputs: bool = True
    # Standard deviation of the noise added to the embedding of masked tokens, as a fraction of the
    # mean norm of the embedding rows; falls linearly to 0 over so many steps (LLaDA2.0 section 7.1).
    mask_embedding_noise: float = 0.0
    # Optimizer steps over which mask_embedding_noise falls to 0.
    mask_embedding_noise_steps: int = 0
    # Step by which the bias of each expert follows its load; 0: it stays what it was.
    moe_router_bias_update_rate: float = 0.0
    # Weight of the loss that evens out the experts' load; 0: off.
    moe_aux_loss_coeff: float = 0.0
    # Weight of the loss that keeps the router's logits small; 0: off.
    moe_z_loss_coeff: float = 0.0

    def validate(self) -> None:
        """Raise ValueError for an unknown backend, or noise that never falls to 0."""
        check_choice("training.attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        for name in ("mask_embedding_noise", "moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff"):
            value = getattr(self, name)
            check(0.0 <= value < math.inf, f"training.{name} ({value}) must be a number of at least 0; 0 turns it off.")
        check(
            self.mask_embedding_noise == 0.0 or self.mask_embedding_noise_steps > 0,
            f"training.mask_embedding_noise_steps ({self.mask_embedding_noise_steps}) must be positive with "
            f"mask_embedding_noise ({self.mask_embedding_noise}), which falls to 0 over so many steps; give their "
            "number, or set mask_embedding_noise to 0.",
        )
