"""The model against the plain-PyTorch reference, and the promise that nothing leaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dllm.config import ModelConfig, ParallelConfig, RotaryScalingConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.roles import BLOCK, CLEAN_VIEW, DOC, VIEW, visible
from tests.reference_model import expected_logits, random_weights, tiny_model, to_megatron
from tests.tiny_batch import tiny_batch

pytestmark = pytest.mark.usefixtures("one_rank")

ROWS = [[17, 9], [24]]
BATCHES = {
    "ar": dict(row_length=28, block_size=1, num_views=0),
    "block_diffusion": dict(row_length=56, block_size=4),
    "mdlm": dict(row_length=28, block_size=64, has_clean=False),
    "complementary": dict(row_length=80, block_size=4, num_views=2),
}


def _build(model: ModelConfig, weights: dict[str, Tensor], recompute: str = "none", **overrides: Any) -> Any:
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    built = build_model(model, ParallelConfig(recompute=recompute), Groups.current(), **overrides)
    missing, unexpected = built.load_state_dict(to_megatron(model, weights), strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing)
    return built


def _expected_loss(model: ModelConfig, weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    mask = visible(batch.roles, batch.roles)
    logits = expected_logits(model, weights, batch.input_ids, batch.position_ids, mask).flatten(0, 1)
    chosen = logits[batch.target_positions]
    return F.cross_entropy(chosen, batch.target_ids, reduction="none"), chosen.argmax(-1) == batch.target_ids


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"rotary_percent": 1.0, "num_moe_experts": 0},
        {"rotary_scaling": RotaryScalingConfig(factor=4.0, original_max_position_embeddings=16)},
    ],
    ids=["ling", "tied", "dense_full_rotation", "stretched"],
)
def test_loss_and_gradients_equal_the_reference(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    batch = tiny_batch(model, ROWS, **BATCHES[kind])
    weights = {name: value.requires_grad_() for name, value in random_weights(model).items()}
    built = _build(model, weights)
    outputs = built(batch)
    nll, is_correct = outputs.nll, outputs.is_correct
    expected_nll, expected_correct = _expected_loss(model, weights, batch)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(is_correct, expected_correct)

    (nll * batch.loss_weights).sum().backward()
    parameters = dict(built.named_parameters())
    trained = {name: value for name, value in weights.items() if not name.endswith("expert_bias")}
    expected = torch.autograd.grad((expected_nll * batch.loss_weights).sum(), list(trained.values()))
    expected_gradients = dict.fromkeys(weights, torch.zeros(0)) | dict(zip(trained, expected, strict=True))
    for name in weights.keys() - trained.keys():
        expected_gradients[name] = torch.zeros_like(weights[name])
    for name, gradient in to_megatron(model, expected_gradients).items():
        if not name.endswith("expert_bias"):
            torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=2e-5 * gradient.abs().max())


def test_logits_equal_the_reference() -> None:
    model = tiny_model()
    weights, batch = random_weights(model), tiny_batch(model, ROWS, row_length=56, block_size=4)
    positions = torch.tensor([0, 5, 60, 100])
    built = _build(model, weights)
    logits = built.head_logits(built.states(batch.input_ids, batch.position_ids, batch.roles, positions))
    mask = visible(batch.roles, batch.roles)
    expected = expected_logits(model, weights, batch.input_ids, batch.position_ids, mask).flatten(0, 1)[positions]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(recompute: str) -> None:
    model = tiny_model()
    weights, batch = random_weights(model), tiny_batch(model, ROWS, row_length=56, block_size=4)
    gradients = []
    for setting in ("none", recompute):
        built = _build(model, weights, recompute=setting).train()
        nll = built(batch, mask_noise_sigma=0.3, noise_seed=5).nll
        nll.sum().backward()
        gradients.append((nll, {name: value.grad for name, value in built.named_parameters()}))
    (expected_nll, expected), (nll, got) = gradients
    assert torch.equal(nll, expected_nll)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_no_loss_sees_clean_tokens_of_its_block_or_later_or_of_other_documents() -> None:
    """d loss(block k) / d embedding is exactly 0 at every token that block k must not see, and not 0 elsewhere."""
    model = tiny_model()
    batch = tiny_batch(model, [[16, 12]], row_length=56, block_size=4)
    built = _build(model, random_weights(model))
    seen: dict[str, Tensor] = {}

    def watch(_: Any, __: Any, output: Tensor) -> Tensor:
        seen["embeddings"] = output.detach().requires_grad_()
        return seen["embeddings"]

    built.embedding.register_forward_hook(watch)
    roles = batch.roles[0]
    for document, block in ((0, 0), (0, 2), (1, 1)):
        of_block = (roles == torch.tensor([document, block, 1])).all(-1)[batch.target_positions]
        assert of_block.any()
        nll = built(batch).nll
        (gradient,) = torch.autograd.grad(nll[of_block].sum(), seen["embeddings"])
        reached = gradient[:, 0].abs().amax(-1) > 0
        clean_before = (roles[:, VIEW] == CLEAN_VIEW) & (roles[:, BLOCK] < block)
        noisy_same = (roles[:, VIEW] == 1) & (roles[:, BLOCK] == block)
        expected_reached = (roles[:, DOC] == document) & (clean_before | noisy_same)
        assert torch.equal(reached, expected_reached)


def test_padding_does_not_change_the_loss() -> None:
    model = tiny_model()
    built = _build(model, random_weights(model))
    short, long = (tiny_batch(model, [[13]], row_length=length, block_size=4) for length in (26, 40))
    torch.testing.assert_close(built(short).nll, built(long).nll, rtol=1e-6, atol=1e-6)


def test_a_batch_without_targets_has_gradients_of_zero() -> None:
    model = tiny_model()
    built = _build(model, random_weights(model))
    batch = tiny_batch(model, [[13]], row_length=26, block_size=4, mask_ratio=0.0)
    outputs = built(batch)
    assert outputs.nll.shape == outputs.is_correct.shape == (0,)
    outputs.nll.sum().backward()
    assert all(value.grad is not None and not value.grad.any() for value in built.parameters())


def test_noise_touches_masked_tokens_while_training_only() -> None:
    model = tiny_model()
    built = _build(model, random_weights(model)).train()
    batch = tiny_batch(model, ROWS, row_length=56, block_size=4)
    clean = built._embed(batch, 0.0, 1)
    noisy = built._embed(batch, 0.5, 1)
    is_changed = (noisy != clean).any(-1).t()
    assert torch.equal(is_changed, batch.is_masked)
    assert not torch.equal(noisy, built._embed(batch, 0.5, 2))
    assert not torch.equal(noisy, built._embed(replace(batch, row_keys=batch.row_keys + 1), 0.5, 1))
    assert torch.equal(clean, built.eval()._embed(batch, 0.5, 1))


def test_bf16_keeps_expert_bias_in_fp32() -> None:
    from megatron.core.transformer.module import Float16Module

    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    model = tiny_model()
    built = build_model(model, ParallelConfig(precision="bf16"), Groups.current())
    wrapped = Float16Module(built.config, built)
    weights = random_weights(model)
    wrapped.load_state_dict(to_megatron(model, weights), strict=False)
    batch = tiny_batch(model, ROWS, row_length=56, block_size=4)
    nll = wrapped(batch).nll
    nll.sum().backward()
    assert nll.dtype == torch.float32
    expected_nll, _ = _expected_loss(model, weights, batch)
    assert abs(nll.mean() - expected_nll.mean()) < 0.1
    assert {p.dtype for p in wrapped.parameters()} == {torch.bfloat16}
    bias = built.decoder.layers[1].mlp.router.expert_bias
    assert torch.equal(bias, weights["model.layers.1.mlp.gate.expert_bias"])
