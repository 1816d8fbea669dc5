"""What a dumped step must hold to be replayed; the dumping and the replay are in tests/integration/test_faults.py."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_dllm.data.batch import Batch
from megatron_dllm.run.files import write_json
from megatron_dllm.training.replay import load_step
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch


def _dump(folder: Path, batch: Batch, without: str | None = None) -> None:
    """A step of one micro-batch, as one data-parallel rank writes it, but for one field."""
    names = [item.name for item in fields(Batch) if item.name != without]
    write_json(folder / "step.json", {"data_parallel_size": 1})
    tensors = {f"0.{name}": getattr(batch, name).contiguous() for name in names}
    save_file(tensors, str(folder / "data_00000.safetensors"))


def test_a_batch_that_lacks_a_field_is_refused_by_name(tmp_path: Path) -> None:
    batch = tiny_batch(tiny_model(), [[10, 5]], row_length=48, block_size=4)
    _dump(tmp_path, batch)
    ((found,),) = load_step(tmp_path)
    assert all(torch.equal(getattr(found, item.name), getattr(batch, item.name)) for item in fields(Batch))
    _dump(tmp_path, batch, without="num_ar_maskable")
    with pytest.raises(ValueError, match=r"data_00000.safetensors holds no num_ar_maskable, .*starts.jsonl"):
        load_step(tmp_path)
