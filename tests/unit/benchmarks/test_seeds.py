"""How numbers of several seeds are written, worked out by hand."""

from __future__ import annotations

from benchmarks.seeds import spread


def test_mean_and_deviation_by_hand() -> None:
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert spread([2.0, 3.0], 4) == "2.5000 ± 0.7071"
    assert spread([0.5], 3) == "0.500"
    assert spread([], 3) == ""
