"""What share of the document tokens each corpus has really had, how often it has been read, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import StepReport


class BlendShares(Observer):
    """Records the shares since the weights were last changed, where a run has several corpora, and dropped segments."""

    def measure(self, report: StepReport) -> dict[str, Any]:
        """`data_share/NAME` and `data_epoch/NAME` of corpora with a weight; `dropped_segments` if there are any."""
        corpora, blend = report.stream_state["corpora"], report.stream_state["blends"][-1]
        num_dropped = sum(corpus["position"].get("num_dropped", 0) for corpus in corpora if "position" in corpus)
        record: dict[str, Any] = {"dropped_segments": num_dropped} if num_dropped else {}
        if len(corpora) == 1:
            return record
        total = max(sum(blend["tokens"]), 1)
        names = short_names([corpus["name"] for corpus in corpora])
        for number, (name, weight) in enumerate(zip(names, blend["weights"], strict=True)):
            if weight:
                record[f"data_share/{name}"] = blend["tokens"][number] / total
                record[f"data_epoch/{name}"] = corpora[number]["position"]["epoch"]
        return record


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole of those whose last parts are equal."""
    last: Mapping[str, str] = {name: name.rstrip("/").rpartition("/")[2] for name in names}
    short = list(last.values())
    return [last[name] if short.count(last[name]) == 1 else name for name in names]
