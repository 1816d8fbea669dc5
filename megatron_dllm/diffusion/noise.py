"""Which tokens of a document piece are masked, at which noise level, and with which loss weight.

`t` is the probability that a token is masked (linear schedule, alpha_t = 1 - t), and the loss weight
1/t makes the weighted sum of masked NLLs an unbiased estimate of the negative ELBO (LLaDA2.0 Eq. 1, 2).

The noise is a pure function of its arguments: Philox keyed by (seed, epoch) and counted by the sample,
with no state. Every rank of any parallel layout draws the same, before and after a resume. Only raw
64-bit outputs are used, which numpy guarantees to keep from version to version.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config import NoiseConfig, StageConfig
from megatron_dllm.config.data import LOSS_WEIGHTS, T_UNITS

# Second word of the Philox counter: what a draw is for, so that no two uses share random numbers.
_LEVEL_OFFSET, _LEVEL, _STRATUM, _FIRST_MASKED, _TOKEN = range(5)
# 2^64 / golden ratio: multiples of it modulo 2^64 fill [0, 1) evenly, whichever run of them is taken.
_GOLDEN_STEP = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1
_RESOLUTION: float = 2.0**-53
_BELOW_ONE = float(np.nextafter(1.0, 0.0))


@dataclass(frozen=True)
class NoiseSpec:
    """How the noise of one stage is drawn.

    Attributes:
        t_unit: what shares one t: "block", "document" (the piece), or "row" (all pieces of a packed row).
        is_stratified: lay t out evenly over the blocks of a piece and over consecutive ordinals, instead of
            independently. Every single t stays uniform on [t_min, t_max). No effect with t_unit "row", whose
            key says nothing about a row's neighbours.
        at_least_one: every block with a maskable token has a masked one (single view only; a complementary
            pair masks every token once anyway).
        loss_weight: "elbo": 1/t, corrected for at_least_one. "uniform": 1, no bound on the likelihood.
            "realised": see `_realised_weights`.
        t_min: smallest noise level.
        t_max: largest noise level; the ELBO is the mean over [t_min, t_max).
        num_views: 1, or 2 for a complementary pair: the second view masks what the first does not.
        is_count: draw the number of masked tokens of a block uniformly, not t. See `_count_mask`.
    """

    t_unit: str
    is_stratified: bool
    at_least_one: bool
    loss_weight: str
    t_min: float
    t_max: float
    num_views: int
    is_count: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a specification that no mask could follow."""
        if self.t_unit not in T_UNITS:
            raise ValueError(f"t_unit ({self.t_unit}) is not known; use one of {', '.join(T_UNITS)}.")
        if self.loss_weight not in LOSS_WEIGHTS:
            raise ValueError(f"loss_weight ({self.loss_weight}) is not known; use one of {', '.join(LOSS_WEIGHTS)}.")
        if not 0.0 <= self.t_min <= self.t_max <= 1.0:
            raise ValueError(f"t_min, t_max ({self.t_min}, {self.t_max}) must satisfy 0 <= t_min <= t_max <= 1.")
        if self.num_views not in (1, 2):
            raise ValueError(
                f"num_views ({self.num_views}) must be 1, or 2 for a complementary pair; an AR stage has no noise."
            )
        if self.is_count and (self.num_views != 1 or self.loss_weight != "elbo"):
            raise ValueError(
                f"is_count (true) measures the ELBO with one view; it was given num_views "
                f"({self.num_views}) and loss_weight ({self.loss_weight}); use 1 and elbo."
            )

    @classmethod
    def for_stage(cls, noise: NoiseConfig, stage: StageConfig) -> NoiseSpec:
        """The noise of a training stage.

        Args:
            noise: settings that hold for the whole run.
            stage: a block-diffusion stage: its range of t and its number of views.

        Returns:
            The specification for `sample_noise`.
        """
        return cls(
            t_unit=noise.t_unit,
            is_stratified=noise.is_stratified,
            at_least_one=noise.at_least_one,
            loss_weight=noise.loss_weight,
            t_min=stage.t_min,
            t_max=stage.t_max,
            num_views=stage.num_views,
        )

    @classmethod
    def for_validation(cls) -> NoiseSpec:
        """The noise of the validation ELBO: over all of [0, 1], by counts, whatever the training noise is."""
        return cls(
            t_unit="block",
            is_stratified=True,
            at_least_one=True,
            loss_weight="elbo",
            t_min=0.0,
            t_max=1.0,
            num_views=1,
            is_count=True,
        )


@dataclass(frozen=True)
class PieceNoise:
    """The noise of one document piece of n tokens in k noisy views.

    Attributes:
        is_masked: [k, n] bool, true where the view shows the mask token.
        loss_weights: [k, n] float32, weight of the NLL; 0 where not masked.
        t: [k, n] float32, noise level of the token's block in that view; 0 where loss_mask is false.
    """

    is_masked: NDArray[np.bool_]
    loss_weights: NDArray[np.float32]
    t: NDArray[np.float32]


