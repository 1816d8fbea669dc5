"""TensorBoard and W&B show what metrics.jsonl holds, whatever an earlier start has drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_run import run_config
from megatron_dllm.training.observers.curves import TensorBoard, WandB, closed_run, forget_run
from megatron_dllm.training.observers.metrics_file import read_metrics, trim_metrics
from tests.wandb_file import history

CONFIG = run_config(Path("unused"), "run")


def record(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "stage": "stable", "loss": loss, "router_load": [1.0]}


def validation(step: int, elbo: float) -> dict[str, Any]:
    return {"step": step, "validation": True, "is_stage_end": False, "validation_elbo/32": elbo}


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def drawn_in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def series(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    names = ("loss", "validation_elbo/32")
    return {name: [(r["step"], r[name]) for r in records if name in r] for name in names}


FIRST = [record(1, 4.0), record(2, 3.0), validation(2, 3.5), record(3, 2.5), record(4, 2.25), validation(4, 9.0)]


@pytest.mark.parametrize("is_validated", [True, False])
def test_tensorboard_forgets_what_was_cut(tmp_path: Path, is_validated: bool) -> None:
    write(tmp_path, FIRST)
    killed = TensorBoard(tmp_path, [])
    for item in FIRST:
        killed.write(item)
    killed.flush()
    assert trim_metrics(tmp_path, 2, is_validated)
    again = TensorBoard(tmp_path, read_metrics(tmp_path))
    later = [*([] if is_validated else [validation(2, 3.25)]), record(3, 1.5), record(4, 1.25)]
    write(tmp_path, later)
    for item in later:
        again.write(item)
    again.close()
    found = drawn_in_tensorboard(tmp_path)
    assert found == series(read_metrics(tmp_path))
    assert found["loss"] == [(1, 4.0), (2, 3.0), (3, 1.5), (4, 1.25)]


def test_a_run_that_begins_anew_shows_nothing_of_before(tmp_path: Path) -> None:
    killed = TensorBoard(tmp_path, [])
    killed.write(record(1, 4.0))
    killed.flush()
    again = TensorBoard(tmp_path, [])
    again.write(record(1, 3.0))
    again.close()
    assert drawn_in_tensorboard(tmp_path) == {"loss": [(1, 3.0)]}


@pytest.mark.ranks  # W&B starts a process of its own
def test_a_start_offline_is_given_all_records_that_stay(tmp_path: Path) -> None:
    write(tmp_path, FIRST[:3])
    first = WandB(tmp_path, CONFIG, "offline", [])
    for item in FIRST[:3]:
        first.write(item)
    first.close()
    assert closed_run(tmp_path) is None, "it is not on the server"
    second = WandB(tmp_path, CONFIG, "offline", read_metrics(tmp_path))
    second.write(record(3, 1.5))
    second.close()
    newest = max((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert history(newest) == [
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 3.0, "validation_elbo/32": 3.5},
        {"step": 3, "loss": 1.5},
    ]
    assert not list(Path.cwd().glob("wandb*"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [("abc\nclosed online\n", "abc"), ("abc\n", None), ("abc\nclosed offline\n", None), ("", None), (None, None)],
)
def test_only_a_run_that_was_closed_on_the_server_goes_on(
    content: str | None, expected: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "wandb_id").write_text(content)
    assert closed_run(tmp_path) == expected
    forget_run(tmp_path)
    assert closed_run(tmp_path) is None
