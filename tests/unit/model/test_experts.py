"""The experts' batched forward pass against megatron-core's SequentialMLP on the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.experts import sequential_like
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
    experts.is_grouped = is_grouped
    got = _with_gradients(experts, experts, sizes)
    expected = _with_gradients(sequential_like(experts), experts, sizes)
    assert len(got) == 3 + 2
    for tensor, expected_tensor in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_product_equals_a_product_for_every_section(sizes: list[int]) -> None:
    from megatron_dllm.model.experts import _GroupedProduct

    rows = _inputs(sizes)[0]
    weights = torch.randn(8, 16, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ends = torch.tensor(sizes).cumsum(0).int()
    results = []
    sections = [part @ weight.t() for part, weight in zip(rows.split(sizes), weights, strict=True)]
    for out in (_GroupedProduct.apply(rows, ends, weights), torch.cat(sections)):
        results.append([out, *torch.autograd.grad(out.square().sum(), [rows, weights])])
    for tensor, expected_tensor in zip(*results, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, rtol=1e-5, atol=1e-4)


@pytest.mark.ranks
def test_checkpoints_are_those_of_sequential_mlp(experts: Any, tmp_path: Path) -> None:
    """Names and shapes, and every number: what one of the two has written the other one reads."""
    from megatron.core import dist_checkpointing

    sequential = sequential_like(experts)
    for expert in sequential.local_experts:
        for layer in (expert.linear_fc1, expert.linear_fc2):
            weight = layer.weight.detach().clone()
            del layer.weight
            layer.weight = torch.nn.Parameter(weight)
    (tmp_path / "ours").mkdir(), (tmp_path / "theirs").mkdir()
    ours, theirs = experts.sharded_state_dict("experts."), sequential.sharded_state_dict("experts.")
    theirs = {name: value for name, value in theirs.items() if not name.endswith("_extra_state")}
    assert {value.key for value in ours.values()} == {value.key for value in theirs.values()}
    dist_checkpointing.save(dict(ours), str(tmp_path / "ours"))
    dist_checkpointing.save(dict(theirs), str(tmp_path / "theirs"))
    expected = {name: value.clone() for name, value in experts.state_dict(prefix="experts.").items()}
    got = dist_checkpointing.load(experts.sharded_state_dict("experts."), str(tmp_path / "theirs"))
    back = dist_checkpointing.load(dict(theirs), str(tmp_path / "ours"))
    for number in (1, 2):
        name = f"experts.weight{number}"
        assert torch.equal(got[name], expected[name])
        for expert in range(8):
            other = back[f"experts.local_experts.{expert}.linear_fc{number}.weight"]
            assert torch.equal(other, expected[name][expert])


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
