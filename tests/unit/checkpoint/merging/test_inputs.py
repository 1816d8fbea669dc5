"""What inputs of a merge must have in common is what they mean; how it is written may differ, and is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools.merge_topk import merge
from megatron_dllm.checkpoint.meta import read_meta, write_meta
from tests.tiny_models import left_in, seal
from tests.unit.hf.test_tokenizer_folder import make_tokenizer


def _give_tokenizer(folder: Path, added: dict[str, int]) -> None:
    """Put the files of a tokenizer into a folder."""
    make_tokenizer(folder.with_name(f"{folder.name}_tokenizer"), added)
    shutil.copytree(folder.with_name(f"{folder.name}_tokenizer"), folder, dirs_exist_ok=True)
    shutil.rmtree(folder.with_name(f"{folder.name}_tokenizer"))


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object], indent: int | None = None) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=indent))


def _as_transformers_5(config: dict[str, Any]) -> None:
    config |= {
        "num_local_experts": config.pop("num_experts"),
        "dtype": config.pop("torch_dtype"),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")},
        "use_cache": False,
        "transformers_version": "5.24.0",
        "_attn_implementation": "sdpa",
        "sliding_window": None,
        "layer_types": ["full_attention"] * 3,
    }
    for name in ("rope_scaling", "max_window_layers"):
        del config[name]


def _as_saved_while_padding(tokenizer: dict[str, Any]) -> None:
    tokenizer["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_id": 3, "pad_token": "<eos>"}


@pytest.mark.parametrize(
    ("name", "change", "shown"),
    [
        ("config.json", lambda config: None, ()),
        ("config.json", lambda config: config.update(use_cache=False), ("config.use_cache is True in", "False in")),
        ("config.json", lambda config: config.update(dtype=config.pop("torch_dtype")), ("config.dtype is None in",)),
        ("config.json", lambda config: config.update(rope_theta=int(config["rope_theta"])), ()),
        ("config.json", lambda config: config.update(_attn_implementation="sdpa"), ("config._attn_implementation",)),
        ("config.json", _as_transformers_5, ("config.transformers_version is None in",)),
        ("tokenizer.json", lambda tokenizer: None, ()),
        ("tokenizer.json", _as_saved_while_padding, ()),
        ("tokenizer_config.json", lambda config: config.update(chat_template="{{ x }}"), ("chat template is None in",)),
    ],
)
def test_folders_that_differ_in_bookkeeping_have_a_mean(
    make_checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, change, shown: tuple[str, ...]
) -> None:
    for seed, folder in enumerate(("a", "b")):
        make_checkpoint(folder, seed)
        _give_tokenizer(tmp_path / f"{folder}_hf", {"<eos>": 3})
    merge([tmp_path / "a_hf", tmp_path / "b_hf"], tmp_path / "expected")
    _rewrite(tmp_path / "b_hf" / name, change, indent=7)
    with caplog.at_level("INFO"):
        merge([tmp_path / "a_hf", tmp_path / "b_hf"], tmp_path / "out")
    assert all(text in caplog.text for text in shown)
    assert shown or "from which the mean takes it" not in caplog.text
    actual, expected = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "expected"))
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "b_hf" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda config: config.update(rope_theta=1e4), "config.rope_theta is 600000.0 in"),
        (lambda config: config.update(rms_norm_eps=1e-5), "config.rms_norm_eps is 1e-06 in"),
        (lambda config: config.update(eos_token_id=5), "config.eos_token_id is 0 in"),
        (
            lambda config: config.update(num_experts_per_tok=1, n_group=1),
            r"\(and 1 more differ: \['config.num_experts_per_tok'\]\)",
        ),
        (lambda config: config.update(rope_parameters={"rope_theta": 1e4}), "rope_parameters.rope_theta"),
    ],
)
def test_folders_that_mean_something_else_have_none(make_checkpoint, tmp_path: Path, change, shown: str) -> None:
    make_checkpoint("a", 0), make_checkpoint("b", 1)
    _rewrite(tmp_path / "b_hf" / "config.json", change)
    with pytest.raises(ValueError, match=shown):
        merge([tmp_path / "a_hf", tmp_path / "b_hf"], tmp_path / "out")
    assert "out" not in left_in(tmp_path)


def test_folders_with_other_tokenizers_have_none(make_checkpoint, tmp_path: Path) -> None:
    make_checkpoint("a", 0), make_checkpoint("b", 1)
    a, b = tmp_path / "a_hf", tmp_path / "b_hf"
    for folder, added in ((a, {"<eos>": 3}), (b, {"<eos>": 4})):
        _give_tokenizer(folder, added)
    with pytest.raises(ValueError, match=r"tokenizer.added_tokens is \{'<eos>': 3\} in .*a_hf and \{'<eos>': 4\} in"):
        merge([a, b], tmp_path / "out")
    for path in [*a.glob("*token*")]:
        path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer is None in .*a_hf and 'BPE' in .*b_hf \(and \d more differ"):
        merge([a, b], tmp_path / "out")
    assert "out" not in left_in(tmp_path)


def test_a_merge_takes_the_tokenizer_and_leaves_what_lies_beside_it(make_checkpoint, tmp_path: Path) -> None:
    """As where the run's tokenizer was a whole model folder: weights, links, and files nobody may write."""
    inputs = [make_checkpoint("a", 0), make_checkpoint("b", 1)]
    for folder in inputs:
        make_tokenizer(folder / "tokenizer", {"<eos>": 3})
        (folder / "tokenizer" / "model.safetensors").symlink_to("../../blobs/none")
        (folder / "tokenizer" / "model-00002-of-00002.safetensors").write_bytes(bytes(1000))
        (folder / "tokenizer" / "tokenizer.json").rename(folder / "blob")
        (folder / "tokenizer" / "tokenizer.json").symlink_to("../blob")
        (folder / "blob").chmod(0o444)
        meta = read_meta(folder)
        write_meta(folder, replace(meta, provenance=replace(meta.provenance, tokenizer="tokenizer")))
        seal(folder)
    merge(inputs, tmp_path / "out")
    copied = tmp_path / "out" / "tokenizer"
    assert left_in(copied) == {"tokenizer.json", "tokenizer_config.json"}
    assert not any(path.is_symlink() or not path.stat().st_mode & 0o200 for path in copied.iterdir())
    (inputs[1] / "blob").unlink()
    seal(inputs[1])
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link to \.\./blob, which does not exist; download"):
        merge(inputs, tmp_path / "other")
    assert "other" not in left_in(tmp_path)