@dataclass(frozen=True)
class _Blocks:
    """The m maskable tokens of a piece, grouped into the c blocks that have any.

    Attributes:
        of_token: [m] int64, which of the c blocks a token lies in.
        rank: [m] int64, a token's place among the maskable tokens of its block.
        start: [c] int64, first token of a block.
        size: [c] int64, maskable tokens of a block.
    """

    of_token: NDArray[np.int64]
    rank: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int64]

    @classmethod
    def group(cls, block_ids: NDArray[np.int64]) -> _Blocks:
        """Group non-decreasing `block_ids` [m] of the maskable tokens."""
        steps = np.diff(block_ids)
        assert not len(steps) or steps.min() >= 0, "block_ids must not decrease along a piece"
        start = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(steps) + 1])
        size = np.diff(start, append=len(block_ids))
        of_token = np.repeat(np.arange(len(start)), size)
        return cls(of_token, np.arange(len(block_ids)) - start[of_token], start, size)


@dataclass(frozen=True)
class _Draws:
    """The random numbers of one sample: each method is a pure function of the key and its arguments."""

    seed: int
    epoch: int

    def raw(self, purpose: int, identity: int, count: int) -> NDArray[np.uint64]:
        """[count] uint64, the Philox stream of `purpose` for the sample or row `identity`."""
        key = np.array([self.seed & _WORD, self.epoch & _WORD], dtype=np.uint64)
        counter = np.array([0, purpose, 0, identity & _WORD], dtype=np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)

    def uniform(self, purpose: int, identity: int, count: int) -> NDArray[np.float64]:
        """[count] float64 in [0, 1)."""
        return (self.raw(purpose, identity, count) >> np.uint64(11)).astype(np.float64) * _RESOLUTION

    def even_level(self, ordinal: int) -> float:
        """Uniform in [0, 1) over seeds, evenly spread over consecutive ordinals (a Weyl sequence)."""
        offset = int(self.raw(_LEVEL_OFFSET, 0, 1)[0])
        return float(((offset + ordinal * _GOLDEN_STEP) & _WORD) >> 11) * _RESOLUTION


