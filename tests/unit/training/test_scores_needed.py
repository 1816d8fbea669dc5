"""Which scores a run needs, where its corpora are not those that a new run would have."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tiny_run import run_config
from megatron_dllm.training.scores_needed import check_scored_corpus
from megatron_dllm.training.sources import Sources
from tests.unit.data.made_sources import MadeSource

PAIRS = MadeSource("pairs", token=5, num_documents=30, is_paired=True)


@pytest.mark.parametrize("corpora", [[], [PAIRS.fingerprint], [PAIRS.fingerprint, "of others"]], ids=len)
def test_a_run_that_began_with_these_pairs_has_the_noise_of_their_scores(tmp_path: Path, corpora: list[str]) -> None:
    sources = Sources(run_config(tmp_path, "dpo"), lambda *_: PAIRS)
    check_scored_corpus({"corpora": [{"fingerprint": fingerprint} for fingerprint in corpora]}, sources)


def test_pairs_that_came_later_have_other_noise(tmp_path: Path) -> None:
    sources = Sources(run_config(tmp_path, "dpo"), lambda *_: PAIRS)
    stream = {"corpora": [{"fingerprint": "of others"}, {"fingerprint": PAIRS.fingerprint}]}
    with pytest.raises(ValueError, match=r"data.train \(pairs\) is not the corpus that the run began with"):
        check_scored_corpus(stream, sources)
