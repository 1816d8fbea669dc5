"""Layouts that differ most train what one rank trains; what is wrong on purpose is noticed. All: `make parity`."""

from __future__ import annotations

import pytest

from benchmarks.parity import ALL_LAYOUTS, measure, violations
from benchmarks.parity_layouts import RANDOM_PAIRS, SKIPPING, STAGES
from benchmarks.parity_run import Trained, prepare
from benchmarks.ranks import run_ranks

Start = tuple[str, dict[str, Trained]]
ONE_CORPUS = [name for name, stage in STAGES.items() if stage.train is None and name != RANDOM_PAIRS]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Folder with the common checkpoint, and what one rank makes of it."""
    folder = str(tmp_path_factory.mktemp("parity"))
    variants = {f"fp32_{model}" for model in ("experts", SKIPPING, "dense")}
    (expected,) = run_ranks(prepare, 1, folder, variants, timeout_s=300.0)
    return folder, expected


# What splits a document, a layer or the layers meets every stage; the others those that differ most to them.
DEALT = {
    "accumulation 4": ["complementary", "guided"],
    "recompute full": ["complementary", "mdlm", "annealed"],
    "DP2 overlap": ["ar", "complementary", "guided"],
    "TP2 x EP2": ONE_CORPUS,
    "PP2 virtual 2": ONE_CORPUS,
    "CP2": ONE_CORPUS,
    "CP2 ulysses": ["complementary", "shift", "mdlm", "annealed"],
    "EP2 alltoall": ["ar", "complementary", "guided"],
    "PP2 virtual 2 dense": ["ar", "complementary", "annealed"],
    "CP2, skipping": ["complementary", "shift", "mdlm", "guided"],
    "TP2 x EP2, skipping": ["ar", "complementary", "annealed"],
}


@pytest.mark.parametrize("name", DEALT)
def test_layouts_train_what_one_rank_trains(name: str, start: Start) -> None:
    assert violations(measure(ALL_LAYOUTS[name], *start, DEALT[name]), "fp32") == []


@pytest.mark.parametrize("name", ["TP2", "PP2", "CP2"])
def test_a_blend_of_two_corpora_trains_as_on_one_rank(name: str, start: Start) -> None:
    one, two = (start[1][f"{stage}_fp32_experts"] for stage in ("single_view", "blend"))
    assert not set(one.fingerprints) & set(two.fingerprints), "the second corpus has no part in a step"
    assert violations(measure(ALL_LAYOUTS[name], *start, ["blend"]), "fp32") == []


def test_random_pairs_are_drawn_alike_where_two_ranks_share_a_row(start: Start) -> None:
    window, random = (start[1][f"{stage}_fp32_experts"] for stage in ("annealed", RANDOM_PAIRS))
    assert window.fingerprints == random.fingerprints and window.losses != random.losses
    assert violations(measure(ALL_LAYOUTS["CP2"], *start, [RANDOM_PAIRS]), "fp32") == []


@pytest.mark.parametrize("name", ["TP2 x CP2", "PP2 x EP2", "PP2 x EP2 overlap, skipping"])
def test_four_ranks_train_what_one_rank_trains(name: str, start: Start) -> None:
    assert violations(measure(ALL_LAYOUTS[name], *start, ["ar", "complementary"]), "fp32") == []


@pytest.mark.parametrize(
    ("name", "measures"),
    [
        ("TP2, expert TP 1, EP 1", {"grad_norm", "weights", "update"}),
        ("TP1, expert TP 2, EP 1", {"grad_norm", "weights", "update"}),
        ("DP2, gradient not divided by the tokens", {"grad_norm"}),
        ("TP2, norm gradients not summed", {"grad_norm", "weights", "update", "replica_spread"}),
        ("CP2, key gradients of other ranks dropped", {"grad_norm", "weights", "update"}),
    ],
)
def test_wrong_gradients_are_noticed(name: str, measures: set[str], start: Start) -> None:
    found = violations(measure(ALL_LAYOUTS[name], *start, ["complementary"]), "fp32")
    assert measures <= {violation.split()[1] for violation in found}
