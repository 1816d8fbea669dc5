"""Tables of learning rates: which factor is whose, and what is refused before a run starts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import OptimizerConfig
from megatron_dllm.config.rates import rate_factor
from megatron_dllm.training.rate_rules import check_rates, parameter_names
from tests.unit.config.configs import model_config, stage_config, train_config

ROUTER = "decoder.layers.3.mlp.router.weight"


def test_the_last_glob_that_matches_counts() -> None:
    table = {"*": 0.5, "*.router.*": 0.0, "decoder.layers.3.*": 2.0}
    assert rate_factor(ROUTER, table) == 2.0
    assert rate_factor(ROUTER.replace("3", "4"), table) == 0.0
    assert rate_factor("output_layer.weight", table) == 0.5
    assert rate_factor(ROUTER, {}) == 1.0


def test_a_table_is_read_from_the_command_line_and_joins_that_of_a_recipe() -> None:
    words = ["run.name=x", "optimizer.lr_multipliers={*.mlp.*: 0.1, *.router.*: 0.0}"]
    assert compose_train_config(words).optimizer.lr_multipliers == {"*.mlp.*": 0.1, "*.router.*": 0.0}


def test_names_are_those_of_the_checkpoint() -> None:
    names = parameter_names(model_config())
    assert ROUTER in names and "decoder.layers.3.mlp.experts.experts.linear_fc1.weight" in names
    assert not any("expert_bias" in name for name in names)


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ({"*.rooter.*": 0.0}, ("(*.rooter.*) matches no parameter", "names are as")),
        ({"*": 0.1}, ("embedding.word_embeddings.weight the factor 0.1", "mask token", "behind the others")),
    ],
)
def test_what_cannot_be_meant_is_refused(table: dict[str, float], parts: tuple[str, ...]) -> None:
    config = train_config(optimizer=OptimizerConfig(lr_multipliers=table))
    with pytest.raises(ValueError) as refused:
        check_rates(config, knows_masks=False)
    for part in parts:
        assert part in str(refused.value)


def test_the_embedding_may_be_slowed_where_the_mask_token_is_known_or_not_used() -> None:
    config = train_config(optimizer=OptimizerConfig(lr_multipliers={"*": 0.1}))
    check_rates(config, knows_masks=True)
    ar = replace(config.schedule, stages={"one": stage_config(objective="ar")})
    check_rates(replace(config, schedule=ar), knows_masks=False)
    table = {"*": 0.1, "embedding.*": 1.0}
    check_rates(train_config(optimizer=OptimizerConfig(lr_multipliers=table)), knows_masks=False)
