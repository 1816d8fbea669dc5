"""Alignment behind the layers: the pairs, a loss of 0 without noise, and the gradients of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.alignment import AlignmentRule
from megatron_dllm.model.alignment import Alignment, LayerAlignment, find_pairs
from megatron_dllm.model.asked import Asked
from megatron_dllm.model.token_share import TokenShare
from tests.reference_model import random_weights, tiny_model, to_megatron
from tests.tiny_batch import tiny_batch

pytestmark = pytest.mark.usefixtures("one_rank")

WHOLE = TokenShare(tensor=None, context=None, is_counting=True)


def _batch(model: ModelConfig, mask_ratio: float = 0.5, block_size: int = 4) -> Batch:
    return tiny_batch(model, [[17, 9], [24]], row_length=80, block_size=block_size, num_views=2, mask_ratio=mask_ratio)


def _build(model: ModelConfig, recompute: str = "none") -> Any:
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    built = build_model(model, ParallelConfig(recompute=recompute), Groups.current())
    built.load_state_dict(to_megatron(model, random_weights(model)), strict=False)
    return built.train()


def _expected_pairs(batch: Batch, shift: bool) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Visible and masked pairs (noisy, clean) of flat tokens in [s * b], by a search over all tokens."""
    num_rows, length = batch.input_ids.shape
    targets = set(batch.target_positions.tolist())
    visible, masked = set(), set()
    for row in range(num_rows):
        docs, views = batch.roles[row, :, 0].tolist(), batch.roles[row, :, 2].tolist()
        places = batch.position_ids[row].tolist()
        clean = {(docs[s], places[s]): s for s in range(length) if views[s] == 0 and docs[s] >= 0}
        for s in range(length):
            if docs[s] < 0 or views[s] == 0:
                continue
            own, before = clean.get((docs[s], places[s])), clean.get((docs[s], places[s] - (0 if shift else 1)))
            if not batch.is_masked[row, s] and own is not None:
                visible.add((s * num_rows + row, own * num_rows + row))
            if row * length + s in targets and before is not None:
                masked.add((s * num_rows + row, before * num_rows + row))
    return visible, masked


@pytest.mark.parametrize("shift", [False, True])
def test_pairs_are_those_of_a_search_over_all_tokens(shift: bool) -> None:
    batch = _batch(tiny_model())
    pairs = find_pairs(batch, batch, WHOLE, shift)
    found = [
        {(token, int(pairs.clean[token])) for token in part.nonzero().flatten().tolist()}
        for part in (pairs.visible, pairs.masked)
    ]
    expected = _expected_pairs(batch, shift)
    assert min(map(len, expected)) > 20
    assert found == list(expected)


def test_a_token_that_noise_has_replaced_is_no_pair() -> None:
    batch = _batch(tiny_model(), mask_ratio=0.0)
    before = int(find_pairs(batch, batch, WHOLE, False).visible.sum())
    batch.input_ids[0, 0] += 1  # of a noisy view
    assert int(find_pairs(batch, batch, WHOLE, False).visible.sum()) == before - 1 == 2 * (17 + 9 + 24) - 1


