"""K views of one segment: each is the noise of a single view; together they estimate the ELBO with less variance."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from megatron_dllm.diffusion.noise import SegmentNoise, sample_noise
from megatron_dllm.diffusion.noise_masks import count_mask
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks
from tests.unit.diffusion.test_noise import (
    COUNT,
    PAIR,
    SINGLE,
    all_masks,
    assert_mean,
    block_losses,
    blocks_of,
    draw,
    expected_block_elbo,
    nll_table,
)

RELATIONS = ["independent", "stratified", "complementary"]


def view_of(noise: SegmentNoise, view: int) -> SegmentNoise:
    return SegmentNoise(*(getattr(noise, name)[view : view + 1] for name in ("is_masked", "loss_weights", "t")))


def assert_equal(one: SegmentNoise, other: SegmentNoise) -> None:
    for name in ("is_masked", "loss_weights", "t"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# --- what a view is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SINGLE, COUNT, replace(SINGLE, t_unit="document"), replace(SINGLE, t_unit="row")])
def test_one_view_is_the_same_under_every_relation(spec: NoiseSpec) -> None:
    ids = blocks_of(4, 16)
    assert_equal(draw(replace(spec, view_relation="independent"), ids), draw(spec, ids))


@pytest.mark.parametrize("spec", [SINGLE, COUNT])
def test_the_first_of_independent_views_is_the_single_view(spec: NoiseSpec) -> None:
    ids = blocks_of(4, 16)
    noise = draw(replace(spec, num_views=3, view_relation="independent"), ids)
    assert_equal(view_of(noise, 0), draw(spec, ids))


def test_the_first_pair_of_several_is_the_pair() -> None:
    ids = blocks_of(4, 16)
    noise, pair = draw(replace(PAIR, num_views=6), ids), draw(PAIR, ids)
    for view in (0, 1):
        assert_equal(view_of(noise, view), view_of(pair, view))
    for view in (0, 2, 4):
        assert (noise.is_masked[view] ^ noise.is_masked[view + 1]).all()
    assert len({noise.is_masked[view].tobytes() for view in range(6)}) == 6


@pytest.mark.parametrize("relation", ["independent", "stratified"])
def test_masks_of_two_views_are_independent_given_their_levels(relation: str) -> None:
    spec = replace(SINGLE, num_views=4, view_relation=relation, at_least_one=False, t_min=0.5, t_max=0.5)
    masks = draw(spec, blocks_of(4, 25_000)).is_masked
    correlation = np.corrcoef(masks)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 5 / masks.shape[1] ** 0.5


def test_levels_of_independent_views_are_independent() -> None:
    spec = replace(SINGLE, num_views=2, view_relation="independent", t_unit="document")
    levels = np.array([draw(spec, [0], sample_id=i, ordinal=i).t[:, 0] for i in range(3000)], dtype=np.float64)
    # A pair of uniform numbers fills the square evenly: neither equal, nor at a constant distance.
    cells = np.histogram2d(*levels.T, bins=4, range=[[0, 1], [0, 1]])[0]
    assert np.abs(cells - 3000 / 16).max() < 5 * (3000 / 16) ** 0.5


@pytest.mark.parametrize("num_views", [2, 3, 8])
@pytest.mark.parametrize("unit", ["block", "document", "row"])
def test_stratified_levels_lie_one_in_each_part(num_views: int, unit: str) -> None:
    spec = replace(SINGLE, num_views=num_views, t_unit=unit, t_min=0.2, t_max=0.7)
    first_part = []
    for sample_id in range(100):
        noise = draw(spec, blocks_of(2, 6), sample_id=sample_id, ordinal=sample_id, row_key=sample_id)
        parts = np.floor((noise.t.astype(np.float64) - 0.2) / 0.5 * num_views + 1e-5).astype(int)
        assert (np.sort(parts, axis=0) == np.arange(num_views)[:, None]).all()
        np.testing.assert_allclose(np.diff(np.sort(noise.t, axis=0), axis=0), 0.5 / num_views, atol=1e-6)
        first_part.append(parts[0, 0])
    # Which view has which part is drawn.
    assert (np.bincount(first_part, minlength=num_views) > 100 / num_views / 4).all()


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("unit", ["block", "document", "row"])
def test_levels_of_every_view_are_uniform(relation: str, unit: str) -> None:
    spec = replace(SINGLE, num_views=4, view_relation=relation, t_unit=unit, t_min=0.25, t_max=0.75)
    keys = [dict(sample_id=i, ordinal=i, row_key=i) for i in range(1000)]
    levels = np.array([draw(spec, blocks_of(1, 2), **key).t[:, 0] for key in keys])
    for view in range(4):
        np.testing.assert_allclose(np.histogram(levels[:, view], 5, (0.25, 0.75))[0] / 1000, 0.2, atol=0.05)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 32, 49])
def test_as_many_stratified_counts_as_tokens_are_every_count_once(size: int) -> None:
    spec = replace(COUNT, num_views=size)
    for sample_id in range(20):
        noise = draw(spec, blocks_of(size, 16), sample_id=sample_id, ordinal=sample_id)
        counts = np.sort(noise.is_masked.reshape(size, 16, size).sum(axis=2), axis=0)
        assert (counts == 1 + np.arange(size)[:, None]).all()


# --- the estimator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("is_count", [False, True])
@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_mean_over_views_is_the_elbo(relation: str, is_count: bool, at_least_one: bool, size: int) -> None:
    low, high = (0.0, 1.0) if is_count else (0.01, 0.99)
    spec = replace(SINGLE, num_views=4, view_relation=relation, is_count=is_count, at_least_one=at_least_one)
    table = nll_table(size)
    noise = draw(replace(spec, t_min=low, t_max=high), blocks_of(size, 60_000))
    assert_mean(block_losses(noise, size, table) / 4, expected_block_elbo(table, low, high))


def chain_rule_elbo(table: np.ndarray) -> float:
    """Mean over all orders of the NLL that predicts one token at a time, the others of the order still masked."""
    size, total = table.shape[1], 0.0
    orders = list(itertools.permutations(range(size)))
    for order in orders:
        for place, token in enumerate(order):
            mask = sum(1 << later for later in order[place:])
            total += table[mask, token]
    return total / len(orders)


def mean_by_subset(table: np.ndarray) -> list[float]:
    """Mean over subsets of m masked tokens of their summed NLL, for m = 0..B."""
    sums = (table * all_masks(table.shape[1])).sum(axis=1)
    num_masked = all_masks(table.shape[1]).sum(axis=1)
    return [float(sums[num_masked == m].mean()) for m in range(table.shape[1] + 1)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_four_forms_of_the_elbo_are_equal(size: int) -> None:
    table = nll_table(size)
    sums = (table * all_masks(size)).sum(axis=1)
    by_count = mean_by_subset(table)
    integral = expected_block_elbo(table, 0.0, 1.0)
    counts = sum(size / m * by_count[m] for m in range(1, size + 1)) / size
    pairs = 0.0
    for m in range(size + 1):
        subsets = [mask for mask in range(2**size) if mask.bit_count() == m]
        for mask in subsets:
            complement = 2**size - 1 - mask
            pair = ((size + 1) / m * sums[mask] if m else 0.0) + (
                (size + 1) / (size - m) * sums[complement] if m < size else 0.0
            )
            pairs += pair / 2 / comb(size, m) / (size + 1)
    assert counts == pytest.approx(integral, rel=1e-12)
    assert pairs == pytest.approx(integral, rel=1e-12)
    assert chain_rule_elbo(table) == pytest.approx(integral, rel=1e-12)


def every_count_mask(size: int, count: int) -> np.ndarray:
    """[size!, size] the masks of `count` tokens that the code draws, one for every order of its random numbers."""
    orders = np.array(list(itertools.permutations(range(size))), dtype=float)
    blocks = SegmentBlocks.group(np.repeat(np.arange(len(orders)), size))
    return count_mask(np.full(len(orders), count), orders.flatten(), blocks).reshape(-1, size)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_subset_of_a_count_comes_equally_often(size: int) -> None:
    """By enumeration of all orders of the random numbers: so a score of one view is unbiased for each count."""
    for count in range(size + 1):
        masks = every_count_mask(size, count)
        found = np.bincount(masks @ (1 << np.arange(size)), minlength=2**size)
        expected = np.where(all_masks(size).sum(axis=1) == count, len(masks) // comb(size, count), 0)
        assert found.tolist() == expected.tolist()


def test_stratified_counts_vary_no_more_than_independent_ones_by_enumeration() -> None:
    """Exact variances of the mean over K = B views of one block, from all counts and subsets."""
    size, table = 4, nll_table(4)
    scores = {
        m: np.array(
            [size / m * (table[mask @ (1 << np.arange(size))] * mask).sum() for mask in every_count_mask(size, m)]
        )
        for m in range(1, size + 1)
    }
    mean = np.mean([values.mean() for values in scores.values()])
    within = np.mean([values.var() for values in scores.values()])
    between = np.mean([(values.mean() - mean) ** 2 for values in scores.values()])
    expected_stratified, expected_independent = within / size, (within + between) / size
    assert mean == pytest.approx(expected_block_elbo(table, 0.0, 1.0), rel=1e-12)
    assert expected_stratified < 0.9 * expected_independent
    for relation, expected in (("stratified", expected_stratified), ("independent", expected_independent)):
        # Blocks in documents of their own: the levels of one document's blocks are even among each other.
        spec = replace(COUNT, num_views=size, view_relation=relation, is_stratified=False)
        losses = block_losses(draw(spec, blocks_of(size, 100_000)), size, table) / size
        assert losses.mean() == pytest.approx(mean, abs=5 * (expected / 1e5) ** 0.5)
        assert losses.var() == pytest.approx(expected, rel=0.03)


def test_shared_noise_makes_the_difference_of_two_models_vary_less() -> None:
    policy, reference = nll_table(4), nll_table(4) + 0.1 * np.random.default_rng(9).uniform(-1, 1, (16, 4))
    noise = draw(COUNT, blocks_of(4, 20_000))
    other = draw(COUNT, blocks_of(4, 20_000), seed=8)
    shared = block_losses(noise, 4, policy) - block_losses(noise, 4, reference)
    apart = block_losses(noise, 4, policy) - block_losses(other, 4, reference)
    assert shared.var() < 0.1 * apart.var()


def test_a_mask_does_not_depend_on_how_many_views_there_are() -> None:
    """Independent views keep their masks when another is added; a score of K views then holds that of fewer."""
    spec = replace(SINGLE, num_views=5, view_relation="independent")
    more, fewer = draw(spec, blocks_of(4, 8)), draw(replace(spec, num_views=2), blocks_of(4, 8))
    for view in (0, 1):
        assert_equal(view_of(more, view), view_of(fewer, view))


@pytest.mark.parametrize("relation", RELATIONS)
def test_tokens_outside_the_loss_mask_are_left_alone_in_every_view(relation: str) -> None:
    loss_mask = np.arange(64) % 3 != 0
    key = {"seed": 7, "epoch": 0, "sample_id": 11, "ordinal": 3, "row_key": 5}
    spec = replace(SINGLE, num_views=4, view_relation=relation)
    noise = sample_noise(spec, block_ids=blocks_of(8, 8), loss_mask=loss_mask, **key)
    assert noise.is_masked.shape == (4, 64) and not noise.is_masked[:, ~loss_mask].any()
    np.testing.assert_array_equal(noise.loss_weights > 0, noise.is_masked)


def enumerated_scores(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every mask of a block but the empty one: its probability under counts, and the score (less its sign) it gives."""
    masks = all_masks(table.shape[1])[1:]
    count, size = masks.sum(axis=1), table.shape[1]
    probability = np.array([1 / (size * comb(size, int(m))) for m in count])
    return probability, size / count * (table[1:] * masks).sum(axis=1)


