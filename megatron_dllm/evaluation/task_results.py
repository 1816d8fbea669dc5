"""What harness.json holds, for those who read it: metrics by task, and the settings that decide them.

`megatron_dllm.evaluation.harness.results` writes the file; reading it takes no lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dllm.run.files import read_json_object

FORMAT = 1
_REMEDY = "ask the tasks again with megatron_dllm.harness"


@dataclass(frozen=True)
class Metric:
    """A number of a task.

    Attributes:
        name: as the harness calls it, with the filter of the answers if there is one: "exact_match, strict-match".
        error: its standard error; None where it has none.
    """

    task: str
    name: str
    value: float
    error: float | None


@dataclass(frozen=True)
class TaskResults:
    """What one checkpoint was asked and what came of it.

    Attributes:
        weights: folder that was loaded.
        settings: all that decides the numbers, by name; those of a group as "likelihood.fill".
        metrics: in the order of the file.
        unsure: of a task with choices, how many questions were too close to call, and how many there were.
    """

    weights: str
    settings: Mapping[str, Any]
    metrics: list[Metric]
    unsure: Mapping[str, tuple[int, int]]

    @property
    def scored_as(self) -> str:
        """What its likelihoods are."""
        size = self.settings.get("block_size")
        return "exact NLL" if size is None else f"ELBO, block {size}"

    def metric(self, task: str, name: str) -> Metric | None:
        """A number by task and name; None where it was not measured."""
        return next((metric for metric in self.metrics if (metric.task, metric.name) == (task, name)), None)


def metrics_of(results: Mapping[str, Mapping[str, Any]], texts: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
    """All numbers of a file.

    Args:
        results: as the harness has them: by task "metric,filter" and "metric_stderr,filter".
        texts: of tasks that have texts written, their tokens and passes.
    """
    for task, values in results.items():
        for key, value in values.items():
            metric, _, answers = key.partition(",")
            if not answers or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{answers}")
            name = metric if answers == "none" else f"{metric}, {answers}"
            yield Metric(task, name, float(value), float(error) if isinstance(error, int | float) else None)
        if task in texts:
            yield Metric(task, "tokens per forward", float(texts[task]["tokens_per_forward"]), None)


def read_task_results(path: Path) -> TaskResults:
    """Read the file.

    Raises:
        ValueError: it is damaged, or not such a file.
    """
    content = read_json_object(path, _REMEDY)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} holds no results of tasks in format {FORMAT}; {_REMEDY}.")
    try:
        settings = dict(_flat(content["settings"]))
        for task, counts in content.get("n-samples", {}).items():
            settings[f"questions of {task}"] = counts["effective"]
        for task, version in content.get("versions", {}).items():
            settings[f"version of {task}"] = version
        unsure = {task: (one["num_unsure"], one["num_questions"]) for task, one in content["decisions"].items()}
        # Files of earlier versions do not count what was written.
        metrics = list(metrics_of(content["results"], content.get("texts", {})))
        return TaskResults(str(settings.pop("weights")), settings, metrics, unsure)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {_REMEDY}.") from None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of groups by their full names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
