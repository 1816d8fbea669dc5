"""What megatron-core finds on a machine without CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_dllm import host

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.fixture(autouse=True)
def prepared() -> None:
    host.prepare_host()


def test_a_second_call_changes_nothing() -> None:
    before = (torch.cuda.current_device, torch.Tensor.cuda, torch.cuda.Stream)
    host.prepare_host()
    assert before == (torch.cuda.current_device, torch.Tensor.cuda, torch.cuda.Stream)


@pytest.mark.parametrize("version", ["0.15.4", "0.17.0", "1.16.0"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(RuntimeError, match=r"megatron-core \(.*\) must be 0\.16.*pip install"):
        host._check_installation(version)
    host._check_installation("0.16.7")


def test_a_missing_psutil_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="psutil"):
        host._check_installation(host.TESTED_VERSION)


@needs_no_cuda
def test_calls_of_torch_cuda_are_answered() -> None:
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor and module.cuda(0) is module
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    stream = torch.cuda.Stream()
    assert torch.cuda.current_stream() == stream
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        stream.record_event().synchronize()
    torch.cuda.synchronize()
    assert not torch.cuda.is_available()


@needs_no_cuda
@pytest.mark.ranks
def test_preparing_loads_no_compiler_and_leaves_torch_as_it_was() -> None:
    code = (
        "import sys, torch; real = torch.compile; from megatron_dllm.host import prepare_host; prepare_host(); "
        "assert torch.compile is real; assert 'torch._inductor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_no_cuda
def test_no_loaded_function_of_megatron_names_the_device() -> None:
    import types

    def literals(code: types.CodeType) -> set[str]:
        inner = (literals(c) for c in code.co_consts if isinstance(c, types.CodeType))
        return {c for c in code.co_consts if isinstance(c, str)}.union(*inner)

    checked = 0
    for name in host._LAZY_MODULES:
        module = sys.modules[name]
        owners = [module, *(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name)]
        for function in (getattr(v, "__func__", v) for owner in owners for v in vars(owner).values()):
            if isinstance(function, types.FunctionType) and function.__module__ == name:
                assert not literals(function.__code__) & host._LITERALS.keys(), function
                checked += 1
    assert checked > 100


@needs_no_cuda
def test_the_optimizer_side_accepts_cpu_tensors() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler

    assert ConstantGradScaler(2.0).scale.device.type == "cpu"
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


@needs_no_cuda
def test_random_states_of_ranks_differ_and_do_not_disturb_each_other() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    tracker.add("two", 2)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with tracker.fork("one"):
        first = torch.rand(2)
    with tracker.fork("two"):
        second = torch.rand(2)
    with tracker.fork("one"):
        third = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(torch.cat([first, third]), torch.rand(4, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, second)


@needs_no_cuda
def test_split_sizes_are_lists() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    assert token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 3]), as_numpy=True) == [2, 3]
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None
    assert torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 3])))


@pytest.mark.ranks
def test_importing_megatron_through_us_is_quiet_and_the_order_does_not_matter() -> None:
    """Nothing on stderr, whether the host is prepared before or after megatron-core is imported."""
    script = (
        "from megatron_dllm import parallel\nfrom megatron.core.models.gpt import gpt_layer_specs\n"
        "from megatron_dllm.host import prepare_host\nprepare_host()\n"
        "from megatron.core.optimizer.grad_scaler import ConstantGradScaler\nConstantGradScaler(1.0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0 and result.stderr == "", result.stderr
