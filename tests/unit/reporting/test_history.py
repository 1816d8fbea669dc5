"""A folder of runs is read as what happened: in which order, from which weights, started by whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dllm.reporting.history import Attempt, Duration, commit_of, read_history
from tests.unit.reporting.folders import COMMIT, training_record, validation_record, write_chain, write_run


def test_a_single_run(tmp_path: Path) -> None:
    write_run(tmp_path / "alone", [training_record(4), validation_record(4, 5.0)])
    history = read_history(tmp_path / "alone")
    (run,) = history.runs
    assert (run.name, run.attempts) == ("alone", [Attempt("node7:123", 1.7e9)])
    assert commit_of(run) == (COMMIT, False)
    assert [len(run.training), len(run.validations)] == [1, 1]
    assert (history.checkpoints, history.samples, history.durations) == ([], [], [])


def test_runs_of_a_chain_follow_the_weights(tmp_path: Path) -> None:
    history = read_history(write_chain(tmp_path / "full"))
    (track,) = history.tracks
    assert track.name == "warmup → stable → decay"
    assert [record["step"] for record in track.training] == [4, 8, 12, 16, 20, 24]
    assert [record["consumed_tokens"] for record in track.training] == [4e3, 8e3, 12e3, 16e3, 20e3, 24e3]
    # What a run measures before its first step is the end of the run before it, unless it is the first.
    assert [(record["step"], record["stage"]) for record in track.validations] == [
        (0, "warmup"),
        (8, "warmup"),
        (16, "stable"),
        (24, "decay"),
    ]
    assert history.durations == [Duration("warmup", 60.0), Duration("stable", 61.0), Duration("decay", 62.0)]
    assert history.commands["stable"].num_nodes == 2


def test_the_weights_decide_where_nothing_tells_the_time(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    write_run(chain / "again", [training_record(4)], "chains/full/warmup")
    for path in [*chain.glob("launch/*/*"), *chain.glob("*/lease/*")]:
        path.unlink()
    assert [track.name for track in read_history(chain).tracks] == ["warmup → again", "stable → decay"]


def test_runs_that_name_each_other_are_read_all_the_same(tmp_path: Path) -> None:
    for name, load in (("a", "odd/b"), ("b", "odd/a"), ("c", "odd/c")):
        write_run(tmp_path / "odd" / name, [training_record(4)], load)
    assert [track.name for track in read_history(tmp_path / "odd").tracks] == ["c", "a → b"]


def test_runs_of_their_own_stay_apart(tmp_path: Path) -> None:
    for index, name in enumerate(("wsd_2", "direct_1", "wsd_1")):
        write_run(tmp_path / "study" / name, [training_record(4)], "runs/demo/start", 1.7e9 + index)
    history = read_history(tmp_path / "study")
    assert [track.name for track in history.tracks] == ["wsd_2", "direct_1", "wsd_1"]
    assert [track.training[0]["step"] for track in history.tracks] == [4, 4, 4]


def test_the_chains_own_book_of_times_counts(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    (chain / "chain.json").write_text(json.dumps({"jobs": {"warmup": {"seconds": 5.5}, "merge": {"ended": 1}}}))
    assert read_history(chain).durations == [Duration("warmup", 5.5)]


def test_nothing_in_a_configuration_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "do not tell")
    run = write_run(tmp_path / "run", [training_record(4)])
    (run / "config.yaml").write_text('data: {train: "${oc.env:SECRET}"}\nrun: {name: "${data.train}", seed: 1}\n')
    (found,) = read_history(run).runs
    assert found.setting("data", "train") == "${oc.env:SECRET}"
    assert found.setting("run", "name") == "${data.train}"
    assert found.setting("run", "seed", "deeper") is None
    (run / "config.yaml").write_text("!!python/object/apply:os.system ['true']\n")
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML .*python/object"):
        read_history(run)


def test_only_checkpoints_count_as_checkpoints(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    for name in ("corpus", "merged"):  # a corpus may be called validation, and is described by validation.json
        (chain / name).mkdir()
        (chain / name / "validation.json").write_text("{}")
    (chain / "merged" / "contract.json").write_text("{}")
    assert [folder.name for folder in read_history(chain).checkpoints] == ["merged"]


def test_decoded_texts_are_found_whatever_is_in_them(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    sample = {"prompt": "a\u2028b", "text": "c\u2029d"}
    (chain / "texts.jsonl").write_text(json.dumps(sample, ensure_ascii=False) + '\n{"prompt": "half')
    (chain / "other.jsonl").write_text('{"prompt": 1, "text": "x"}\n')
    assert read_history(chain).samples == [sample]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            ValueError, match=r"folder \(.*\) holds no metrics.jsonl, .*name the folder of a run or a chain"
        ):
            read_history(folder)
