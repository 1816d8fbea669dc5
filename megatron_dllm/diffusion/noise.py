"""Which tokens of a segment are masked, at which noise level, and with which loss weight.

`t` is the probability that a token is masked (linear schedule, alpha_t = 1 - t), and the loss weight
1/t makes the weighted sum of masked NLLs an unbiased estimate of the negative ELBO (LLaDA2.0 Eq. 1, 2).

The noise is a pure function of its arguments (see `diffusion.draws`). The K views of a segment share one clean copy;
`view_relation` says how their levels and masks are related:

    independent     every view draws its own levels and masks
    stratified      the range of t has K parts, and each view gets one, in random order; masks are independent
    complementary   views 1 and 2, 3 and 4, ... mask opposite tokens; the pairs are independent

Two more score given tokens without a random number: enumerated and left_to_right (`diffusion.exact_views`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config import NoiseConfig, StageConfig
from megatron_dllm.config.data import T_UNITS
from megatron_dllm.config.schedule import LOSS_WEIGHTS, VIEW_RELATIONS
from megatron_dllm.config.sft import LOSS_PER
from megatron_dllm.diffusion.draws import Draws, Purpose
from megatron_dllm.diffusion.exact_views import EXACT_RELATIONS, exact_views

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_BELOW_ONE = float(np.nextafter(1.0, 0.0))
# A level is rounded to so many bits where it decides counts in integers: exact up to blocks of 2^20 in 2^10 views.
_LEVEL_BITS = 32


@dataclass(frozen=True)
class NoiseSpec:
    """How the noise of one stage is drawn.

    Attributes:
        t_unit: what shares one t: "block", "document" (the segment), or "row" (all segments of a packed row).
        is_stratified: lay t out evenly over the blocks of a segment and over consecutive ordinals, instead of
            independently. Every single t stays uniform on [t_min, t_max). No effect with t_unit "row", whose
            key says nothing about a row's neighbours.
        at_least_one: every block with a maskable token has a masked one in every view (no effect on complementary
            pairs, which mask every token once anyway).
        loss_weight: "elbo": 1/t, corrected for at_least_one. "uniform": 1, no bound on the likelihood.
            "realised": see `_realised_weights`.
        t_min: smallest noise level.
        t_max: largest noise level; the ELBO is the mean over [t_min, t_max).
        num_views: noisy views of every segment, K.
        view_relation: of K > 1 views, see the module; an even K is needed for "complementary".
        is_count: draw the number of masked tokens of a block uniformly, not t. See `_count_mask`.
        fill_weight: what the weight of end-of-text tokens that fill a block is multiplied by.
        loss_per: "token", or "answer": the weights of an answer's tokens are divided by their number.
        share_levels: segments 2i and 2i + 1, by sample id and by ordinal, draw their levels alike (t_unit "block" and
            "document"); masks stay their own.
    """

    t_unit: str
    is_stratified: bool
    at_least_one: bool
    loss_weight: str
    t_min: float
    t_max: float
    num_views: int
    view_relation: str = "stratified"
    is_count: bool = False
    fill_weight: float = 1.0
    loss_per: str = "token"
    share_levels: bool = False

    def __post_init__(self) -> None:
        """Assert what the configuration has refused: a specification that no mask could follow."""
        assert self.t_unit in T_UNITS, f"t_unit ({self.t_unit}) is not known"
        assert self.loss_weight in LOSS_WEIGHTS, f"loss_weight ({self.loss_weight}) is not known"
        assert 0.0 <= self.t_min <= self.t_max <= 1.0, (
            f"t_min, t_max ({self.t_min}, {self.t_max}) must satisfy 0 <= t_min <= t_max <= 1"
        )
        assert self.view_relation in (*VIEW_RELATIONS, *EXACT_RELATIONS), (
            f"view_relation ({self.view_relation}) is not known"
        )
        assert self.num_views >= 1, f"num_views ({self.num_views}) must be positive"
        assert not (self.is_complementary and self.num_views % 2), (
            f"num_views ({self.num_views}) must be even for complementary views"
        )
        assert self.loss_per in LOSS_PER, f"loss_per ({self.loss_per}) is not known"
        assert not self.is_count or self.loss_weight == "elbo", (
            f"loss_weight ({self.loss_weight}) must be elbo with is_count, which measures the ELBO"
        )

    @property
    def is_complementary(self) -> bool:
        """Whether the views come in pairs with opposite masks."""
        return self.view_relation == "complementary"

    @property
    def scales_tokens(self) -> bool:
        """Whether weights depend on more than a token's noise."""
        return self.fill_weight != 1.0 or self.loss_per != "token"

    @classmethod
    def for_stage(cls, noise: NoiseConfig, stage: StageConfig) -> NoiseSpec:
        """The noise of a training stage.

        Args:
            noise: settings that hold for the whole run.
            stage: a block-diffusion stage: its weights, range of t and views.

        Returns:
            The specification for `sample_noise`.
        """
        is_count = stage.preference is not None and stage.preference.is_count
        return cls(
            t_unit=noise.t_unit,
            is_stratified=noise.is_stratified,
            at_least_one=stage.at_least_one,
            loss_weight=stage.loss_weight,
            t_min=0.0 if is_count else stage.t_min,
            t_max=1.0 if is_count else stage.t_max,
            num_views=stage.num_views,
            view_relation=stage.view_relation,
            is_count=is_count,
            share_levels=stage.preference is not None and stage.preference.share_levels,
            fill_weight=1.0 if stage.sft is None else stage.sft.fill_weight,
            loss_per="token" if stage.sft is None else stage.sft.loss_per,
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
class SegmentNoise:
    """The noise of one segment of n tokens in k noisy views.

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
    """The m maskable tokens of a segment, grouped into the c blocks that have any.

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
        assert not len(steps) or steps.min() >= 0, "block_ids must not decrease along a segment"
        start = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(steps) + 1])
        size = np.diff(start, append=len(block_ids))
        of_token = np.repeat(np.arange(len(start)), size)
        return cls(of_token, np.arange(len(block_ids)) - start[of_token], start, size)