def test_shared_noise_varies_strictly_less_by_enumeration_and_not_at_all_for_equal_models() -> None:
    reference = nll_table(4)
    policy = reference + 0.1 * np.random.default_rng(9).uniform(-1, 1, reference.shape)
    p, of_reference = enumerated_scores(reference)
    _, of_policy = enumerated_scores(policy)

    def variance(values: np.ndarray) -> float:
        return float((p * values**2).sum() - (p * values).sum() ** 2)

    assert p.sum() == pytest.approx(1.0, rel=1e-12)
    shared, apart = variance(of_policy - of_reference), variance(of_policy) + variance(of_reference)
    assert 0.0 < shared < 0.1 * apart
    assert variance(of_reference - of_reference) == 0.0


@pytest.mark.parametrize("is_constant", [False, True])
def test_one_mask_for_each_level_varies_least_by_enumeration(is_constant: bool) -> None:
    """Budget 2: two levels with a mask each against one level with two masks; alike only if the level says nothing."""
    size, table = 4, nll_table(4)
    p, scores = enumerated_scores(table)
    level = all_masks(size)[1:].sum(axis=1)
    means = np.array([(p * scores)[level == m].sum() / p[level == m].sum() for m in range(1, size + 1)])
    if is_constant:
        scores, means = scores - means[level - 1], np.zeros(size)
    mean = (p * scores).sum()
    between = float(((means - mean) ** 2).mean())
    within = float((p * (scores - means[level - 1]) ** 2).sum())
    two_levels, two_masks = (between + within) / 2, between + within / 2
    # Enumerated in full: two independent masks, of levels of their own or of a common one.
    pairs = [(i, j) for i in range(len(p)) for j in range(len(p))]
    apart = sum(p[i] * p[j] * ((scores[i] + scores[j]) / 2 - mean) ** 2 for i, j in pairs)
    common = sum(
        p[i] * p[j] * size * ((scores[i] + scores[j]) / 2 - mean) ** 2 for i, j in pairs if level[i] == level[j]
    )
    assert apart == pytest.approx(two_levels, rel=1e-12) and common == pytest.approx(two_masks, rel=1e-12)
    assert two_levels == pytest.approx(two_masks, rel=1e-12) if is_constant else two_levels < 0.99 * two_masks


