"""An evaluation asks for a checkpoint and a corpus; the rest is the checkpoint's, or what the user states beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.synthetic import write_synthetic
from megatron_dllm.checkpoint.meta import Semantics, read_meta, write_meta
from megatron_dllm.config import RotaryScalingConfig
from megatron_dllm.evaluate import compose_words
from megatron_dllm.evaluation.request import Request, open_target, read_request
from tests.tiny_models import LING, MODELS, seal

YARN = RotaryScalingConfig(factor=2.0, original_max_position_embeddings=64)


def read(load: Path, *words: str, world_size: int = 1) -> Request:
    return read_request(compose_words([f"checkpoint.load={load}", "data.validation=held_out", *words]), world_size)


@pytest.fixture
def diffusion(checkpoint: Path) -> Path:
    """A checkpoint of a run that trained blocks of 4, counted from the row."""
    meta = read_meta(checkpoint)
    semantics = Semantics(block_origin="row", mask_token_id=2, context_length=16, shift=False, block_size=4)
    layout = {"precision": "bf16"}
    write_meta(
        checkpoint, replace(meta, semantics=semantics, provenance=replace(meta.provenance, layout=layout, world_size=1))
    )
    seal(checkpoint)
    return checkpoint


def test_a_checkpoint_says_all_that_is_left_open(diffusion: Path) -> None:
    request = read(diffusion)
    config = request.config
    assert (request.names, request.weights.is_hf, config.model) == (("4",), False, LING)
    assert (config.schedule.context_length, config.data.block_origin, config.parallel.precision) == (16, "row", "bf16")
    assert config.evaluation.num_tokens == 2_000_000 and config.output is None


def test_a_recipe_of_training_gives_its_layout_and_evaluation_alone(diffusion: Path) -> None:
    request = read(diffusion, "experiment=tiny_convert", "evaluation.block_sizes=[8,16]", "schedule.context_length=32")
    assert request.config.model == LING
    assert request.config.evaluation.num_tokens == 12000
    assert (request.names, request.config.schedule.context_length) == (("8", "16"), 32)


def test_the_common_keys_have_short_names(diffusion: Path) -> None:
    composed = compose_words([f"checkpoint={diffusion}", "data.validation=held_out", "block_sizes=[4,8]"])
    assert composed.checkpoint.load == str(diffusion)
    assert read_request(composed, 1).names == ("4", "8")


def test_an_autoregressive_model_is_measured_exactly(checkpoint: Path, hf: Path) -> None:
    assert read(checkpoint).names == read(hf).names == ("ar",)
    assert read(hf).weights.is_hf and not read(checkpoint).weights.is_hf


@pytest.mark.parametrize(("family", "block_size"), [("llada2_moe", 32), ("sdar_moe", 4)])
def test_an_exported_folder(family: str, block_size: int, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", MODELS[family])
    request = read(tmp_path / "hf")
    assert request.names == (str(block_size),)
    assert request.config.schedule.context_length == LING.max_position_embeddings
    assert request.config.model.family == family and request.config.parallel.precision == "fp32"


def test_any_number_of_ranks_that_the_layout_can_use(diffusion: Path) -> None:
    for world_size in (1, 2, 3, 5):
        read(diffusion, "evaluation.micro_batch_size=3", world_size=world_size)
    words = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    read(diffusion, *words, world_size=4)
    with pytest.raises(ValueError, match=r"must divide the number of ranks \(3\)"):
        read(diffusion, *words, world_size=3)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.num_layers=5", r"model\.num_layers \(5\) differs from the checkpoint .* \(3\); leave it out"),
        ("model=ling_mini", r"model\.num_layers \(20\) differs"),
        ("data.block_origin=document", r"data\.block_origin \(document\) differs from that of the diffusion weights"),
        ("evaluation.block_sizes=[3]", r"evaluation\.block_sizes \(3\) must divide context_length \(16\)"),
        ("evaluation.block_sizes=[]", r"block_sizes \(\[\]\) must name at least"),
        ("evaluation.num_tokens=0", r"evaluation\.num_tokens \(0\) measures nothing"),
        ("evaluation.num_tokens=-4", r"evaluation\.num_tokens \(-4\) must not be negative"),
        ("evaluation.micro_batch_size=0", r"evaluation\.micro_batch_size \(0\)"),
        ("schedule.context_length=128", r"context_length \(128\) must not exceed"),
        ("schedule.row_length=16", r"schedule\.row_length \(16\) must hold"),
        ("data.validation=null", r"data\.validation \(None\) must be set"),
        ("checkpoint.load=null", r"checkpoint\.load \(None\) and"),
        ("checkpoint.load=/nowhere", r"checkpoint\.load \(/nowhere\) is not a folder"),
        ("parallel.precision=fp64", "fp64"),
        ("evaluation.block_size=4", r"evaluation\.block_size is not a key .*evaluation\.block_sizes"),
        ("overwrite=maybe", "maybe"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(diffusion: Path, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(diffusion, word)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        read(tmp_path / "empty")
    folder = make_checkpoint("cut", 0)
    (folder / "contract.json").write_text("{")
    with pytest.raises(ValueError, match=r"contract\.json"):
        read(folder)


def test_other_angles_are_measured_where_that_is_said_and_written_elsewhere(diffusion: Path) -> None:
    words = ["model.rotary_scaling={kind: yarn, factor: 2, original_max_position_embeddings: 64}"]
    longer = ["schedule.context_length=128", "model.max_position_embeddings=128"]
    with pytest.raises(ValueError, match=r"model.rotary_scaling \(RotaryScaling.*\) differs from the checkpoint"):
        read(diffusion, *words)
    with pytest.raises(ValueError, match=r"context_length \(128\) must not exceed .* \(64\); .*model.rotary_scaling"):
        read(diffusion, longer[0])
    words += [*longer, "checkpoint.change_rotary=true"]
    request = read(diffusion, *words)
    assert request.config.model == replace(LING, max_position_embeddings=128, rotary_scaling=YARN)
    assert request.weights.model == LING
    with pytest.raises(ValueError, match=r"output \(null\) must name a file with checkpoint.change_rotary"):
        open_target(request, "validation.json", str)
    other = diffusion.parent / "other.json"
    assert open_target(read(diffusion, *words, f"output={other}"), "validation.json", str) == other
