"""Which implementation runs, asked for machines that this one is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_dllm.config import OptimizerConfig, ParallelConfig
from megatron_dllm.model.paths import choose_paths
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.parallel.packages import Packages
from tests.reference_model import tiny_model

CPU = DeviceFacts(is_cuda=False, has_triton=False, has_transformer_engine=False)
CUDA = DeviceFacts.as_cuda(has_transformer_engine=False)
CUDA_TE = DeviceFacts.as_cuda()
MOE, DENSE = tiny_model(), tiny_model(num_moe_experts=0)
WIDE = tiny_model(moe_ffn_hidden_size=512)
BF16, FP32 = ParallelConfig(precision="bf16"), ParallelConfig()
ON_CPU = dict(attention="shared_prefix", linear="torch", norms="torch", fusions="plain", optimizer="torch")
ON_CUDA = dict(attention="flex", linear="torch", norms="torch", fusions="compiled", optimizer="torch")
WITH_TE = ON_CUDA | dict(linear="te", norms="te", optimizer="te")

TABLE = {
    "CPU": (CPU, MOE, FP32, ON_CPU | dict(experts="grouped", dispatcher="allgather", collectives="gloo")),
    "CPU, wide experts": (CPU, WIDE, FP32, ON_CPU | dict(experts="grouped", dispatcher="allgather")),
    "CPU, wide experts divided": (
        CPU,
        WIDE,
        ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True),
        ON_CPU | dict(experts="grouped"),
    ),
    "CPU, odd experts": (CPU, tiny_model(moe_ffn_hidden_size=10), FP32, ON_CPU | dict(experts="sections")),
    "CUDA, odd experts": (CUDA, tiny_model(moe_ffn_hidden_size=12), BF16, ON_CUDA | dict(experts="sections")),
    "CPU, TransformerEngine without a GPU": (replace(CPU, has_transformer_engine=True), MOE, FP32, ON_CPU),
    "CPU, dense": (CPU, DENSE, FP32, ON_CPU | dict(experts="none", dispatcher="none")),
    "CUDA": (CUDA, WIDE, BF16, ON_CUDA | dict(experts="grouped", dispatcher="alltoall", collectives="nccl")),
    "CUDA, fp32": (CUDA, MOE, FP32, ON_CUDA | dict(experts="sections")),
    "CUDA without Triton": (replace(CUDA, has_triton=False), MOE, BF16, ON_CUDA | dict(attention="chunked")),
    "CUDA, TransformerEngine": (CUDA_TE, MOE, BF16, WITH_TE | dict(experts="te_grouped", dispatcher="alltoall")),
    "CUDA, Apex": (replace(CUDA, packages=Packages(apex="nvidia")), MOE, BF16, ON_CUDA | dict(optimizer="apex")),
    "CUDA, TransformerEngine and Apex": (replace(CUDA_TE, packages=Packages(apex="nvidia")), MOE, BF16, WITH_TE),
    "CUDA, all-gather": (CUDA_TE, MOE, ParallelConfig(moe_token_dispatcher="allgather"), dict(dispatcher="allgather")),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_runs_where(name: str) -> None:
    facts, model, parallel, expected = TABLE[name]
    paths = choose_paths(model, parallel, facts)
    assert {key: getattr(paths, key).name for key in expected} == expected


def test_what_is_asked_for_by_name_runs() -> None:
    for name in ("dense", "chunked", "flex"):
        choice = choose_paths(MOE, FP32, CUDA, name).attention
        assert str(choice) == f"{name} (asked for by name)"
    assert choose_paths(MOE, FP32, CPU, "dense").attention.name == "dense"
    assert choose_paths(MOE, FP32, CPU, "flex").attention.name == "flex"  # its forward pass runs there


@pytest.mark.parametrize(
    ("facts", "parallel", "arguments", "message"),
    [
        (CPU, {}, dict(attention_backend="flash"), r"attention_backend \(flash\) is not known"),
        (CUDA, {}, dict(attention_backend="shared_prefix"), "kernel of the CPU"),
        (replace(CUDA, has_triton=False), {}, dict(attention_backend="flex"), "needs Triton"),
        (CPU, {}, dict(attention_backend="flex", is_training=True), "no backward on the CPU"),
        (
            CPU,
            dict(tensor_model_parallel_size=2, sequence_parallel=True, moe_token_dispatcher="alltoall"),
            {},
            "needs NCCL with expert_tensor_parallel_size 2",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    facts: DeviceFacts, parallel: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_paths(MOE, ParallelConfig(**parallel), facts, **arguments)


def test_fp8_is_for_hopper_with_transformer_engine() -> None:
    fp8 = ParallelConfig(precision="fp8")
    choice = choose_paths(WIDE, fp8, CUDA_TE)
    assert choice.precision.name == "fp8" and choice.experts.name == "te_grouped"
    for facts, message in (
        (CPU, r"parallel.precision \(fp8\) needs TransformerEngine and a GPU"),
        (CUDA, r"parallel.precision \(fp8\) needs TransformerEngine and a GPU"),
        (replace(CUDA_TE, capability=(8, 0)), r"compute capability 9.0 \(Hopper\) or later, and this one has 8.0"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_paths(WIDE, fp8, facts)
    assert "parallel.precision=fp8" in choose_paths(WIDE, BF16, CUDA_TE).precision.faster
    assert choose_paths(WIDE, BF16, CUDA).precision.faster == ""


def test_deepeps_kernels_go_with_transformer_engine() -> None:
    flex = replace(BF16, expert_model_parallel_size=2, moe_token_dispatcher="flex")
    hybrid = replace(flex, moe_flex_dispatcher_backend="hybridep")
    old, new = (
        replace(CUDA_TE, packages=Packages(deepep=kernels)) for kernels in (("deepep",), ("deepep", "hybridep"))
    )
    assert str(choose_paths(MOE, flex, old).dispatcher) == "flex (asked for by name, by deepep's kernels)"
    assert str(choose_paths(MOE, hybrid, new).dispatcher) == "flex (asked for by name, by hybridep's kernels)"
    for layout, facts, message in (
        (flex, CPU, r"moe_token_dispatcher \(flex\) needs a GPU and TransformerEngine, which are not both here"),
        (flex, replace(CUDA, packages=Packages(deepep=("deepep",))), "needs a GPU and TransformerEngine"),
        (flex, CUDA_TE, r"moe_flex_dispatcher_backend \(deepep\) needs the package deep_ep.* build github.com"),
        (hybrid, old, r"backend \(hybridep\) needs the package deep_ep.* build its branch hybrid-ep of github.com"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_paths(MOE, layout, facts)
    assert choose_paths(DENSE, flex, CPU).dispatcher.name == "none"


def test_moments_in_bf16_are_transformer_engines() -> None:
    short = OptimizerConfig(moments="bf16")
    assert str(choose_paths(MOE, BF16, CUDA_TE, optimizer=short).optimizer).endswith("installed; moments in bf16)")
    for facts in (CPU, CUDA, replace(CUDA, packages=Packages(apex="nvidia"))):
        with pytest.raises(ValueError, match=r"optimizer.moments \(bf16\) needs the Adam of TransformerEngine"):
            choose_paths(MOE, BF16, facts, optimizer=short)


def test_an_offloaded_optimizer_says_who_updates_it() -> None:
    with_deepspeed = replace(CUDA, packages=Packages(has_deepspeed=True))
    offloaded = OptimizerConfig(offload="cpu", offload_fraction=0.5, offload_adam="deepspeed")
    choice = choose_paths(MOE, BF16, with_deepspeed, optimizer=offloaded).optimizer
    assert str(choice) == "offloaded (50% on the host, by deepspeed's Adam)"
    with pytest.raises(ValueError, match=r"offload_adam \(deepspeed\) needs the package.*megatron_dllm\[offload\]"):
        choose_paths(MOE, BF16, CUDA, optimizer=offloaded)
    assert choose_paths(MOE, BF16, CUDA, optimizer=replace(offloaded, offload="none")).optimizer.name == "torch"


def test_one_line_says_it_all() -> None:
    line = str(choose_paths(MOE, FP32, CPU))
    assert line.startswith("attention shared_prefix (fastest on CPU), linear torch (no CUDA), ")
    assert "dispatcher allgather (suits gloo)" in line and "\n" not in line