def sample_noise(
    spec: NoiseSpec,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    ordinal: int,
    row_key: int,
    block_ids: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
) -> PieceNoise:
    """Draw the masks, weights and noise levels of one document piece.

    Args:
        spec: how to draw them.
        seed: seed of the run.
        epoch: pass over the corpus.
        sample_id: identity of the piece; two pieces of a corpus never share it.
        ordinal: place of the piece in the shuffled order, which spreads t evenly over neighbours.
        row_key: identity of the packed row; used only with t_unit "row".
        block_ids: [n] int, non-decreasing; may start anywhere, and the first and last block may be partial.
        loss_mask: [n] bool, tokens that may be masked. The others never are and weigh 0.

    Returns:
        The noise of the piece. With loss_weight "elbo", `sum(loss_weights * nll)` over all views divided by
        `k * sum(loss_mask)` is an unbiased estimate of the negative ELBO per token, t uniform on [t_min, t_max).
    """
    assert block_ids.shape == loss_mask.shape and block_ids.ndim == 1, "block_ids and loss_mask are [n]"
    shape = (spec.num_views, len(block_ids))
    noise = PieceNoise(np.zeros(shape, np.bool_), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    maskable = np.flatnonzero(loss_mask)
    if not len(maskable):
        return noise
    blocks = _Blocks.group(block_ids[maskable])
    draws = _Draws(int(seed), int(epoch))
    u = _unit_levels(spec, draws, int(sample_id), int(ordinal), int(row_key), len(blocks.size))
    views, levels = _masks(spec, draws, int(sample_id), u, blocks)
    noise.is_masked[:, maskable] = views
    noise.loss_weights[:, maskable] = np.where(views, _weights(spec, views, levels, blocks), 0.0)
    noise.t[:, maskable] = levels[:, blocks.of_token]
    return noise


def _unit_levels(
    spec: NoiseSpec, draws: _Draws, sample_id: int, ordinal: int, row_key: int, num_blocks: int
) -> NDArray[np.float64]:
    """[c] float64, each uniform on [0, 1): where every block's t lies in its range."""
    if spec.t_unit == "row":
        return np.repeat(draws.uniform(_LEVEL, row_key, 1), num_blocks)
    if not spec.is_stratified:
        count = num_blocks if spec.t_unit == "block" else 1
        return np.broadcast_to(draws.uniform(_LEVEL, sample_id, count), num_blocks)
    base = draws.even_level(ordinal)
    if spec.t_unit == "document":
        return np.full(num_blocks, base)
    # Stable: the order of equal keys must not depend on the machine.
    stratum = np.argsort(draws.raw(_STRATUM, sample_id, num_blocks), kind="stable")
    return np.minimum((stratum + base) / num_blocks, _BELOW_ONE)


def _masks(
    spec: NoiseSpec, draws: _Draws, sample_id: int, u: NDArray[np.float64], blocks: _Blocks
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Masked tokens [k, m] and noise levels [k, c] of every view."""
    uniforms = draws.uniform(_TOKEN, sample_id, len(blocks.of_token))
    if spec.is_count:
        masked, t = _count_mask(u, uniforms, blocks)
        return masked[None], t[None]
    t = spec.t_min + (spec.t_max - spec.t_min) * u
    masked = uniforms < t[blocks.of_token]
    if spec.num_views == 2:
        return np.stack([masked, ~masked]), np.stack([t, 1.0 - t])
    if spec.at_least_one:
        first = _first_masked(t, draws.uniform(_FIRST_MASKED, sample_id, len(u)), blocks.size)[blocks.of_token]
        masked = (blocks.rank == first) | ((blocks.rank > first) & masked)
    return masked[None], t[None]


def _count_mask(
    u: NDArray[np.float64], uniforms: NDArray[np.float64], blocks: _Blocks
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Mask m tokens of every block, m uniform on 1..B and the subset uniform among those of size m.

    For t uniform on [0, 1] the ELBO gives a mask of m tokens the weight of the integral of
    (1/t) t^m (1-t)^(B-m), which is 1 / (m C(B, m)): m uniform on 1..B, any subset, weight B/m. So t := m/B
    with weight 1/t is that ELBO exactly, without the noise of a binomial count.

    Returns:
        [m] bool masked tokens, and [c] float64 levels t = m/B.
    """
    count = np.minimum(1 + (u * blocks.size).astype(np.int64), blocks.size)
    # Blocks stay in order and tokens are shuffled inside theirs, so a sorted position has its block's ranks.
    shuffled = np.lexsort((uniforms, blocks.of_token))
    masked = np.empty(len(uniforms), np.bool_)
    masked[shuffled] = blocks.rank < count[blocks.of_token]
    return masked, count / blocks.size


def _first_masked(t: NDArray[np.float64], u: NDArray[np.float64], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """First masked token of a block whose mask is iid Bernoulli(t), given that there is one.

    The inverse of the geometric distribution truncated to 0..size-1; later tokens stay independent.

    Args:
        t: [c] float64, mask probability.
        u: [c] float64, uniform on [0, 1).
        size: [c] int64, maskable tokens.

    Returns:
        [c] int64 in 0..size-1; uniform there in the limit t = 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log_keep = np.log1p(-t)
        first = np.log1p(u * np.expm1(size * log_keep)) / log_keep
    first = np.where(t > 0.0, first, u * size)
    return np.clip(first.astype(np.int64), 0, size - 1)


def _weights(
    spec: NoiseSpec, views: NDArray[np.bool_], levels: NDArray[np.float64], blocks: _Blocks
) -> NDArray[np.float64]:
    """Loss weights that a masked token would have, broadcastable to [k, m]."""
    if spec.loss_weight == "uniform":
        return np.ones(1)
    if spec.loss_weight == "realised":
        return _realised_weights(spec, views, blocks)
    if spec.at_least_one and spec.num_views == 1 and not spec.is_count:
        return _conditioned_weights(levels[0], blocks.size)[blocks.of_token]
    # Where t is 0 nothing is masked and the weight is not used.
    weights = np.divide(1.0, levels, out=np.zeros_like(levels), where=levels > 0.0)
    return weights[:, blocks.of_token]


def _conditioned_weights(t: NDArray[np.float64], size: NDArray[np.int64]) -> NDArray[np.float64]:
    """[c] weights (1 - (1-t)^B) / t of blocks that were drawn with at least one masked token.

    The numerator is the probability of the condition: the empty mask adds nothing to the ELBO, so leaving it
    out and weighing the others by their share keeps it exact. B = 1 gives 1, hence the exact sequential NLL.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = -np.expm1(size * np.log1p(-t)) / t
    return np.where(t > 0.0, weights, size)


def _realised_weights(spec: NoiseSpec, views: NDArray[np.bool_], blocks: _Blocks) -> NDArray[np.float64]:
    """[k, m] weights maskable/masked, counted over the block, or over the piece if t is shared more widely.

    A constant NLL c gives exactly c in every unit with a masked token: none of the variance that comes from
    the number m of masked tokens. The price is a bias. For t over [0, 1] and a block of B the ELBO is the mean
    over m uniform on 1..B (see `_count_mask`). Here, with at_least_one, m leans to small counts, whose tokens
    see more context: too low an estimate. Without it, m = 0 adds nothing: B/(B+1) of the ELBO. In a
    complementary pair a view with nothing masked leaves its share to the other.
    """
    span_of = blocks.of_token if spec.t_unit == "block" else np.zeros_like(blocks.of_token)
    total = np.bincount(span_of)
    masked = np.stack([np.bincount(span_of, view, len(total)) for view in views])
    share = len(views) / (masked > 0).sum(axis=0).clip(min=1)
    weights: NDArray[np.float64] = share * total / masked.clip(min=1)
    return weights[:, span_of]
