"""Recipes: every one composes and validates; a typo ends in one sentence that names the nearest key."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron_dllm.compose import RECIPES, compose_train_config, prepare_command_line, schema_keys
from megatron_dllm.config import TrainConfig

EXPERIMENTS = sorted(path.stem for path in (RECIPES / "experiment").glob("*.yaml"))
# Their model is that of the checkpoint they start from.
FROM_CHECKPOINT = ("cap", "convert", "dpo", "sft")
PREFERENCES = ["checkpoint.load=sft", "preference.reference=frozen"]
RANKS = {
    "llada2_mini": 8,
    "llada2_mini_32k": 64,
    "llada2_mini_64k": 64,
    "llada2_mini_128k": 64,
    "llada2_flash": 512,
    "qwen3_30b_a3b": 16,
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_validates(name: str) -> None:
    model = ["model=tiny_moe"] if name in FROM_CHECKPOINT else []
    model += PREFERENCES if "dpo" in name else []
    config = compose_train_config(
        [f"experiment={name}", "data.train=corpus", "data.validation=held_out", "run.name=test", *model]
    )
    config.validate(RANKS.get(name, 2))


@pytest.mark.parametrize(("name", "parameters"), [("ling_mini", 16_255_638_528), ("ling_flash", 102_889_697_280)])
def test_real_models_have_the_published_sizes(name: str, parameters: int) -> None:
    """Counted from the configuration by hand; the numbers are those of the published safetensors headers."""
    m = compose_train_config([f"model={name}", "run.name=x", "data.train=x"]).model
    attention = m.hidden_size * m.kv_channels * (2 * m.num_attention_heads + 2 * m.num_query_groups) + 2 * m.kv_channels
    dense = 3 * m.hidden_size * m.ffn_hidden_size
    moe = 3 * m.hidden_size * (m.num_moe_experts * m.moe_ffn_hidden_size + m.moe_shared_expert_intermediate_size)
    router = m.num_moe_experts * m.hidden_size
    layers = m.num_layers * (attention + 2 * m.hidden_size) + m.num_dense_layers * dense
    layers += (m.num_layers - m.num_dense_layers) * (moe + router)
    assert layers + 2 * m.vocab_size * m.hidden_size + m.hidden_size == parameters


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.num_layer=3", "model.num_layers"),
        ("modle.num_layers=3", "model.num_layers"),
        ("schedule.stages.stable.block_sise=3", "block_size"),
        ("optimizer.weigth_decay=0", "optimizer.weight_decay"),
        ("experiment=tiny_convrt", "tiny_convert"),
        ("model=ling_min", "ling_mini"),
        ("shedule=tiny_wsd", "schedule"),
    ],
)
def test_a_typo_names_the_nearest_key(override: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean .*{re.escape(nearest)}"):
        compose_train_config(["run.name=x", override])


def test_the_keys_of_a_part_that_may_be_null_are_known() -> None:
    assert "schedule.stages.*.parallel.precision" in schema_keys(TrainConfig)


def test_a_value_of_a_wrong_type_says_which_and_why() -> None:
    with pytest.raises(ValueError, match=r"model\.num_layers=abc.*Integer"):
        compose_train_config(["run.name=x", "model.num_layers=abc"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"run: [1\nb: : 2\n", r"is not YAML.*experiment/mine.yaml\", line 2"),
        (b"\xff", "is not YAML.*0xff"),
        (b"run:\n  seed: 1\n", "recipe experiment/mine puts its values under experiment.*# @package _global_"),
        (b"just words\n", "recipe experiment/mine puts its values under experiment"),
    ],
)
def test_a_recipe_that_hydra_cannot_use_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    shutil.copytree(RECIPES, tmp_path / "recipes")
    (tmp_path / "recipes" / "experiment" / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        compose_train_config(["experiment=mine"], recipes=tmp_path / "recipes")
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"run\.name is required"):
        compose_train_config(["data.train=x"])


def test_the_command_line_is_checked_before_hydra_runs() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        prepare_command_line(["experiment=tiny_convert", "model.num_layer=3"])
    assert prepare_command_line(["--config-name", "own", "anything=1"]) == ["--config-name", "own", "anything=1"]


BAD_WORDS = [
    ("=", "is not a setting"),
    ("x", "is not a setting"),
    ("run.name", "is not a setting"),
    ("", "is not a setting"),
    ("  ", "is not a setting"),
    ("\n", "is not a setting"),
    ("\u00e9=1", "is not a setting"),
    ("run.n\u00e4me=x", "is not a setting"),
    ("run .name=x", "is not a setting"),
    ("run.name =x", "is not a setting"),
    (" run.name=x", "is not a setting"),
    (".run.name=x", "is not a setting"),
    ("run.name.=x", "is not a setting"),
    ("run..name=x", "cannot be read"),
    ("~run.name", "does not support deletion"),
    ("+run.x=1", "run.x is not a key"),
    ("++run.x=1", "run.x is not a key"),
    ("+optimizer.wieght_decay=0", "did you mean optimizer.weight_decay"),
    ("+modle.num_layers=3", "did you mean model.num_layers"),
    ("experiment=", "is not a recipe"),
    ("experiment=null", "is not a recipe"),
    ("experiment=[tiny_base,b]", "experiment/b"),
    ("experiment=../x", "is not a recipe"),
    ("experiment=/etc/passwd", "is not a recipe"),
    ("experiment=tiny base", "is not a recipe"),
    ("model=", "is not a recipe"),
    ("model=tiny_moe,ling_mini", "Ambiguous value"),
    ("data=nothing", "is not a recipe"),
    ("run=5", "run=5"),
    ("run=null", "run=null"),
    ("run=abc", "run=abc"),
    ("run.name.x=1", "run.name.x=1"),
    ("schedule.stages=5", "schedule.stages=5"),
    ("schedule.stages=[]", "schedule.stages=\\[\\]"),
    ("schedule.stages=null", "schedule.stages=null"),
    ("+schedule.stages.x=5", "schedule.stages.x=5"),
    ("evaluation.block_sizes=32", "evaluation.block_sizes=32"),
    ("evaluation.block_sizes=[a]", "could not be converted to Integer"),
    ("evaluation.block_sizes=[3.5]", "could not be converted to Integer"),
    ("evaluation.block_sizes=[null]", "evaluation.block_sizes"),
    ("model.num_layers=[1,2", "cannot be read"),
    ("model.num_layers={a:1", "cannot be read"),
    ("model.num_layers=1,2", "Ambiguous value"),
    ("model.num_layers=0x10", "could not be converted to Integer"),
    ("model.num_layers=1e400", "could not be converted to Integer"),
    ("model.num_layers=1e-3", "could not be converted to Integer"),
    ("model.num_layers=1.5", "could not be converted to Integer"),
    ("model.num_layers=\uff11\uff12", "cannot be read"),
    ("model.num_layers=${oc.env:HOME}", "model.num_layers cannot be resolved"),
    ("model.num_layers=${nope}", "model.num_layers cannot be resolved"),
    ("model.num_layers=${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
    ("model.num_layers=${x", "cannot be read"),
    ("model.hidden_size=${model.hidden_size}", "model.hidden_size cannot be resolved"),
    ("run.name=${run.name}", "run.name cannot be resolved"),
    ("run.root=${foo:1}", "run.root cannot be resolved"),
    ("run.name='\\'", "cannot be read"),
    ("optimizer.weight_decay=0,1", "Ambiguous value"),
    ("optimizer.weight_decay=1e", "could not be converted to Float"),
    ("optimizer.weight_decay=0.1.2", "could not be converted to Float"),
    ("checkpoint.resume=maybe", "true or false"),
    ("checkpoint.resume=2", "true or false"),
    ("checkpoint.resume=-1", "true or false"),
    ("checkpoint.resume=null", "checkpoint.resume"),
    ("data.train=???", "data.train is required"),
    ("cluster=laptop", "cluster is not a key"),
]


@pytest.mark.ranks  # most of them compose all recipes
@pytest.mark.parametrize(("word", "says"), BAD_WORDS, ids=[repr(word) for word, _ in BAD_WORDS])
def test_a_word_that_cannot_be_read_ends_in_one_sentence(word: str, says: str) -> None:
    words = [] if word.startswith("experiment") else ["experiment=tiny_base"]
    words += [text for text in ("data.train=a", "run.name=x") if text.partition("=")[0] != word.partition("=")[0]]
    with pytest.raises(ValueError, match=says) as caught:
        compose_train_config([*words, word])
    assert "\n" not in str(caught.value) and "hydra.cc" not in str(caught.value)
