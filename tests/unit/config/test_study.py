"""What a study refuses, and the grid it makes of its settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config.study import StudyConfig
from tests.unit.config.configs import refusal_of

RIGHT = StudyConfig(checkpoint=["runs/x"])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(checkpoint=[]), ("checkpoint (not given)", "name an HF or a run folder")),
        (dict(rules=[]), ("rules ([])", "name one or more")),
        (dict(rules=["best"]), ("rules (best)", "threshold, factor, hierarchy, entropy_bound, credit")),
        (dict(rules=["factor"], factors=[]), ("factors ([])", "rule factor needs a value")),
        (dict(thresholds=[0.9, 1.5]), ("threshold (1.5)", "(0, 1]")),
        (dict(tasks=["sort"], chats_file="x"), ("tasks (['sort']) and chats_file (x)", "give one of them")),
        (dict(output="a/study.png"), ("output (a/study.png)", "name the .json file")),
        (dict(num_questions=0), ("num_questions (0)", "positive")),
        (dict(block_sizes=[8, 0]), ("block_sizes (0)", "positive")),
        (dict(max_new_tokens=0), ("max_new_tokens (0)", "positive")),
        (dict(batch_size=0), ("batch_size (0)", "positive")),
        (dict(context_parallel_size=2), ("context_parallel_size (2)", "use tensor_model_parallel_size")),
        (dict(num_fewshot=-1), ("num_fewshot (-1)", "give 0 or more")),
        (dict(precision="fp8"), ("precision (fp8)", "fp32, bf16")),
    ],
)
def test_a_study_is_checked(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    RIGHT.validate()
    message = refusal_of(replace(RIGHT, **changes).validate)
    for part in parts:
        assert part in message


def test_each_rule_is_tried_with_every_value_of_its_own_setting() -> None:
    config = replace(RIGHT, rules=["factor", "hierarchy"], factors=[1.0], thresholds=[0.7, 0.9], max_new_tokens=9)
    found = [(one.rule, one.factor, one.threshold, one.max_new_tokens) for one in config.settings()]
    assert found == [("factor", 1.0, 0.95, 9), ("hierarchy", 1.0, 0.7, 9), ("hierarchy", 1.0, 0.9, 9)]


def test_the_placement_holds_for_every_checkpoint() -> None:
    config = replace(RIGHT, tokenizer="t", context_length=64, tensor_model_parallel_size=2, batch_size=3)
    source = config.source("runs/y")
    found = (source.checkpoint, source.tokenizer, source.context_length, source.tensor_model_parallel_size)
    assert found == ("runs/y", "t", 64, 2) and source.batch_size == 3