@pytest.mark.parametrize("unit", ["block", "document"])
@pytest.mark.parametrize("is_stratified", [True, False])
@pytest.mark.parametrize("relation", RELATIONS)
def test_the_sides_of_a_pair_may_share_their_levels(unit: str, is_stratified: bool, relation: str) -> None:
    spec = replace(SINGLE, num_views=4, view_relation=relation, t_unit=unit, is_stratified=is_stratified)

    def sides(share_levels: bool, first: int) -> list[SegmentNoise]:
        own = replace(spec, share_levels=share_levels)
        keys = [dict(sample_id=first + side, ordinal=2 * first + side) for side in (0, 1)]
        rest = dict(seed=7, epoch=0, row_key=5, block_ids=blocks_of(8, 4), loss_mask=np.ones(32, bool))
        return [sample_noise(own, **key, **rest) for key in keys]

    chosen, rejected = sides(True, 40)
    np.testing.assert_array_equal(chosen.t, rejected.t)
    assert (chosen.is_masked != rejected.is_masked).any(), "masks stay their own"
    other, _ = sides(True, 42)
    assert (chosen.t != other.t).any()
    apart, by_itself = sides(False, 40)
    assert (apart.t != by_itself.t).any()
    for name in ("is_masked", "loss_weights", "t"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(apart, name))
