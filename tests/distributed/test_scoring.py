"""Scores of pairs: the same in every layout, read by the run that they are made for, and refused by any other."""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ranks import run_ranks
from benchmarks.tiny_chats import write_pairs
from benchmarks.tiny_run import STAGES, read_steps, run_config, train_ranks, write_corpus
from megatron_dllm.config import (
    CheckpointConfig,
    ParallelConfig,
    PreferenceConfig,
    ReferenceConfig,
    SftConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_dllm.evaluation.scores_file import open_scores, partial_path, write_begun, write_scores
from megatron_dllm.training.score_command import score
from tests.full_disk import full_disk
from tests.integration.tiny_chain import run_module

NUM_PAIRS = 13
STAGE = replace(
    STAGES["warmup"],
    num_tokens=None,
    num_epochs=2,
    lr_warmup_tokens=0,
    num_views=2,
    sft=SftConfig(),
    preference=PreferenceConfig(beta=0.5),
)
LAYOUTS = {
    "TP2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "CP2": ParallelConfig(context_parallel_size=2),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
}


def config_of(
    folder: Path, name: str, reference: str, layout: ParallelConfig | None = None, **stage: Any
) -> TrainConfig:
    """A run of preferences in the folder of `start`."""
    load = str(folder / "runs" / "start")
    config = run_config(
        folder,
        name,
        layout,
        training=TrainingConfig(),
        preference=ReferenceConfig(reference),
        checkpoint=CheckpointConfig(keep_last=1, timeout_minutes=10.0, load=load),
    )
    return replace(
        config,
        data=replace(config.data, train=str(folder / "pairs"), packing_chunk=16),
        schedule=replace(config.schedule, stages={"dpo": replace(STAGE, **stage)}),
    )


class Interrupted(Exception):
    """As a kill that comes after some batches."""


def _score(folder: str, layout: ParallelConfig, target: str = "pairs.scores", stop_after: int | None = None) -> Any:
    """Score the pairs; rank 0 writes the file if there is none, and keeps what it has after `stop_after` batches.

    Returns:
        The scores, and the number of documents that it did not have to score.
    """
    import torch

    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_chunks
    from megatron_dllm.training.scoring import decide_scoring, score_pairs
    from megatron_dllm.training.sources import Sources

    path = Path(folder) / target
    config = config_of(Path(folder), "dpo", str(path), layout)
    sources, made = Sources(config), groups.initialize(layout, config.run)
    scoring = decide_scoring(config, path, True, sources)
    chunks = build_chunks(config, made, is_training=True)
    load_weights(scoring.weights, chunks)
    batches = 0

    def keep(by_view: np.ndarray, position: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == stop_after:
            write_begun(path, scoring.header, by_view, position)
            raise Interrupted

    try:
        by_view = score_pairs(config, scoring, chunks, made, sources, torch.device("cpu"), keep)
    except Interrupted:
        return None
    if not path.exists():
        write_scores(path, scoring.header, by_view)
    return by_view, scoring.num_scored


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder with pairs, the run `start`, another checkpoint of it, and the scores of its last one."""
    folder = tmp_path_factory.mktemp("scoring")
    write_corpus(folder / "corpus", num_documents=100)
    write_pairs(folder / "pairs", NUM_PAIRS)
    write_pairs(folder / "others", NUM_PAIRS, seed=1)
    config = run_config(folder, "start", checkpoint=CheckpointConfig(save_interval_tokens=300, keep_last=2))
    stages = {"warmup": replace(config.schedule.stages["warmup"], num_tokens=600, lr_warmup_tokens=0)}
    assert train_ranks(1, replace(config, schedule=replace(config.schedule, stages=stages))) == [0]
    ((expected, _),) = run_ranks(_score, 1, str(folder), ParallelConfig(), timeout_s=300.0)
    return folder, expected


def test_every_document_has_a_score_in_every_epoch_and_view(start: tuple[Path, np.ndarray]) -> None:
    folder, by_view = start
    assert by_view.shape == (2, 2 * NUM_PAIRS, 2) and (by_view < 0).all(), "minus a sum of NLLs"
    assert (by_view[0] != by_view[1]).mean() > 0.8, "other noise in every epoch"
    assert (by_view[..., 0] != by_view[..., 1]).mean() > 0.8, "other noise in every view"
    stored = open_scores(folder / "pairs.scores")
    assert np.array_equal(stored.by_view, by_view)
    assert stored.header.num_documents == 2 * NUM_PAIRS and stored.header.noise["is_count"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_scores_of_one_rank(name: str, start: tuple[Path, np.ndarray]) -> None:
    folder, expected = start
    for by_view, _ in run_ranks(_score, 2, str(folder), LAYOUTS[name], timeout_s=300.0):
        np.testing.assert_allclose(by_view, expected, rtol=1e-5)


def test_an_interrupted_scoring_goes_on_where_it_stood(start: tuple[Path, np.ndarray]) -> None:
    folder, expected = start
    assert run_ranks(_score, 1, str(folder), ParallelConfig(), "again.scores", 2, timeout_s=300.0) == [None]
    assert partial_path(folder / "again.scores").exists() and not (folder / "again.scores").exists()
    ((by_view, num_scored),) = run_ranks(_score, 1, str(folder), ParallelConfig(), "again.scores", timeout_s=300.0)
    assert 0 < num_scored < expected[..., 0].size, "some of the documents were scored before"
    assert np.array_equal(by_view, expected)
    assert np.array_equal(open_scores(folder / "again.scores").by_view, expected)
    assert not partial_path(folder / "again.scores").exists()


def _refused_keeping(folder: str) -> str:
    """What this rank says where rank 0 has no room to keep the first scores."""
    limit = full_disk(100) if os.environ["RANK"] == "0" else contextlib.nullcontext()
    with limit, pytest.raises(OSError) as refused:
        _score(folder, ParallelConfig(), "full.scores", 1)
    return str(refused.value)


def test_all_ranks_end_where_one_cannot_keep_the_scores(start: tuple[Path, np.ndarray]) -> None:
    folder, _ = start
    for said in run_ranks(_refused_keeping, 2, str(folder), timeout_s=120.0):
        assert "rank 0 of 2 failed" in said and "full.scores" in said
    assert not list(folder.glob("*full.scores*")), "nothing half-written is left"


def test_a_run_with_the_file_trains_as_with_a_copy_in_memory(start: tuple[Path, np.ndarray]) -> None:
    folder, _ = start
    found = []
    for name, reference in (("file", str(folder / "pairs.scores")), ("copy", "frozen")):
        config = config_of(folder, name, reference)
        assert train_ranks(1, config) == [0]
        found.append(read_steps(config))
    assert len(found[0]) == len(found[1]) > 2 and found[0][0]["loss"] == pytest.approx(np.log(2.0), rel=1e-5)
    for record, expected in zip(*found, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert record["data_fingerprint"] == expected["data_fingerprint"]


def _refusal(config: TrainConfig) -> str:
    """What a start of the run says when it is refused."""
    from megatron_dllm.train import train

    with pytest.raises(ValueError) as refused:
        train(config)
    return str(refused.value)


def test_a_run_whose_first_margins_are_not_zero_is_refused_before_its_first_update(
    start: tuple[Path, np.ndarray],
) -> None:
    """The file is this run's by its header, and its scores are not: those of the rejected sides are lower."""
    folder, by_view = start
    moved = by_view.copy()
    moved[:, 1::2] -= 0.5
    write_scores(folder / "moved.scores", open_scores(folder / "pairs.scores").header, moved)
    config = config_of(folder, "moved", str(folder / "moved.scores"))
    for message in run_ranks(_refusal, 2, config, timeout_s=300.0):
        assert re.match(
            r"the margins of the first pairs \(up to 0\.5 nats\) must be 0, within 0\.2, as the run", message
        )
    assert read_steps(config) == []
    assert not list((folder / "runs" / "moved").rglob("step_*"))


REFUSED = {
    "checkpoint": ({"checkpoint.load": "{folder}/runs/start/checkpoints/step_0000002"}, "checkpoint ("),
    "seed": ({"run.seed": 7}, "seed (1234) differs from this run's (7)"),
    "corpus": ({"data.train": "{folder}/others"}, "corpus ("),
    "epochs": ({"num_epochs": 3}, "holds the scores of 2 epochs, each of which has noise of its own"),
    "views": ({"num_views": 1}, "noise.num_views (2) differs from this run's (1)"),
    "block size": ({"block_size": 8}, "block_size (4) differs from this run's (8)"),
    "fill": ({"sft": SftConfig(fill="none")}, "fill (eos) differs from this run's (none)"),
    "counts": ({"preference": PreferenceConfig(is_count=False)}, "noise.is_count (True) differs from this run's"),
    "levels": ({"preference": PreferenceConfig(share_levels=True)}, "noise.share_levels (False) differs"),
    "precision": ({"parallel.precision": "bf16"}, "precision (fp32) differs from this run's (bf16)"),
    "none": ({"preference.reference": "{folder}/none.scores"}, "none.scores is no file: the scores of a"),
    "other file": ({"preference.reference": "{folder}/pairs.bin"}, "pairs.bin (16 bytes of header) must be a"),
    "blend": (
        {"data.train": [0.5, "{folder}/pairs", 0.5, "{folder}/others"], "num_epochs": None, "num_tokens": 2000},
        "a file of scores is of one corpus, and the run trains on",
    ),
}


def _placed(folder: Path, value: Any) -> Any:
    """The value with the folder put in."""
    if isinstance(value, list):
        return [_placed(folder, part) for part in value]
    return value.format(folder=folder) if isinstance(value, str) else value


def _changed(folder: Path, changes: dict[str, Any]) -> TrainConfig:
    config = config_of(
        folder,
        "refused",
        str(folder / "pairs.scores"),
        **{name: value for name, value in changes.items() if "." not in name},
    )
    for name, value in changes.items():
        if "." in name:
            part, key = name.split(".")
            config = replace(config, **{part: replace(getattr(config, part), **{key: _placed(folder, value)})})
    return config


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_the_scores_are_not_for_is_refused(name: str, start: tuple[Path, np.ndarray]) -> None:
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start

    changes, message = REFUSED[name]
    config = _changed(start[0], changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        decide_start(config, 1, Sources(config))


NOT_SCORED = {
    "an existing file": ({}, "pairs.scores) exists, and nothing is overwritten"),
    "no preferences": ({"preference": None}, "are for preferences, and no stage has any; take experiment=dpo"),
    "a text": ({"data.train": "{folder}/corpus"}, "corpus is plain text, without spans"),
}


@pytest.mark.parametrize("name", NOT_SCORED)
def test_what_cannot_be_scored_is_refused(name: str, start: tuple[Path, np.ndarray]) -> None:
    from megatron_dllm.training.scoring import decide_scoring
    from megatron_dllm.training.sources import Sources

    changes, message = NOT_SCORED[name]
    target = start[0] / ("new.scores" if changes else "pairs.scores")
    config = _changed(start[0], changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        decide_scoring(config, target, False, Sources(config))


def _words(folder: Path, *more: str) -> list[str]:
    """Words of a command that make recipe dpo as small as the run `start`."""
    stage = ["block_size=4", "global_batch_size=4", "num_views=1", "num_epochs=2"]
    small = ["context_length=32", "row_length=96", *(f"stages.dpo.{word}" for word in stage)]
    data = ["data.num_workers=0", "data.packing_chunk=16", "parallel=single"]
    run = ["experiment=dpo", f"checkpoint={folder}/runs/start"]
    return [*run, *(f"schedule.{word}" for word in small), *data, *more]


def _told(words: list[str]) -> tuple[int, str]:
    """The exit code of the command, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run_module(["-m", "megatron_dllm.evaluate", *words])
    return code, said.getvalue()


def test_the_command_writes_the_file_beside_the_corpus_that_it_names(start: tuple[Path, np.ndarray]) -> None:
    folder, _ = start
    target = folder / "others.scores"
    (code, said), (other_code, _) = run_ranks(_told, 2, _words(folder, f"scores={target}"), timeout_s=300.0)
    assert (code, other_code) == (0, 0), said
    stored = open_scores(target)
    assert stored.by_view.shape == (2, 2 * NUM_PAIRS, 1) and (np.asarray(stored.by_view) < 0).all()
    assert f"{NUM_PAIRS} pairs, 2 epochs, 1 views, scored by {folder}/runs/start/checkpoints/" in said
    assert f"written to {target}" in said


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("preference.reference=frozen", "preference.reference names what scores="),
        (
            "schedule.stages.dpo.num_vews=2",
            r"num_vews is not a key of the .*; did you mean schedule\.stages\.NAME\.num_views",
        ),
        ("overwrite=perhaps", r"overwrite \(perhaps\) must be true or false"),
    ],
)
def test_words_that_the_command_refuses(start: tuple[Path, np.ndarray], word: str, message: str) -> None:
    folder, _ = start
    with pytest.raises(ValueError, match=message):
        score(_words(folder, f"scores={folder}/new.scores", word))