@dataclass(frozen=True)
class _Key:
    """What identifies a segment to the generator, see `sample_noise`; its levels are drawn by `level_id`."""

    sample_id: int
    level_id: int
    ordinal: int
    row_key: int

    @classmethod
    def of(cls, spec: NoiseSpec, sample_id: int, ordinal: int, row_key: int) -> _Key:
        """The key of a segment, whose levels may be those of the one that it forms a pair with."""
        shared = 2 if spec.share_levels else 1
        return cls(sample_id, sample_id // shared * shared, ordinal // shared * shared, row_key)


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
) -> SegmentNoise:
    """Draw the masks, weights and noise levels of one segment.

    Args:
        spec: how to draw them.
        seed: seed of the run.
        epoch: pass over the corpus.
        sample_id: identity of the segment; two segments of a corpus never share it.
        ordinal: place of the segment in the shuffled order, which spreads t evenly over neighbours.
        row_key: identity of the packed row; used only with t_unit "row".
        block_ids: [n] int, non-decreasing; may start anywhere, and the first and last block may be partial.
        loss_mask: [n] bool, tokens that may be masked. The others never are and weigh 0.

    Returns:
        The noise of the segment. With loss_weight "elbo", `sum(loss_weights * nll)` over all views divided by
        `k * sum(loss_mask)` is an unbiased estimate of the negative ELBO per token, t uniform on [t_min, t_max).
    """
    assert block_ids.shape == loss_mask.shape and block_ids.ndim == 1, "block_ids and loss_mask are [n]"
    shape = (spec.num_views, len(block_ids))
    noise = SegmentNoise(np.zeros(shape, np.bool_), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    maskable = np.flatnonzero(loss_mask)
    if not len(maskable):
        return noise
    blocks = _Blocks.group(block_ids[maskable])
    key = _Key.of(spec, int(sample_id), int(ordinal), int(row_key))
    if spec.view_relation in EXACT_RELATIONS:
        views, weights, levels = exact_views(spec.view_relation, blocks.size, spec.num_views)
    else:
        views, levels = _all_views(spec, Draws(int(seed), int(epoch)), key, blocks)
        weights = _weights(spec, views, levels, blocks)
    noise.is_masked[:, maskable] = views
    noise.loss_weights[:, maskable] = np.where(views, weights, 0.0)
    noise.t[:, maskable] = levels[:, blocks.of_token]
    return noise


def _all_views(spec: NoiseSpec, draws: Draws, key: _Key, blocks: _Blocks) -> tuple[BoolArray, FloatArray]:
    """Which tokens are masked [k, m], and the noise levels [k, c], in every view."""
    num_drawn = spec.num_views // 2 if spec.is_complementary else spec.num_views
    of_view = [replace(draws, view=view) for view in range(num_drawn)]
    if spec.view_relation == "stratified" and spec.num_views > 1:
        levels = _stratified_levels(spec, draws, key, blocks)
    else:
        levels = [_levels(spec, _unit_levels(spec, view, key, len(blocks.size)), blocks) for view in of_view]
    masks = [_mask(spec, view, key, t, blocks) for view, t in zip(of_view, levels, strict=True)]
    if spec.is_complementary:
        masks = [mask for drawn in masks for mask in (drawn, ~drawn)]
        levels = [t for drawn in levels for t in (drawn, 1.0 - drawn)]
    return np.stack(masks), np.stack(levels)


def _unit_levels(spec: NoiseSpec, draws: Draws, key: _Key, num_blocks: int) -> FloatArray:
    """[c] float64, each uniform on [0, 1): where every block's t lies in its range."""
    if spec.t_unit == "row":
        return np.repeat(draws.uniform(Purpose.LEVEL, key.row_key, 1), num_blocks)
    if not spec.is_stratified:
        count = num_blocks if spec.t_unit == "block" else 1
        return np.broadcast_to(draws.uniform(Purpose.LEVEL, key.level_id, count), num_blocks)
    # If a second independent view were spread over ordinals as well, it would keep a constant distance to the first.
    base = float(draws.uniform(Purpose.LEVEL, key.level_id, 1)[0]) if draws.view else draws.even_level(key.ordinal)
    if spec.t_unit == "document":
        return np.full(num_blocks, base)
    # Stable: the order of equal keys must not depend on the machine.
    stratum = np.argsort(draws.raw(Purpose.STRATUM, key.level_id, num_blocks), kind="stable")
    return np.minimum((stratum + base) / num_blocks, _BELOW_ONE)


def _levels(spec: NoiseSpec, u: FloatArray, blocks: _Blocks) -> FloatArray:
    """Noise levels of the blocks of a view.

    Args:
        spec: how to draw them.
        u: [c] float64 in [0, 1), where each level lies in its range.
        blocks: of the segment.

    Returns:
        [c] float64: t, or with is_count the share of a block's tokens that will be masked.
    """
    if not spec.is_count:
        return spec.t_min + (spec.t_max - spec.t_min) * u
    if spec.is_complementary:  # 0..B: the complement of B tokens is none, and has its share in the ELBO
        return np.minimum((u * (blocks.size + 1)).astype(np.int64), blocks.size) / blocks.size
    return np.minimum(1 + (u * blocks.size).astype(np.int64), blocks.size) / blocks.size


def _stratified_levels(spec: NoiseSpec, draws: Draws, key: _Key, blocks: _Blocks) -> list[FloatArray]:
    """[c] noise levels of each of K views: u_k = (pi(k) + u) / K, with u and the permutation pi drawn by unit of t.

    Each u_k is uniform on [0, 1), and the K of them lie one in each K-th part. Counts are computed in integers, so
    that K views of a block of K tokens mask 1, 2, ... K of them, whatever is rounded.
    """
    num_views, num_blocks = spec.num_views, len(blocks.size)
    u = _unit_levels(spec, draws, key, num_blocks)
    num_units = num_blocks if spec.t_unit == "block" else 1
    identity = key.row_key if spec.t_unit == "row" else key.level_id
    raw = draws.raw(Purpose.VIEW_ORDER, identity, num_units * num_views).reshape(num_units, num_views)
    orders = np.broadcast_to(np.argsort(raw, axis=1, kind="stable"), (num_blocks, num_views)).T
    if not spec.is_count:
        return [_levels(spec, np.minimum((order + u) / num_views, _BELOW_ONE), blocks) for order in orders]
    bits = (u * 2**_LEVEL_BITS).astype(np.int64)
    counts = [1 + ((order << _LEVEL_BITS) + bits) * blocks.size // (num_views << _LEVEL_BITS) for order in orders]
    return [count / blocks.size for count in counts]


def _mask(spec: NoiseSpec, draws: Draws, key: _Key, levels: FloatArray, blocks: _Blocks) -> BoolArray:
    """Masked tokens of one view.

    Args:
        spec: how to draw them.
        draws: of the view.
        key: of the segment.
        levels: [c] float64 noise levels.
        blocks: of the segment.

    Returns:
        [m] bool.
    """
    uniforms = draws.uniform(Purpose.TOKEN, key.sample_id, len(blocks.of_token))
    if spec.is_count:
        return _count_mask(np.rint(levels * blocks.size).astype(np.int64), uniforms, blocks)
    masked: BoolArray = uniforms < levels[blocks.of_token]
    if not spec.at_least_one or spec.is_complementary:
        return masked
    u = draws.uniform(Purpose.FIRST_MASKED, key.sample_id, len(levels))
    first = _first_masked(levels, u, blocks.size)[blocks.of_token]
    masked = (blocks.rank == first) | ((blocks.rank > first) & masked)
    return masked


def _count_mask(count: IntArray, uniforms: FloatArray, blocks: _Blocks) -> BoolArray:
    """Mask `count` tokens of every block, the subset uniform among those of that size.

    For t uniform on [0, 1] the ELBO gives a mask of m tokens the weight of the integral of
    (1/t) t^m (1-t)^(B-m), which is 1 / (m C(B, m)): m uniform on 1..B, any subset, weight B/m. So t := m/B
    with weight 1/t is that ELBO exactly, without the noise of a binomial count. A complementary pair draws m
    uniformly on 0..B and weighs its masks (B+1)/m and (B+1)/(B-m).

    Args:
        count: [c] int64 tokens to mask in each block.
        uniforms: [m] float64, a random number a token.
        blocks: of the segment.

    Returns:
        [m] bool.
    """
    # Blocks stay in order and tokens are shuffled inside theirs, so a sorted position has its block's ranks.
    shuffled = np.lexsort((uniforms, blocks.of_token))
    masked = np.empty(len(uniforms), np.bool_)
    masked[shuffled] = blocks.rank < count[blocks.of_token]
    return masked


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
    if spec.at_least_one and not spec.is_complementary and not spec.is_count:
        return _conditioned_weights(levels, blocks.size)[:, blocks.of_token]
    # Where t is 0 nothing is masked and the weight is not used.
    weights = np.divide(1.0, levels, out=np.zeros_like(levels), where=levels > 0.0)
    if spec.is_count and spec.is_complementary:
        weights = weights * (blocks.size + 1) / blocks.size
    return weights[:, blocks.of_token]


def _conditioned_weights(t: NDArray[np.float64], size: NDArray[np.int64]) -> NDArray[np.float64]:
    """[k, c] weights (1 - (1-t)^B) / t of blocks that were drawn with at least one masked token.

    The numerator is the probability of the condition: the empty mask adds nothing to the ELBO, so leaving it
    out and weighing the others by their share keeps it exact. B = 1 gives 1, hence the exact sequential NLL.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = -np.expm1(size * np.log1p(-t)) / t
    return np.where(t > 0.0, weights, size)


def _realised_weights(spec: NoiseSpec, views: NDArray[np.bool_], blocks: _Blocks) -> NDArray[np.float64]:
    """[k, m] weights maskable/masked, counted over the block, or over the segment if t is shared more widely.

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
