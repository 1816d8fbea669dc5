"""The last layer without the outputs that nobody reads, against all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dllm.data.batch import Batch
from tests.reference_model import random_weights, tiny_model, to_megatron
from tests.tiny_batch import tiny_batch
from tests.unit.model.attention.eager_kernel import small_backends

pytestmark = pytest.mark.usefixtures("one_rank")

BATCHES: dict[str, dict[str, Any]] = {
    "two rows": dict(rows=[[17, 9], [24]], row_length=56, block_size=4),
    "one row": dict(rows=[[17, 9]], row_length=56, block_size=8),
    "two views": dict(rows=[[17, 9], [24]], row_length=80, block_size=4, num_views=2),
    "mdlm": dict(rows=[[17, 9], [24]], row_length=28, block_size=64, has_clean=False),
    "ar": dict(rows=[[17, 9], [24]], row_length=28, block_size=1, num_views=0),
    "no target": dict(rows=[[13]], row_length=26, block_size=4, mask_ratio=0.0),
}


def _build(model: ModelConfig, parallel: ParallelConfig | None = None, training: TrainingConfig | None = None) -> Any:
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    built = build_model(model, parallel or ParallelConfig(), Groups.current(), training=training)
    built.load_state_dict(to_megatron(model, random_weights(model)), strict=False)
    return built.train()


def _with_gradients(built: Any, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    built.zero_grad()
    outputs = built(batch, mask_noise_sigma=0.3, noise_seed=5)
    (outputs.nll * batch.loss_weights).sum().backward()
    return [outputs.nll, outputs.is_correct], {name: value.grad.clone() for name, value in built.named_parameters()}


@pytest.mark.parametrize("backend", ["dense", "chunked", "shared_prefix", "flex"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", BATCHES)
def test_equals_the_whole_layer_with_gradients(kind: str, recompute: str, backend: str) -> None:
    model = tiny_model()
    batch = tiny_batch(model, **BATCHES[kind])
    built = _build(model, ParallelConfig(recompute=recompute))
    built.attention = replace(built.attention, backend=small_backends(tile_size=16)[backend])
    (nll, is_correct), got = _with_gradients(built, batch)
    whole = _build(model, training=TrainingConfig(skip_unused_outputs=False))
    assert not whole.skips_outputs
    (expected_nll, expected_correct), expected = _with_gradients(whole, batch)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(is_correct, expected_correct)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()) + 1e-12)


def test_only_kept_tokens_pass_through_the_last_layer() -> None:
    model = tiny_model()
    built, batch = _build(model), tiny_batch(model, **BATCHES["two rows"])
    sizes: dict[str, int] = {}
    parts = {
        "mlp": built.decoder.layers[-1].mlp,
        "norm": built.decoder.final_layernorm,
        "projection": built.decoder.layers[-1].self_attention.linear_proj,
        "earlier": built.decoder.layers[1].mlp,
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda _, inputs, __, name=name: sizes.update({name: inputs[0][..., 0].numel()}))
    built(batch)
    num_targets = len(batch.target_ids)
    assert sizes == dict(mlp=num_targets, norm=num_targets, projection=num_targets, earlier=2 * 56)


@pytest.mark.parametrize(
    "training,parallel,expected",
    [
        ({}, {}, True),
        ({"skip_unused_outputs": False}, {}, False),
        ({"moe_router_bias_update_rate": 1e-3}, {}, False),
        ({"moe_aux_loss_coeff": 1e-2}, {}, False),
        ({"moe_z_loss_coeff": 1e-3}, {}, False),
        ({}, {"expert_model_parallel_size": 2}, False),
        ({}, {"expert_model_parallel_size": 2, "moe_token_dispatcher": "alltoall"}, True),
        ({}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, True),
        (
            {},
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
            },
            True,
        ),
        ({}, {"context_parallel_size": 2}, True),
        ({}, {"context_parallel_size": 2, "context_parallel_method": "ulysses"}, False),
        ({}, {"pipeline_model_parallel_size": 2}, True),
    ],
)
def test_layouts_that_need_every_output_keep_it(training: dict, parallel: dict, expected: bool) -> None:
    from megatron_dllm.model.last_layer import can_skip_outputs
    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts

    model, layout, settings = tiny_model(), ParallelConfig(**parallel), TrainingConfig(**training)
    config = transformer_config(model, layout, choose_paths(model, layout, DeviceFacts.here()), settings)
    assert can_skip_outputs(model, config, settings) is expected


def test_a_model_without_a_router_may_leave_out_outputs_whatever_balances_one() -> None:
    from megatron_dllm.model.last_layer import can_skip_outputs
    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts

    model, layout = tiny_model(num_moe_experts=0), ParallelConfig(pipeline_model_parallel_size=2)
    training = TrainingConfig(moe_router_bias_update_rate=1e-3, moe_aux_loss_coeff=1e-2)
    config = transformer_config(model, layout, choose_paths(model, layout, DeviceFacts.here()), training)
    assert can_skip_outputs(model, config, training)


def test_rows_to_keep_are_filled_up_to_a_multiple() -> None:
    from megatron_dllm.model.last_layer import rows_to_keep

    # Two rows of five tokens: flat positions count along a row, hidden states across the rows.
    assert rows_to_keep(torch.tensor([0, 4, 5, 8]), 5, 2, 1).tolist() == [0, 8, 1, 7]
    assert rows_to_keep(torch.tensor([4, 5, 8]), 5, 2, 2).tolist() == [8, 1, 7, 0]
    assert rows_to_keep(torch.zeros(0, dtype=torch.int64), 5, 2, 2).tolist() == [0, 0]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_router_load_of_the_last_layer_counts_kept_tokens(recompute: str) -> None:
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.observers.router_load import RouterLoad

    model = tiny_model()
    built, batch = _build(model, ParallelConfig(recompute=recompute)), tiny_batch(model, **BATCHES["two rows"])
    load = RouterLoad([built], Groups.current().tensor, model.num_layers, model.num_moe_experts, recompute == "full")
    with load.counting():
        load.observe(batch)
        built(batch)
    totals = load.totals(torch.device("cpu")).sum(-1) / model.moe_router_topk
    masked, clean = float(batch.is_masked.sum()), 50.0
    assert totals.tolist() == [[0.0] * 3, [masked, 50.0 - masked, clean], [masked, 0.0, 0.0]]


@pytest.mark.parametrize(("precision", "expected"), [("bf16", (None, True)), ("fp8", ("e4m3", False))])
def test_products_in_fp8_want_every_token(precision: str, expected: tuple[str | None, bool]) -> None:
    from megatron_dllm.model.last_layer import can_skip_outputs
    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts

    model, layout = tiny_model(num_moe_experts=0), ParallelConfig(precision=precision)
    config = transformer_config(model, layout, choose_paths(model, layout, DeviceFacts.as_cuda()))
    assert (config.fp8, can_skip_outputs(model, config, TrainingConfig())) == expected
    assert config.bf16 and config.fp8_recipe == "blockwise"


def test_deepeps_kernels_get_every_token() -> None:
    from megatron_dllm.model.last_layer import can_skip_outputs
    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.paths import Choice, choose_paths
    from megatron_dllm.parallel.device import DeviceFacts

    model, layout = tiny_model(), ParallelConfig(precision="bf16", expert_model_parallel_size=2)
    flex = replace(layout, moe_token_dispatcher="flex", moe_flex_dispatcher_backend="hybridep")
    paths = choose_paths(model, layout, DeviceFacts.as_cuda(has_transformer_engine=False))
    plain = transformer_config(model, layout, paths)
    config = transformer_config(model, flex, replace(paths, dispatcher=Choice("flex", "asked for by name")))
    assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", "hybridep")
    assert can_skip_outputs(model, plain, TrainingConfig()) and not can_skip_outputs(model, config, TrainingConfig())