def _aligned(built: Any, batch: Batch, rule: AlignmentRule) -> tuple[Tensor, dict[str, Tensor]]:
    """[num_layers, 4] what the alignment came to, and the gradients of it and the NLL."""
    asked = Alignment.empty(rule, built.model_config.num_layers, torch.device("cpu"))
    built.zero_grad()
    built(batch, asked=Asked(asked)).nll.sum().backward()
    return asked.sums, {name: value.grad.clone() for name, value in built.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("block_size", [4, 1])
def test_without_noise_a_noisy_token_is_its_clean_copy(block_size: int) -> None:
    """No token is masked: each noisy block sees what its clean copy sees, in every layer."""
    model = tiny_model()
    batch = _batch(model, 0.0, block_size)
    sums, _ = _aligned(_build(model), batch, AlignmentRule(weight=1.0))
    assert sums[:, 1].tolist() == [2.0 * (17 + 9 + 24)] * 3
    assert bool((sums[:, 0].abs() / sums[:, 1] < 1e-6).all())
    assert float(sums[:, 2:].abs().sum()) == 0.0
    noisy, _ = _aligned(_build(model), _batch(model), AlignmentRule(weight=1.0))
    assert bool((noisy[:, 0] / noisy[:, 1] > 1e-3).all())


def test_clean_blocks_of_one_token_teach_what_a_larger_noisy_block_does_not_compute() -> None:
    """Without noise too: a noisy token sees the rest of its block, and its clean copy does not."""
    model = tiny_model()
    batch = _batch(model, mask_ratio=0.0)
    is_clean = batch.roles[..., 2] == 0
    batch.roles[..., 1] = torch.where(is_clean, batch.position_ids.int(), batch.roles[..., 1])
    sums, _ = _aligned(_build(model), batch, AlignmentRule(weight=1.0))
    assert bool((sums[:, 0] / sums[:, 1] > 1e-3).all())


def test_only_noisy_tokens_get_a_gradient() -> None:
    batch = _batch(tiny_model())
    hidden = torch.randn(80, 2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    asked = Alignment.empty(AlignmentRule(weight=1.0), 2, torch.device("cpu"))
    pairs = find_pairs(batch, batch, WHOLE, shift=False)
    (LayerAlignment(asked, pairs, WHOLE)(2, hidden) * 0.0).sum().backward()
    has_gradient = hidden.grad.abs().sum(-1).flatten() > 0.0
    assert torch.equal(has_gradient, pairs.visible + pairs.masked > 0.0)
    assert not bool(has_gradient[(batch.roles[..., 2] == 0).T.flatten()].any())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_equals_the_formula_on_the_outputs_of_all_layers(recompute: str) -> None:
    model, rule = tiny_model(), AlignmentRule(weight=0.7, masked_layers=0.4)
    batch = _batch(model)
    sums, got = _aligned(_build(model, recompute), batch, rule)
    built, outputs = _build(model), []
    built.skips_outputs = False
    for layer in built.decoder.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    total = built(batch).nll.sum()
    visible, masked = (sorted(pairs) for pairs in _expected_pairs(batch, shift=False))
    for number, hidden in enumerate(outputs, start=1):
        flat = hidden.flatten(0, 1)
        for column, pairs, num_layers, is_in in ((0, visible, 3, True), (2, masked, 1, number == 3)):
            noisy, clean = (torch.tensor(side) for side in zip(*pairs, strict=True))
            loss = (1.0 - torch.cosine_similarity(flat[noisy], flat[clean].detach(), dim=-1)).sum() * is_in
            assert float(sums[number - 1, column]) == pytest.approx(float(loss), rel=1e-5, abs=1e-9)
            total = total + 0.7 * loss / num_layers
    total.backward()
    for name, value in built.named_parameters():
        if value.grad is not None:
            scale = float(value.grad.abs().max())
            torch.testing.assert_close(got[name], value.grad, rtol=1e-4, atol=2e-5 * scale + 1e-12)


def test_a_second_model_teaches_by_what_it_computes_of_the_true_tokens() -> None:
    """Rows without clean copies; the teacher has other weights, and reads every document as AR models do."""
    from megatron_dllm.model.objective import Objective, token_loss
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.frozen import FrozenModel
    from megatron_dllm.training.teaching import teach

    model, rule = tiny_model(), AlignmentRule(weight=1.0, masked_layers=1.0, is_own=False)
    shape = dict(rows=[[17, 9], [24]], row_length=60, block_size=64, num_views=2, has_clean=False)
    batch, true = tiny_batch(model, **shape), tiny_batch(model, **shape, mask_ratio=0.0)
    other = _build(model)
    other.load_state_dict(to_megatron(model, random_weights(model, seed=5)), strict=False)
    objective = Objective(None, False, token_loss, alignment=rule)
    (taught,) = teach(FrozenModel([other], torch.device("cpu"), Groups.current()), [batch], objective)
    asked = Alignment.empty(rule, 3, torch.device("cpu"), taught.states)
    built = _build(model)
    student = _outputs(built, lambda: built(batch, asked=Asked(asked)))
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row, document in ((0, 0), (0, 1), (1, 0)):
        is_first = (true.roles[row, :, 0] == document) & (true.roles[row, :, 2] == 1)
        tokens, places = true.input_ids[row, is_first], true.position_ids[row, is_first]
        roles = torch.stack([torch.zeros_like(places), places, torch.zeros_like(places)], -1).int()
        positions = torch.arange(len(places))
        teacher = _outputs(
            other, lambda t=tokens, p=places, r=roles, n=positions: other.states(t[None], p[None], r[None], n)
        )
        for slot in (batch.roles[row, :, 0] == document).nonzero().flatten().tolist():
            place, is_masked = int(batch.position_ids[row, slot]), bool(batch.is_masked[row, slot])
            if is_masked and place == 0:
                continue
            for layer in range(3):
                clean = teacher[layer][place - is_masked, 0]
                loss = 1.0 - torch.cosine_similarity(student[layer][slot, row], clean, dim=0)
                expected[layer, 2 * is_masked : 2 * is_masked + 2] += torch.tensor([float(loss), 1.0])
    torch.testing.assert_close(asked.sums, expected, rtol=1e-4, atol=1e-4)


def test_a_second_model_is_asked_when_a_micro_batch_is_due_and_holds_the_states_of_one() -> None:
    from megatron_dllm.model.objective import Objective, token_loss
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.frozen import FrozenModel
    from megatron_dllm.training.teaching import teach

    model, passes = tiny_model(), []
    other, batch = _build(model), _batch(model)
    other.register_forward_hook(lambda *_: passes.append(1))
    frozen = FrozenModel([other], torch.device("cpu"), Groups.current())
    objective = Objective(None, False, token_loss, alignment=AlignmentRule(weight=1.0, is_own=False))
    said, held = [], []
    for taught in teach(frozen, [batch] * 3, objective) or []:
        assert taught.states is not None
        said.append(taught.states)
        held.append((len(passes), [len(states.by_layer) for states in said]))
    assert held == [(1, [3]), (2, [0, 3]), (3, [0, 0, 3])]
    assert not any(tensor.requires_grad for tensor in said[-1].by_layer.values())


def _outputs(built: Any, run: Any) -> list[Tensor]:
    """[s, b, h] what each layer gives while the model runs with all outputs of the last one."""
    outputs: list[Tensor] = []
    built.skips_outputs = False
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output[0].detach()))
        for layer in built.decoder.layers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return outputs
