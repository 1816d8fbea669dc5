"""The experts' batched forward pass against megatron-core's SequentialMLP on the same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import ParallelConfig
from tests.reference_model import random_weights, tiny_model, to_megatron

pytestmark = pytest.mark.usefixtures("one_rank")

SIZES = {
    "uneven": [3, 9, 1, 4, 2, 7, 5, 6],
    "some without tokens": [0, 9, 0, 0, 2, 20, 6, 0],
    "one with all": [0, 0, 0, 37, 0, 0, 0, 0],
    "no token at all": [0] * 8,
}


@pytest.fixture(scope="module")
def experts() -> Any:
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    model = tiny_model()
    built = build_model(model, ParallelConfig(), Groups.current())
    built.load_state_dict(to_megatron(model, random_weights(model)), strict=False)
    return built.decoder.layers[1].mlp.experts


def _inputs(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return (
        torch.randn(sum(sizes), 48, generator=generator).requires_grad_(),
        torch.tensor(sizes),
        torch.rand(sum(sizes), generator=generator).requires_grad_(),
    )


def _with_gradients(forward: Any, experts: Any, sizes: list[int]) -> list[Tensor]:
    hidden, counts, probs = _inputs(sizes)
    out, bias = forward(hidden, counts, probs)
    assert bias is None
    weights = torch.linspace(-1.0, 1.0, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), [hidden, probs, *experts.parameters()])]


@pytest.mark.parametrize("is_grouped", [False, True], ids=["an expert at a time", "grouped product"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_sequential_mlp_with_gradients(sizes: list[int], is_grouped: bool, experts: Any) -> None:
    from megatron.core.transformer.moe.experts import SequentialMLP

    experts.is_grouped = is_grouped
    got = _with_gradients(experts, experts, sizes)
    expected = _with_gradients(lambda *inputs: SequentialMLP.forward(experts, *inputs), experts, sizes)
    assert len(got) == 3 + 2 * 8
    for tensor, expected_tensor in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_product_equals_a_product_for_every_section(sizes: list[int]) -> None:
    from megatron_dllm.model.experts import _GroupedProduct

    rows = _inputs(sizes)[0]
    weights = [torch.randn(16, 48, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(8)]
    ends = torch.tensor(sizes).cumsum(0).int()
    results = []
    sections = [part @ weight.t() for part, weight in zip(rows.split(sizes), weights, strict=True)]
    for out in (_GroupedProduct.apply(rows, ends, *weights), torch.cat(sections)):
        results.append([out, *torch.autograd.grad(out.square().sum(), [rows, *weights])])
    for tensor, expected_tensor in zip(*results, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, rtol=1e-5, atol=1e-4)


def test_checkpoint_names_are_those_of_sequential_mlp(experts: Any) -> None:
    from megatron.core.transformer.moe.experts import SequentialMLP

    expected = SequentialMLP.sharded_state_dict(experts, "experts.")
    got = experts.sharded_state_dict("experts.")
    assert got.keys() == expected.keys() and "experts.local_experts.7.linear_fc2.weight" in got
    assert all(got[name].key == expected[name].key for name in got)


def test_hooks_that_complete_parameters_run_before_they_are_read() -> None:
    """megatron-core's overlapped parameter gather waits in a hook before the forward pass of the owning module."""
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups
    from tests.tiny_batch import tiny_batch

    model = tiny_model()
    built = build_model(model, ParallelConfig(), Groups.current())
    waited: set[int] = set()
    for module in built.modules():
        module.register_forward_pre_hook(
            lambda module, _: waited.update(id(p) for p in module.parameters(recurse=False))
        )
    built(tiny_batch(model, [[9]], row_length=20, block_size=4))
    missing = [name for name, parameter in built.named_parameters() if id(parameter) not in waited]
    assert not missing
