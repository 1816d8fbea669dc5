"""What share of the document tokens each corpus has really had, and how often it has been read through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import StepReport


class BlendShares(Observer):
    """Records the shares since the weights were last changed; nothing where a run has one corpus."""

    def measure(self, report: StepReport) -> dict[str, Any]:
        """`data_share/NAME` and `data_epoch/NAME` of the corpora that have a weight."""
        corpora, blend = report.stream_state["corpora"], report.stream_state["blends"][-1]
        if len(corpora) == 1:
            return {}
        total = max(sum(blend["tokens"]), 1)
        names = short_names([corpus["name"] for corpus in corpora])
        record: dict[str, Any] = {}
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
