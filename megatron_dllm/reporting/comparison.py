"""Several checkpoints beside one another: what tasks and validations made of each, and what makes them incomparable.

A column is a checkpoint, a line a number: the tasks of lm-evaluation-harness (`megatron_dllm.harness`), and the ELBO or
exact NLL that lies beside the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.validation import Validation, read_validation
from megatron_dllm.evaluation.task_results import TaskResults, read_task_results
from megatron_dllm.reporting.history import History
from megatron_dllm.reporting.markup import paragraph, table
from megatron_dllm.run.names import CHECKPOINTS, HARNESS

_FORMAT = 1
# In a folder of weights, of a run, of a chain.
_PATTERNS = ("harness*.json", f"{CHECKPOINTS}/*/{HARNESS}", f"*/{HARNESS}", f"*/{CHECKPOINTS}/*/{HARNESS}")
# What may differ: it says who was asked, not how.
_OWN = ("code", "block_size")


@dataclass(frozen=True)
class Model:
    """A column.

    Attributes:
        results: of its tasks.
        validation: what lies beside its weights; None where nothing does.
    """

    name: str
    results: TaskResults
    validation: Validation | None


@dataclass(frozen=True)
class Line:
    """A number of every model, as text; empty where it was not measured."""

    measure: str
    cells: list[str]


def find_results(folder: Path) -> dict[str, Path]:
    """Results of tasks in the folder of weights, of a run or of a chain: the model's name and the file.

    Raises:
        ValueError: there are none, or two of one model.
    """
    paths = [path for pattern in _PATTERNS for path in sorted(folder.glob(pattern))]
    if not paths:
        raise ValueError(
            f"{folder} holds no {HARNESS}; ask its model some tasks with python -m megatron_dllm.harness, or name the "
            "file."
        )
    found: dict[str, Path] = {}
    for path in dict.fromkeys(paths):
        name = _name(path)
        if name in found:
            raise ValueError(f"{found[name]} and {path} are both called {name}; name one of them, as NAME={path}.")
        found[name] = path
    return found


def _name(path: Path) -> str:
    """What a model is called after the place of its results: harness_sft.json is that of sft."""
    if path.name != HARNESS:
        return path.stem.removeprefix("harness").strip("_-.") or path.stem
    folder = path.resolve().parent
    return f"{folder.parent.parent.name} {folder.name}" if folder.parent.name == CHECKPOINTS else folder.name


def read_models(places: Iterable[str]) -> list[Model]:
    """The models of a command line: files or folders, each with a name before it or not, as NAME=PLACE.

    Raises:
        ValueError: nothing was measured there, a file is damaged, or two models have one name.
    """
    models: list[Model] = []
    for place in places:
        # A folder may have an equal sign in its name, as those of sweeps do.
        named, equals, rest = ("", "", place) if Path(place).exists() else place.partition("=")
        path = Path(rest if equals else place)
        found = {_name(path): path} if path.is_file() else find_results(path)
        if equals and len(found) > 1:
            raise ValueError(f"{place}: {path} holds results of {', '.join(found)}; name the file of one of them.")
        models += [read_model(named if equals else name, file) for name, file in found.items()]
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two models are called {twice}; give them names, as NAME=PLACE.")
    return models


def read_model(name: str, path: Path) -> Model:
    """A model by the file of its results.

    Raises:
        ValueError: a file is damaged.
    """
    return Model(name, read_task_results(path), read_validation(path.parent) if path.name == HARNESS else None)


def models_of_chain(history: History) -> list[Model]:
    """The models of a chain that were asked tasks, in the order of its runs; others first, as its base.

    Raises:
        ValueError: a file is damaged.
    """
    order = {run.name: place for place, run in enumerate(history.runs)}
    if not any(next(history.folder.glob(pattern), None) for pattern in _PATTERNS):
        return []
    found = find_results(history.folder)
    names = sorted(found, key=lambda name: order.get(name.split(" ")[0], -1))
    return [read_model(name, found[name]) for name in names]


def lines_of(models: Sequence[Model]) -> list[Line]:
    """The lines of the table, those of the first model's tasks first."""
    lines = [Line("likelihoods are", [model.results.scored_as for model in models])]
    measures = dict.fromkeys((metric.task, metric.name) for model in models for metric in model.results.metrics)
    for task, name in measures:
        lines.append(Line(f"{task}: {name}", [_cell(model.results, task, name) for model in models]))
    for measure, values in (("nats/token", "nats_per_token"), ("bits/byte", "bits_per_byte")):
        cells = [_validated(model.validation, values) for model in models]
        if any(cells):
            lines.append(Line(f"validation: {measure}", cells))
    return lines


def _cell(results: TaskResults, task: str, name: str) -> str:
    metric = results.metric(task, name)
    if metric is None:
        return ""
    text = f"{metric.value:.4g}" if metric.error is None else f"{metric.value:.4g} ± {metric.error:.2g}"
    num_unsure, _ = results.unsure.get(task, (0, 0))
    return f"{text}, {num_unsure} unsure" if num_unsure and name == "acc" else text


def _validated(validation: Validation | None, values: str) -> str:
    if validation is None:
        return ""
    found = getattr(validation, values).get(str(validation.target_block_size or "ar"))
    return "" if found is None else f"{found:.4f}"


def differences(models: Sequence[Model]) -> list[str]:
    """Settings that were not the same for all models that have them, a sentence each."""
    names = dict.fromkeys(name for model in models for name in model.results.settings if name not in _OWN)
    found = []
    for name in names:
        given = [(model.name, model.results.settings.get(name)) for model in models]
        values = {str(value) for _, value in given if value is not None}
        if len(values) > 1:
            found.append(f"{name}: {', '.join(f'{model} {value}' for model, value in given if value is not None)}")
    validated = [model for model in models if model.validation is not None]
    for model in validated[1:]:
        assert model.validation is not None and validated[0].validation is not None, "those without are left out"
        difference = model.validation.difference(validated[0].validation)
        if difference:
            found.append(f"validation of {model.name}, beside that of {validated[0].name}: {difference}")
    return found


def comparison_section(models: Sequence[Model]) -> list[str]:
    """The parts of the section of a page; none where no tasks were asked."""
    if not models:
        return []
    rows = [[line.measure, *line.cells] for line in lines_of(models)]
    notes = [paragraph(f"Not the same for all: {text}.") for text in differences(models)]
    return ["<h2>Tasks</h2>", table(["", *(model.name for model in models)], rows), *notes]


def to_json(models: Sequence[Model]) -> dict[str, Any]:
    """The comparison as plain values."""
    entries = [
        {
            "name": model.name,
            "weights": model.results.weights,
            "scored_as": model.results.scored_as,
            "metrics": [asdict(metric) for metric in model.results.metrics],
            "validation": None if model.validation is None else asdict(model.validation),
        }
        for model in models
    ]
    return {"format": _FORMAT, "models": entries, "differences": differences(models)}
