"""A bell of levels leaves the mean of the loss where it is; a rising t_max follows the stage's progress."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_dllm.diffusion.level_density import density_weights, drawn_levels
from tests.unit.diffusion.test_noise import (
    COUNT,
    PAIR,
    SINGLE,
    assert_mean,
    block_losses,
    blocks_of,
    draw,
    expected_block_elbo,
    nll_table,
)

BELL = replace(SINGLE, t_density="bell")


@pytest.mark.parametrize(("center", "width"), [(0.5, 0.15), (0.3, 0.1), (0.9, 0.4)])
@pytest.mark.parametrize("t_range", [(0.0, 1.0), (0.2, 0.95)])
def test_levels_follow_the_logistic_density(center: float, width: float, t_range: tuple[float, float]) -> None:
    spec = replace(BELL, t_bell_center=center, t_bell_width=width, t_min=t_range[0], t_max=t_range[1])
    t = drawn_levels(spec, (np.arange(200_000) + 0.5) / 200_000)
    edges = np.linspace(*t_range, 31)
    share, _ = np.histogram(t, edges)
    expected = np.diff(np.tanh((edges - center) / (2 * width)))  # the logistic distribution is a hyperbolic tangent
    np.testing.assert_allclose(share / len(t), expected / expected.sum(), atol=2e-5)


def test_a_function_of_the_level_keeps_its_mean() -> None:
    t = drawn_levels(BELL, (np.arange(100_000) + 0.5) / 100_000)
    for power in range(4):
        assert (density_weights(BELL, t) * t**power).mean() == pytest.approx(1.0 / (power + 1), rel=1e-6)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("changes", [{}, {"num_views": 4}, {"t_unit": "block", "is_stratified": False}])
def test_the_loss_is_still_the_elbo(size: int, changes: dict) -> None:
    table = nll_table(size)
    losses = block_losses(draw(replace(BELL, **changes), blocks_of(size, 100_000)), size, table)
    assert_mean(losses / changes.get("num_views", 1), expected_block_elbo(table, 0.0, 1.0))


def test_so_it_is_for_complements_of_a_lopsided_bell() -> None:
    size, table = 3, nll_table(3)
    spec = replace(PAIR, t_density="bell", t_bell_center=0.3, t_bell_width=0.2, t_min=0.001, t_max=0.999)
    losses = block_losses(draw(spec, blocks_of(size, 100_000)), size, table)
    assert_mean(losses, 2 * expected_block_elbo(table, 0.001, 0.999))


def test_uniform_weights_are_left_alone() -> None:
    weights = draw(replace(BELL, loss_weight="uniform"), blocks_of(4, 100)).loss_weights
    assert set(np.unique(weights)) == {0.0, 1.0}


def test_the_largest_level_rises_along_a_line_and_stays() -> None:
    spec = replace(SINGLE, t_max=0.9, t_max_start=0.3, t_max_ramp_share=0.5)
    assert [spec.at(progress).t_max for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.3, 0.6, 0.9, 0.9])
    assert SINGLE.at(0.0) is SINGLE
    ids = blocks_of(4, 2000)
    early = draw(spec.at(0.0), ids)
    assert 0.29 < early.t.max() <= 0.3 and draw(spec.at(1.0), ids).t.max() > 0.89


def test_records_name_newer_fields_only_where_they_are_used() -> None:
    assert not {"t_density", "order_bias", "t_max_start"} & COUNT.stated().keys()
    assert BELL.stated()["t_density"] == "bell" and "t_bell_center" not in BELL.stated()
    assert "num_views" in COUNT.stated() and "share_levels" in COUNT.stated()
