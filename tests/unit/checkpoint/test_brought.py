"""model=checkpoint: the checkpoint that a run starts from brings its model and its tokenizer."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.chain import compose_chain
from megatron_dllm.checkpoint.manifest import write_manifest
from megatron_dllm.checkpoint.meta import Provenance, read_meta, write_meta
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import ModelConfig, RotaryScalingConfig, TrainConfig
from tests.unit.checkpoint.small_checkpoint import MODEL, make_checkpoint

LONG = replace(MODEL, max_position_embeddings=3000, family="qwen3_moe", rotary_base=1e6)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer, as the converter writes one."""
    folder = make_checkpoint(tmp_path / "made", 1).rename(tmp_path / "start")
    (folder / "tokenizer").mkdir()
    meta = replace(read_meta(folder), model=asdict(LONG), provenance=Provenance(tokenizer="tokenizer"))
    write_meta(folder, meta)
    write_manifest(folder, {})
    return folder


def _convert(load: Path | str, *words: str) -> TrainConfig:
    return compose_train_config(["experiment=convert", f"checkpoint.load={load}", "data.train=x", *words])


def test_a_conversion_takes_model_tokenizer_and_context_from_the_checkpoint(start: Path) -> None:
    config = _convert(start)
    assert config.model == LONG
    assert config.data.tokenizer == str(start / "tokenizer")
    assert config.schedule.context_length == 2048 and config.schedule.stages["stable"].block_size == 2048
    assert config.evaluation.num_tokens == 0
    assert config.training.mask_embedding_noise > 0
    config.validate(2)


def test_a_held_out_corpus_is_measured(start: Path) -> None:
    assert _convert(start, "data.validation=y").evaluation.num_tokens == 2_000_000
    assert _convert(start, "data.validation=y", "evaluation.num_tokens=5").evaluation.num_tokens == 5


def test_a_run_folder_brings_the_model_of_its_newest_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "run" / "checkpoints", 1)
    config = _convert(tmp_path / "run")
    assert config.model == MODEL and config.data.tokenizer is None


def test_what_is_stated_must_be_the_checkpoint_s(start: Path) -> None:
    assert _convert(start, "model.num_layers=2").model == LONG
    with pytest.raises(ValueError, match=r"model\.num_layers \(3\) differs from .*start \(2\).*leave it out"):
        _convert(start, "model.num_layers=3")
    with pytest.raises(ValueError, match=r"model\.eos_token_id \(5\) differs from the checkpoint .* \(0\)"):
        _convert(start, "model.eos_token_id=5")


@pytest.mark.parametrize("load", ["null", "nowhere"])
def test_without_a_checkpoint_the_sentence_says_what_to_give(load: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\.load \({load}\) must .*choose a model recipe"):
        _convert(load)


def test_a_hugging_face_folder_is_to_be_converted_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"convert this Hugging Face folder first: .*hf_to_mcore --hf"):
        _convert(tmp_path)


def test_a_run_goes_on_where_its_start_checkpoint_is_gone(start: Path, tmp_path: Path) -> None:
    words = (f"run.root={tmp_path}", "run.name=mine")
    make_checkpoint(tmp_path / "mine" / "checkpoints", 3)
    assert _convert(start, *words).model == LONG
    shutil.rmtree(start)
    assert _convert(start, *words).model == MODEL


def test_a_recipe_with_sizes_reads_no_checkpoint_and_has_defaults_for_the_rest() -> None:
    config = compose_train_config(["model=ling_mini", "checkpoint.load=nowhere", "run.name=x", "data.train=x"])
    assert config.model.num_layers == 20
    assert config.model.init_method_std == ModelConfig().init_method_std
    with pytest.raises(ValueError, match=r"model\.hidden_size is required and has no value"):
        compose_train_config(["model=checkpoint", "model.num_layers=2", "run.name=x", "data.train=x"])


def test_the_launcher_freezes_the_model_that_the_checkpoint_brings(start: Path, tmp_path: Path) -> None:
    words = ["experiment=convert", f"checkpoint.load={start}", "data.train=x"]
    (job,) = compose_chain(words).jobs
    assert job.config == _convert(start)
    (tmp_path / "config.yaml").write_text(job.config_text)
    shutil.rmtree(start)
    assert compose_train_config([], "config", tmp_path) == job.config


def test_what_an_older_checkpoint_does_not_say_has_its_default(start: Path) -> None:
    table = {name: value for name, value in asdict(LONG).items() if name != "init_method_std"}
    write_meta(start, replace(read_meta(start), model=table))
    assert _convert(start).model == LONG


SCALING = "model.rotary_scaling={kind: yarn, factor: 4, original_max_position_embeddings: 3000}"


def test_a_longer_context_changes_the_angles_that_the_checkpoint_brings(start: Path) -> None:
    longer = "model.max_position_embeddings=12000"
    with pytest.raises(ValueError, match=r"model\.max_position_embeddings \(12000\) differs"):
        _convert(start, longer)
    with pytest.raises(ValueError, match=r"model\.rotary_scaling \(RotaryScaling.*\) differs from .* \(None\)"):
        _convert(start, SCALING)
    scaling = RotaryScalingConfig(factor=4.0, original_max_position_embeddings=3000)
    config = _convert(start, longer, SCALING, "checkpoint.change_rotary=true")
    assert config.model == replace(LONG, max_position_embeddings=12000, rotary_scaling=scaling)
    config.validate(2)


def test_a_stretched_checkpoint_brings_its_scaling(start: Path) -> None:
    stretched = replace(LONG, rotary_scaling=RotaryScalingConfig("llama3", 2.0, 1500))
    write_meta(start, replace(read_meta(start), model=asdict(stretched)))
    assert _convert(start).model == stretched
    table = asdict(stretched) | {"rotary_scaling": {"kind": "yarn", "speed": 3}}
    write_meta(start, replace(read_meta(start), model=table))
    with pytest.raises(ValueError, match=r"model\.rotary_scaling\.speed is not known to this version"):
        _convert(start)
