"""What lies in a folder of weights is decided once, for all who read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from checkpoints_tools.inspect import describe
from megatron_dllm.checkpoint.merging.inputs import TorchDistInput, open_input
from megatron_dllm.checkpoint.weights_folder import read_weights_folder


def test_a_checkpoint_stays_one_beside_a_config_json(checkpoint: Path, hf: Path) -> None:
    shutil.copyfile(hf / "config.json", checkpoint / "config.json")
    assert not read_weights_folder(checkpoint).is_hf
    assert describe(checkpoint)["format"] == "torch_dist"
    assert isinstance(open_input(checkpoint, "auto"), TorchDistInput)
    (checkpoint / "contract.json").unlink()
    assert read_weights_folder(checkpoint).is_hf


@pytest.mark.parametrize(
    ("changes", "block_size"), [({}, 1), ({"model_type": "llada2_moe"}, 32), ({"block_length": 16}, 16)]
)
def test_the_block_size_is_that_of_the_file_or_of_the_class(
    hf: Path, changes: dict[str, object], block_size: int
) -> None:
    config = json.loads((hf / "config.json").read_text())
    if changes:
        config |= {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], **changes}
        (hf / "config.json").write_text(json.dumps(config))
    assert read_weights_folder(hf).block_size == block_size
