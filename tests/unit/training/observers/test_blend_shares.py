"""The realised shares are those of the rows that were emitted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_dllm.data.blend_stream import BlendStream
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import LENGTH
from megatron_dllm.training.observers.blend_shares import BlendShares, short_names
from tests.unit.data.made_sources import MadeSource

GEOMETRY = RowGeometry("block_diffusion", 4, 16, 48, 1)
ONE, OTHER = MadeSource("a/one", 3, 300), MadeSource("a/other", 4, 9)


def measured(stream: BlendStream) -> dict[str, float]:
    report: Any = SimpleNamespace(stream_state=stream.state_dict())
    return BlendShares().measure(report)


def test_realised_shares_and_epochs() -> None:
    stream = BlendStream([ONE, OTHER], 0, 16)
    stream.use({ONE.fingerprint: 0.5, OTHER.fingerprint: 0.5})
    tokens = {0: 0, 1: 0}
    for _ in range(60):
        plan = stream.next(GEOMETRY)
        tokens[int(plan.segments[0, 0]) >> 40] += int(plan.segments[:, LENGTH].sum())
    expected = {name: tokens[number] / sum(tokens.values()) for number, name in enumerate(("one", "other"))}
    found = measured(stream)
    assert {name: found[f"data_share/{name}"] for name in expected} == expected
    assert found["data_epoch/one"] == 0 and found["data_epoch/other"] >= 1
    stream.use({ONE.fingerprint: 1.0})
    stream.next(GEOMETRY)
    assert measured(stream) == {"data_share/one": 1.0, "data_epoch/one": 0}, "since the weights were changed"


def test_one_corpus_needs_no_shares() -> None:
    stream = BlendStream([ONE], 0, 16)
    stream.use({ONE.fingerprint: 1.0})
    stream.next(GEOMETRY)
    assert measured(stream) == {}


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["/data/web/", "/data/code", "/a/x", "/b/x"]) == ["web", "code", "/a/x", "/b/x"]


def test_dropped_segments_are_counted() -> None:
    stream = BlendStream([ONE], 0, 16)
    stream.use({ONE.fingerprint: 1.0})
    state = stream.state_dict()
    state["corpora"][0]["position"]["num_dropped"] = 5
    report: Any = SimpleNamespace(stream_state=state)
    assert BlendShares().measure(report) == {"dropped_segments": 5}
