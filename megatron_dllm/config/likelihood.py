"""How the likelihood of a continuation is estimated."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.rules import check, check_choice, check_positive

AUTO, EXACT, STRATIFIED, COUNTS, T_UNIFORM, LEFT_TO_RIGHT = ESTIMATORS = (
    "auto",
    "exact",
    "stratified",
    "counts",
    "t_uniform",
    "left_to_right",
)
CONTINUATION_FILLS = ("mask", "none", "eos")
# 2^n - 1 views of a block: 1023.
MOST_ENUMERATED = 10


@dataclass
class LikelihoodConfig:
    """Estimators of the ELBO of given tokens under block diffusion; an autoregressive model is scored exactly."""

    # auto: every mask where no block has more than exact_up_to tokens to score, else stratified. exact: every mask.
    # stratified: num_views views whose mask counts are spread evenly, and whose masks differ as far as their counts
    # allow. counts: whose counts are independent. t_uniform: t uniform on [0, 1] and independent masks, weight 1/t.
    # left_to_right: the exact log-likelihood of writing token by token, which is no ELBO.
    estimator: str = "auto"
    # Noisy views of a continuation, which share the clean copy of what stands before; no effect on exact estimators.
    num_views: int = 8
    # Most tokens of a block whose 2^n - 1 masks auto enumerates.
    exact_up_to: int = 3
    # What stands between the end of the continuation and the end of its block. mask: mask tokens without a loss, as a
    # decoder sees it. none: nothing. eos: end-of-text tokens that are scored too.
    fill: str = "mask"
    # Of the noise.
    seed: int = 0
    # Cut the beginning of a context that does not fit the window; false: refuse such a request.
    truncate: bool = False
    # Tokens of a row at the most, unless one request needs more; null: twice the context length.
    row_length: int | None = None

    def validate(self) -> None:
        """Raise ValueError for an estimator or a fill that is not known, or impossible numbers."""
        check_choice("likelihood.estimator", self.estimator, ESTIMATORS)
        check_choice("likelihood.fill", self.fill, CONTINUATION_FILLS)
        check_positive("likelihood.num_views", self.num_views)
        check(
            0 <= self.exact_up_to <= MOST_ENUMERATED,
            f"likelihood.exact_up_to ({self.exact_up_to}) must lie in [0, {MOST_ENUMERATED}]: n tokens have 2^n - 1 "
            "masks; 3 takes 7 views.",
        )
        check(0 <= self.seed < 2**63, f"likelihood.seed ({self.seed}) must lie in [0, 2^63).")
        check(
            self.row_length is None or self.row_length > 0,
            f"likelihood.row_length ({self.row_length}) must be positive; null takes twice the context length.",
        )
