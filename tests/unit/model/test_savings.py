"""What a step leaves out changes no number: the variants that `benchmarks.step` compares, on a small model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_cases import (
    BASELINE,
    OURS,
    Variant,
    ablations,
    build,
    build_batch,
    count_pairs,
    draw_documents,
    loss_of,
    model_config,
    needed_flops,
    step,
    with_experts_apart,
)
from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention import dense
from tests.reference_model import random_weights, to_megatron
from tests.unit.model.attention.eager_kernel import Functions

pytestmark = pytest.mark.usefixtures("one_rank")

SMALL = dict(num_layers=2, hidden_size=32, kv_channels=8, num_attention_heads=4, ffn_hidden_size=48, vocab_size=64)
EXPERTS = dict(
    num_moe_experts=8,
    moe_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=16,
    moe_router_topk=2,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
)
DOCUMENTS = (21, 3, 12)


def _loss_and_gradients(model: ModelConfig, variant: Variant, block: int, views: int) -> dict[str, Tensor]:
    built = build(model, variant, ParallelConfig())
    weights = with_experts_apart(to_megatron(model, random_weights(model)))
    assert not [name for name in built.load_state_dict(weights, strict=False).missing_keys if "extra_state" not in name]
    documents = draw_documents(DOCUMENTS, block, views, model.vocab_size)
    loss = loss_of(built, build_batch(documents, variant, model.mask_token_id), variant)
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in built.named_parameters()}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("block", [4, 64])
def test_every_saving_leaves_loss_and_gradients_as_they_are(block: int, views: int) -> None:
    model = model_config("moe", **SMALL, **EXPERTS)
    expected = with_experts_apart(_loss_and_gradients(model, BASELINE, block, views))
    variants = ablations(views, is_moe=True)
    assert variants["ours"] == OURS
    for name, variant in variants.items():
        for key, got in _loss_and_gradients(model, variant, block, views).items():
            want = expected[key]
            assert float((got - want).norm()) <= 1e-5 * float(want.norm()) + 1e-9, (name, key)


@pytest.mark.parametrize("views", [1, 2])
def test_needed_operations_are_those_of_the_matrix_products_and_the_visible_pairs(views: int) -> None:
    model = model_config("attention", **SMALL)
    batch = build_batch(draw_documents(DOCUMENTS, 4, views, model.vocab_size), OURS, model.mask_token_id)
    built = build(model, OURS, ParallelConfig(), has_attention=False)
    with FlopCounterMode(display=False) as products:
        loss_of(built, batch, OURS)
    mask = visible(batch.roles, batch.roles)
    pairs, last_pairs = int(mask.sum()), int(mask.sum(-1).flatten()[batch.target_positions].sum())
    assert count_pairs(batch) == pairs
    # Two products of d multiplications and additions per pair and head; the backward pass does twice the forward's.
    attention = 4 * (pairs + last_pairs) * model.num_attention_heads * model.kv_channels
    assert needed_flops(model, batch) == 3 * (products.get_total_flops() + attention)


def test_a_measured_step_makes_its_mask() -> None:
    model, made = model_config("attention", **SMALL), []
    counting = Functions("dense", lambda *roles: made.append(1) or dense.build_plan(*roles), dense.attend)
    batch = build_batch(draw_documents(DOCUMENTS, 4, 1, model.vocab_size), BASELINE, model.mask_token_id)
    built = build(model, BASELINE, ParallelConfig())
    built.attention = replace(built.attention, backend=counting)
    run = step(built, batch, BASELINE)
    assert float(run()) == float(run()) and len(made) == 2
