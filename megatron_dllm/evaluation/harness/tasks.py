"""Tasks of lm-evaluation-harness: found by name or file, loaded, and refused in a sentence where that fails."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

_GENERATE, _LOGLIKELIHOOD = "generate_until", "loglikelihood"
_YAML = (".yaml", ".yml")
# What dataset_path says of files that the task itself names.
_FILES = ("json", "csv", "parquet", "arrow", "text")


def load_tasks(names: Sequence[str], include_path: str | None, include_defaults: bool = True) -> list[Any]:
    """The tasks and groups as lm-evaluation-harness takes them.

    Args:
        names: tasks, groups, tags, or YAML files.
        include_path: folder with further YAML files; None: none.
        include_defaults: whether the harness's own tasks are known; they are looked through (14,000 files, half a
            minute on a slow disk) only if another name is asked for.

    Raises:
        ValueError: naming the task that is unknown, whose file is not there, or whose data cannot be read.
    """
    _check_files(names, include_path)
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if include_defaults and _unknown(names, manager):
        manager = TaskManager(include_path=include_path)
    for name in _unknown(names, manager):
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(
            f"tasks ({name}) is no task of lm-evaluation-harness{f' or {include_path}' if include_path else ''}; "
            f"{hint}lm-eval ls tasks lists them all, and a YAML file may be given instead."
        )
    return [item for name in names for item in _load(manager, name)]


def leaves(tasks: Sequence[Any]) -> list[Any]:
    """The tasks themselves, those of groups included."""
    return [leaf for item in tasks for leaf in (item.get_all_tasks() if isinstance(item, Group) else [item])]


def _check_files(names: Sequence[str], include_path: str | None) -> None:
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path ({include_path}) is not a folder; name one with YAML files of tasks.")
    for name in names:
        if name.endswith(_YAML) and not Path(name).is_file():
            raise ValueError(f"tasks ({name}) is not a file; name a YAML file of a task, or a task by its name.")


def _unknown(names: Sequence[str], manager: TaskManager) -> list[str]:
    return [name for name in names if not name.endswith(_YAML) and name not in manager.task_index]


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The group of this name, or the task, or all tasks of a tag."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever the harness, the data sets library or the network may raise
        raise ValueError(f"tasks ({name}) cannot be loaded: {_reason(manager, name, error)}") from error
    # A group comes before those that it holds.
    return list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())


def _reason(manager: TaskManager, name: str, error: Exception) -> str:
    """What went wrong, and what to do about it."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    data_set = _data_set(manager, name)
    if not isinstance(error, OSError) or data_set in _FILES:
        return f"{said}; correct the task's YAML file."
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    what, asked = ("a data set of it", "NAME") if data_set is None else (f"its data set {data_set}", data_set)
    return (
        f"{what} is neither in {home} nor could it be fetched ({said}); load it once where there is a "
        f"network (python -c 'import datasets; datasets.load_dataset(\"{asked}\")'), copy that machine's {home} and "
        "name it in HF_HOME, or give a YAML file whose dataset_path is json and whose data_files lie here."
    )


def _data_set(manager: TaskManager, name: str) -> str | None:
    """The data set of a single task; None: a group, a tag or a YAML file, whose own ones the error names."""
    entry = manager.task_index.get(name)
    path = None if entry is None or entry.cfg is None else entry.cfg.get("dataset_path")
    return None if path is None else str(path)


def greedy_tasks(tasks: Sequence[Any]) -> frozenset[str]:
    """Names of the tasks that count continuations which the model would write itself."""
    return frozenset(
        str(task.task_name)
        for task in leaves(tasks)
        if task.OUTPUT_TYPE == _LOGLIKELIHOOD and "acc" in task.aggregation()
    )


def writing_tasks(tasks: Sequence[Any]) -> list[str]:
    """Names of the tasks for which texts are decoded."""
    asking = greedy_tasks(tasks)
    return [str(t.task_name) for t in leaves(tasks) if t.OUTPUT_TYPE == _GENERATE or t.task_name in asking]


def filters_of(task: Any) -> list[str]:
    """Names of the ways in which a task takes answers out of texts, as it lists them."""
    return [str(entry["name"]) for entry in task.config.filter_list or []] or ["none"]


def chosen_filter(task: Any, wanted: str | None) -> str:
    """The filter whose answers count: the wanted one, or the first.

    Raises:
        ValueError: the task has no such filter.
    """
    names = filters_of(task)
    if wanted is not None and wanted not in names:
        raise ValueError(
            f"filter ({wanted}) is none of task {task.task_name}'s ({', '.join(names)}); name one of them, or leave it "
            "out."
        )
    return wanted or names[0]


def check_tasks(tasks: Sequence[Any], *, why_not_write: str | None, has_confirmed: bool) -> None:
    """Refuse what the model cannot do, or the user has not allowed.

    Args:
        tasks: from `load_tasks`.
        why_not_write: why the model cannot decode texts, and what to do; None: it can.
        has_confirmed: whether programs that the model writes may run.

    Raises:
        ValueError: naming the task.
    """
    for name in writing_tasks(tasks):
        if why_not_write is not None:
            raise ValueError(f"tasks ({name}) has the model write text, and {why_not_write}")
    for task in leaves(tasks):
        name = task.task_name
        if getattr(task, "UNSAFE_CODE", False) and not has_confirmed:
            raise ValueError(
                f"tasks ({name}) runs what the model writes as a program on this machine; give "
                "confirm_unsafe_code=true if that is no risk here."
            )
