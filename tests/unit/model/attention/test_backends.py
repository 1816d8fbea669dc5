"""Every backend equals softmax over the visible keys: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_roles import CASES, RoleCase, draw_inputs, draw_roles
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention import chunked, dense
from megatron_dllm.model.attention.backends import Backend
from tests.unit.model.attention.eager_kernel import small_backends

BACKENDS = small_backends(tile_size=8)
SCALE = 0.3


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The definition, written out: heads share the keys of their group, a row without keys is 0."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    logits = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~mask[:, None], -1e30)
    weights = logits.softmax(-1) * mask[:, None]
    return weights @ value


def results(
    backend: Backend, inputs: list[Tensor], grad: Tensor, query_roles: Tensor, key_roles: Tensor
) -> tuple[Tensor, ...]:
    out = backend.attend(*inputs, backend.build_plan(query_roles, key_roles), SCALE)
    return out, *torch.autograd.grad(out, inputs, grad)


def expected_results(inputs: list[Tensor], grad: Tensor, query_roles: Tensor, key_roles: Tensor) -> tuple[Tensor, ...]:
    out = softmax_attention(*inputs, visible(query_roles, key_roles))
    return out, *torch.autograd.grad(out, inputs, grad)


def greatest_error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_softmax_over_visible_keys(backend: Backend, name: str) -> None:
    for seed in range(3):
        roles = draw_roles(CASES[name], seed)
        inputs, grad = draw_inputs(roles, roles, seed=seed)
        assert (
            greatest_error(results(backend, inputs, grad, roles, roles), expected_results(inputs, grad, roles, roles))
            < 1e-12
        )


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_any_order_and_any_subset_of_queries(backend: Backend, name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    roles = draw_roles(CASES[name], 3)
    length = roles.shape[1]
    keys = roles[:, torch.randperm(length, generator=generator)]
    queries = roles[:, torch.randperm(length, generator=generator)[: length // 3]]
    inputs, grad = draw_inputs(queries, keys)
    assert (
        greatest_error(results(backend, inputs, grad, queries, keys), expected_results(inputs, grad, queries, keys))
        < 1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_any_roles_that_the_predicate_accepts(backend: Backend) -> None:
    """Holes in the blocks, negative blocks, documents in any order, queries whose own keys are absent."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        keys, queries = (
            torch.stack(
                [
                    torch.randint(-1, 3, (2, size), generator=generator),
                    torch.randint(-4, 5, (2, size), generator=generator),
                    torch.randint(0, 3, (2, size), generator=generator),
                ],
                dim=-1,
            ).int()
            for size in (40, 30)
        )
        inputs, grad = draw_inputs(queries, keys)
        assert (
            greatest_error(results(backend, inputs, grad, queries, keys), expected_results(inputs, grad, queries, keys))
            < 1e-12
        )


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_precisions_and_query_groups(
    backend: Backend, dtype: torch.dtype, tolerance: float, heads: int, groups: int
) -> None:
    roles = draw_roles(CASES["two views"], 0)
    inputs, grad = draw_inputs(roles, roles, heads=heads, groups=groups, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got = results(backend, inputs, grad, roles, roles)
    assert {tensor.dtype for tensor in got} == {dtype}
    assert greatest_error(got, expected_results(exact, grad.double(), roles, roles)) < tolerance


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_padding_is_exactly_zero_and_has_no_gradient(backend: Backend) -> None:
    roles = draw_roles(CASES["one view"], 1)
    is_padding = roles[..., 0] < 0
    assert is_padding.any()
    inputs, grad = draw_inputs(roles, roles, dtype=torch.float32)
    out, *grads = results(backend, inputs, grad, roles, roles)
    for tensor in (out, *grads):
        assert (tensor.transpose(1, 2)[is_padding] == 0).all()
    all_padding = torch.full_like(roles, -1)
    assert all((tensor == 0).all() for tensor in results(backend, inputs, grad, all_padding, all_padding))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_no_leak_from_hidden_tokens(backend: Backend) -> None:
    """The gradient of one block's output is exactly 0 at every key that the block does not see."""
    roles = draw_roles(CASES["two views"], 2)
    inputs, grad = draw_inputs(roles, roles, dtype=torch.float32)
    out = backend.attend(*inputs, backend.build_plan(roles, roles), SCALE)
    mask = visible(roles, roles)
    for query in (0, 40, 77):
        grads = torch.autograd.grad(out[:, :, query], inputs[1:], grad[:, :, query], retain_graph=True)
        for tensor in grads:
            has_gradient = (tensor != 0).any(-1).any(1)
            assert torch.equal(has_gradient, mask[:, query])


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_wrong_mask_is_noticed(backend: Backend) -> None:
    """The comparison of these tests fails where one token's block differs by one."""
    roles = draw_roles(CASES["one view"], 0)
    inputs, grad = draw_inputs(roles, roles)
    wrong = roles.clone()
    place = int(torch.nonzero(roles[0, :, 1] > 0)[0])
    wrong[0, place, 1] -= 1
    assert (
        greatest_error(results(backend, inputs, grad, wrong, wrong), expected_results(inputs, grad, roles, roles))
        > 1e-3
    )


def test_masked_kernels_of_a_gpu_get_the_keys_of_every_head() -> None:
    """torch's fused CUDA kernels take a mask or groups, not both; without a mask the groups stay."""
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append((args[1].shape[1], kwargs["enable_gqa"]))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        query, key = torch.empty(1, 6, 8, 4, device="cuda"), torch.empty(1, 2, 8, 4, device="cuda")
        for mask in (torch.ones(8, 8, dtype=torch.bool, device="cuda"), None):
            dense.masked_attention(query, key, key, mask, SCALE)
    assert seen == [(6, False), (2, True)]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_tiles_of_many_shapes_do_not_go_to_cudnn(device: str) -> None:
    """It builds a plan for each shape. Elsewhere nothing is chosen, and nothing stays chosen."""
    with FakeTensorMode():
        query = torch.empty(4, 20, 8, device=device)
    with chunked._any_shape(query):
        assert torch.backends.cuda.cudnn_sdp_enabled() == (device == "cpu")
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest memory that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.num_elements = max(self.num_elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("name", ["chunked", "shared_prefix"])
def test_no_tensor_grows_with_the_square_of_the_row(name: str) -> None:
    largest = {}
    for length in (512, 1024):
        roles = draw_roles(RoleCase(num_rows=1, row_length=length, max_document=10**6, block_size=8), 0)
        inputs, grad = draw_inputs(roles, roles, heads=1, groups=1)
        with LargestTensor() as seen:
            results(BACKENDS[name], inputs, grad, roles, roles)
        largest[length] = seen.num_elements
    assert largest[1024] <= 2.1 * largest[512]
    with LargestTensor() as seen:
        results(dense, inputs, grad, roles, roles)
    assert seen.num_elements >= 1024**2


@pytest.mark.parametrize("name", ["chunked", "shared_prefix"])
def test_what_is_kept_for_backward_grows_linearly(name: str) -> None:
    backend = BACKENDS[name]
    kept = {}
    for length in (512, 1024):
        roles = draw_roles(RoleCase(num_rows=1, row_length=length, max_document=10**6, block_size=8), 0)
        inputs, _ = draw_inputs(roles, roles, heads=1, groups=1)
        storages: dict[int, int] = {}

        def save(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            backend.attend(*inputs, backend.build_plan(roles, roles), SCALE)
        kept[length] = sum(storages.values())
    assert kept[1024] <= 2.2 * kept[512]
