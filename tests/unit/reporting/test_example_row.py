"""A row is rebuilt from the folder alone, wherever the reader stands, and nothing else is done for it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from omegaconf import OmegaConf

from megatron_dllm.compose import compose_train_config
from megatron_dllm.reporting.example_row import example_row
from megatron_dllm.reporting.history import Run, read_history
from megatron_dllm.reporting.pictures import mask_classes, mask_picture
from tests.unit.reporting.folders import training_record, write_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of the tiny conversion on a small corpus, both named by paths relative to where it was started."""
    folder = write_run(tmp_path / "runs" / "demo", [training_record(4)])
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    for length in random.Random(0).choices(range(2, 300), k=400):
        builder.add_document(np.full(length, 7, np.uint16), [length])
    builder.finalize(str(folder / "text.idx"))
    names = ["run.root=runs", "run.name=demo", "data.train=runs/demo/text", "data.validation=null"]
    config = compose_train_config(["experiment=tiny_convert", *names, "data.tokenizer=none", "checkpoint.load=none"])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    (found,) = read_history(folder).runs
    return found


def test_a_row_of_the_last_stage(run: Run) -> None:
    row = example_row(run)
    assert row.caption.startswith("A row of 1024 tokens, ")
    assert row.caption.endswith(" segments, block size 32")
    assert row.batch.input_ids.shape == (1, 1024)
    assert set(np.unique(mask_classes(row.batch))) >= {1, 2, 3, 4}
    assert mask_picture(row.batch).startswith(b"\x89PNG")


def test_paths_may_be_absolute(run: Run) -> None:
    run.config["run"]["root"] = str(run.folder.parent)
    run.config["data"]["train"] = str(run.folder / "text")
    assert example_row(run).batch.input_ids.shape == (1, 1024)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("runs/demo/text", "runs/demo/gone", r"corpus .*gone has no gone\.bin"),
        ("runs/demo/text", "${oc.env:HOME}", r"holds '\$\{', which is not resolved here"),
        ("seed:", "sede:", "does not fit this version: Key 'sede'"),
        ("packing_chunk: ", "packing_chunk: x", "does not fit this version: Value 'x"),
    ],
)
def test_why_there_is_no_row(run: Run, old: str, new: str, problem: str) -> None:
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace(old, new))
    (changed,) = read_history(run.folder).runs
    with pytest.raises(ValueError, match=problem):
        example_row(changed)


def test_a_row_that_no_picture_holds(run: Run) -> None:
    run.config["schedule"]["row_length"] = 8192
    with pytest.raises(ValueError, match=r"its rows \(8192 tokens\) are longer than a picture shows \(4096\)"):
        example_row(run)
