"""The variance of the preference loss: from gradients made up by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.preference_variance import Case, Draw, spread


def test_spread_by_hand() -> None:
    gradients, margins = ([3.0, 4.0], [1.0, 4.0], [2.0, 1.0]), ([1.0, 0.0], [3.0, 0.0], [5.0, 3.0])
    draws = [
        Draw(torch.tensor(gradient), torch.tensor(margin, dtype=torch.float64), loss)
        for gradient, margin, loss in zip(gradients, margins, (0.5, 0.7, 0.9), strict=True)
    ]
    # The mean gradient is (2, 3), and the squared deviations from it are 2, 2 and 4. Variances 4 and 3 of the margins.
    expected = {
        "gradient_deviation": 2.0,
        "median_deviation": 2.0**0.5,
        "largest_share": 0.5,
        "gradient_length": (13 - 4 / 3) ** 0.5,
        "margin_deviation": 3.5**0.5,
        "loss": 0.7,
    }
    assert spread(draws) == pytest.approx(expected, rel=1e-6)
    assert spread([*draws, *draws])["gradient_length"] < spread(draws * 10)["gradient_length"] < 13**0.5


def test_views_of_their_own_cost_the_reference_as_many() -> None:
    shared, apart = Case(4, shares=True).stage, Case(4, shares=False).stage
    assert (shared.num_views, apart.num_views) == (4, 8)
    for stage in (shared, apart):
        stage.validate("one", 64)
