"""Texts of a command line stay as they were typed, and whole numbers may be written with an exponent."""

from __future__ import annotations

import pytest

from megatron_dllm.compose import compose_dict, compose_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.command_line import type_of_key, typed_word

TEXTS = r"""8e12345 1e999 3e5 2024_01 1_000 1.50 true 007 v1.0 inf nan off ~ /data/a,b step=100 c#d (x) x[1] y{2} am&p
ex!c jörg ~/corpus it's a\'b tail\ tail\\' ' " @ - * % `x` $x [a,b] {a:1} a:b e@f \ \\ 日本 ,a, a; <b> |c ?d ^e"""
SPACED = ["my data", " leading", "trailing ", "a\tb", 'it\'s "both"', "'open", '"open']


@pytest.mark.parametrize("text", [*TEXTS.split(), *SPACED])
def test_a_text_stays_as_it_was_typed(text: str) -> None:
    assert compose_train_config([f"data.train={text}", "run.name=x"]).data.train == text


@pytest.mark.parametrize("word", ["data.train='a b'", 'data.train="a b"'])
def test_a_value_that_was_quoted_for_hydra_is_not_quoted_again(word: str) -> None:
    assert compose_train_config([word, "run.name=x"]).data.train == "a b"


def test_null_is_null_and_choices_are_choices() -> None:
    config = compose_train_config(["data.validation=null", "model=ling_mini", "run.name=x", "data.train=x"])
    assert config.data.validation is None and config.model.num_layers == 20


@pytest.mark.parametrize(
    ("typed", "tokens"), [("1e9", 10**9), ("2_000_000", 2_000_000), ("1.5e6", 1_500_000), ("1E3", 1000), ("1e+3", 1000)]
)
def test_whole_numbers_as_people_write_them(typed: str, tokens: int) -> None:
    config = compose_train_config(
        [f"schedule.stages.warmup_1.num_tokens={typed}", "schedule=tiny_wsd", "run.name=x", "data.train=x"]
    )
    assert config.schedule.stages["warmup_1"].num_tokens == tokens


@pytest.mark.parametrize("typed", ["1.5e0", "1e-3", "1e", "e9", "1.25e1"])
def test_what_is_no_whole_number_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match=r"run\.seed"):
        compose_train_config([f"run.seed={typed}", "run.name=x", "data.train=x"])


def test_fractions_and_lists_keep_hydras_grammar() -> None:
    words = ["optimizer.adam_eps=1e-8", "evaluation.block_sizes=[4,32]", "run.name=x", "data.train=x"]
    config = compose_train_config(words)
    assert config.optimizer.adam_eps == 1e-8 and config.evaluation.block_sizes == [4, 32]


def test_a_sweep_keeps_its_commas() -> None:
    assert typed_word(TrainConfig, "run.name=a,b", is_sweep=True) == "run.name=a,b"
    assert typed_word(TrainConfig, "run.name=2024_01", is_sweep=True) == "run.name='2024_01'"


def test_the_type_of_a_key() -> None:
    assert type_of_key(TrainConfig, "schedule.stages.any.num_tokens") is int
    assert type_of_key(TrainConfig, "schedule.stages.any.parallel.precision") is str
    assert type_of_key(TrainConfig, "data.tokenizer") is str
    assert type_of_key(TrainConfig, "experiment") is None and type_of_key(TrainConfig, "run.nmae") is None


def test_an_unknown_key_is_still_explained() -> None:
    with pytest.raises(ValueError, match=r"did you mean data\.train"):
        compose_dict(["data.trian=/a"])


@pytest.mark.parametrize("value", ["parallel.precision=fp32", "parallel={precision: fp32}"])
def test_a_value_inside_a_group_that_is_null_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"schedule\.stages\.warmup_1\.parallel \(null\) has no values .* in a recipe"):
        compose_train_config(["experiment=tiny_convert", "run.name=x", f"schedule.stages.warmup_1.{value}"])


NEW = "block_size: 8, num_tokens: 1e6, global_batch_size: 4, learning_rate: 1e-4"


def _stages(*words: str) -> dict[str, tuple[int, int, float]]:
    config = compose_train_config(["run.name=x", "data.train=x", "schedule=study_wsd", *words])
    return {name: (s.block_size, s.num_tokens, s.learning_rate) for name, s in config.schedule.stages.items()}


def test_a_stage_is_added_behind_the_others() -> None:
    before = _stages()
    assert list(_stages(f"+schedule.stages.extra={{{NEW}}}").items()) == [*before.items(), ("extra", (8, 10**6, 1e-4))]
    one_by_one = [f"+schedule.stages.extra.{word.replace(': ', '=')}" for word in NEW.split(", ")]
    assert _stages(*one_by_one) == {**before, "extra": (8, 10**6, 1e-4)}
    assert _stages(f"++schedule.stages={{a: {{{NEW}}}, b: {{{NEW}}}}}").keys() == {*before, "a", "b"}


def test_a_stage_is_changed_and_removed_and_put_back_at_the_end() -> None:
    longer, back = "schedule.stages.decay_32.num_tokens=7e3", f"+schedule.stages.stable={{{NEW}}}"
    found = _stages("~schedule.stages.stable", longer, back)
    assert list(found)[-2:] == ["decay_32", "stable"] and found["decay_32"][1] == 7000


def test_a_layout_of_a_stage_is_added_where_there_was_none() -> None:
    config = compose_train_config(
        ["run.name=x", "data.train=x", "+schedule.stages.stable.parallel.expert_model_parallel_size=2"]
    )
    layout = config.schedule.stages["stable"].parallel
    assert layout is not None and (layout.expert_model_parallel_size, layout.precision) == (2, "fp32")


@pytest.mark.parametrize("word", [f"schedule.stages.extra={{{NEW}}}", "schedule.stages.extra.num_tokens=5"])
def test_a_stage_that_is_not_there_says_how_to_add_it(word: str) -> None:
    with pytest.raises(ValueError, match=r"stages has no extra; \+schedule\.stages\.extra=\{\.{3}\} adds one"):
        _stages(word)
