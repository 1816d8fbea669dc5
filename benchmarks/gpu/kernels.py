"""Attention, experts and head on the device against their definitions, forward and all gradients.

Errors are norms: that of the difference over that of what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.experts import build_experts, facts_of, sequential_like
from benchmarks.gpu.checks import Check, Found, NotHere
from benchmarks.gpu.settings import Settings
from benchmarks.random_roles import CASES, RoleCase, draw_roles
from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention.backends import BACKENDS, Backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of fp32, sums of some thousand products in another order; of bf16, what rounding results and probabilities to eight
# bits costs. The CPU's figures are 4e-7 and 4e-3.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
NAMES_OF_ATTENTION = ("output", "dq", "dk", "dv")
NUM_EXPERTS = 8
# Tokens of each expert.
EXPERT_TOKENS = {
    "uneven": [3, 9, 1, 4, 2, 7, 5, 6],
    "some without tokens": [0, 9, 0, 0, 2, 20, 6, 0],
    "one with all": [0, 0, 0, 37, 0, 0, 0, 0],
    "no token at all": [0] * NUM_EXPERTS,
}


def kernel_checks(settings: Settings) -> dict[str, Check]:
    """The checks by name, what a run needs most first."""
    checks: dict[str, Check] = {}

    def attention(*names: str) -> None:
        for name in names:
            for precision, dtype in DTYPES.items():
                checks[f"attention {name}, {precision}"] = partial(attention_error, settings, name, dtype)

    # What a GPU trains with, what it is compared with elsewhere, and last what takes a kernel call for every tile.
    attention("flex", "dense")
    for precision, dtype in DTYPES.items():
        checks[f"head, {precision}"] = partial(head_error, settings, dtype)
    for precision in DTYPES:
        for way in ("sections", "grouped"):
            checks[f"experts {way}, {precision}"] = partial(experts_error, settings, way, precision)
    attention(*(name for name in BACKENDS if name not in ("flex", "dense")))
    return checks


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`, both [...]; where nothing is expected, the norm itself."""
    expected = expected.double()
    scale = float(expected.detach().norm())
    return float((got.double() - expected).detach().norm()) / (scale or 1.0)


def worst_error(got: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str]) -> tuple[float, str]:
    """The largest relative error of pairs of tensors [...], and the name of its tensor; NaN counts as the largest."""
    errors = {name: relative_error(a, b) for name, a, b in zip(names, got, expected, strict=True)}
    return max(((error if error == error else float("inf")), name) for name, error in errors.items())


def attention_error(settings: Settings, name: str, dtype: torch.dtype, attend: Backend | None = None) -> Found:
    """The backend's largest error over all cases of roles, and over queries in any order.

    Args:
        settings: of the part.
        name: of the backend.
        dtype: of its inputs.
        attend: the backend; None: the product's of that name.
    """
    _require_backend(settings, name)
    backend = attend or BACKENDS[name]
    worst = (0.0, "")
    for case_name, case in _cases(settings).items():
        roles = draw_roles(case, seed=1).to(settings.device)
        worst = max(worst, _attention_case(backend, roles, roles, dtype, case_name))
    for case_name in ("two views", "prompts"):
        roles = draw_roles(_cases(settings)[case_name], seed=2).to(settings.device)
        chosen = torch.randperm(roles.shape[1], generator=torch.Generator().manual_seed(3))[: roles.shape[1] // 3]
        keys, queries = roles.flip(1), roles[:, chosen.to(roles.device)]
        worst = max(worst, _attention_case(backend, queries, keys, dtype, f"{case_name}, in another order"))
    return Found(worst[0], LIMITS[dtype], f"largest: {worst[1]}")


def _require_backend(settings: Settings, name: str) -> None:
    """Leave out a backend that the product refuses on this device, in the product's words."""
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.model.paths import choose_paths

    try:
        choose_paths(ModelConfig(), ParallelConfig(), facts_of(settings.device), name, is_training=True)
    except ValueError as refusal:
        raise NotHere(str(refusal)) from None


def _cases(settings: Settings) -> dict[str, RoleCase]:
    """Rows of one shape, so that a kernel is compiled once, and long enough for whole tiles of 128."""
    if settings.is_small:
        return CASES
    return {name: replace(case, num_rows=2, row_length=1000) for name, case in CASES.items()}


def _attention_case(
    backend: Backend, query_roles: Tensor, key_roles: Tensor, dtype: torch.dtype, case: str
) -> tuple[float, str]:
    """The largest error of one case.

    Args:
        backend: that is checked.
        query_roles: [b, q, 3] int32.
        key_roles: [b, k, 3] int32.
        dtype: of the inputs.
        case: its name.
    """
    (rows, queries), keys = query_roles.shape[:2], key_roles.shape[1]
    generator = torch.Generator().manual_seed(queries)
    shapes = [(queries, rows, 4, 64), (keys, rows, 2, 64), (keys, rows, 2, 64), (queries, rows, 4, 64)]
    # In megatron-core's layout [s, b, n, d], as the layers bring them.
    drawn = [torch.randn(shape, generator=generator).to(query_roles.device, dtype) for shape in shapes]
    *inputs, grad = (tensor.permute(1, 2, 0, 3).requires_grad_() for tensor in drawn)
    out = backend.attend(*inputs, backend.build_plan(query_roles, key_roles), 0.125)
    got = [out, *torch.autograd.grad(out, inputs, grad)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected_out = expected_attention(*exact, visible(query_roles, key_roles), 0.125)
    expected = [expected_out, *torch.autograd.grad(expected_out, exact, grad.double())]
    return worst_error(got, expected, [f"{name} of {case}" for name in NAMES_OF_ATTENTION])


def expected_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The definition: softmax over the visible keys, and 0 where there is none.

    Args:
        query: [b, n, q, d].
        key: [b, g, k, d].
        value: [b, g, k, d].
        mask: [b, q, k] bool.
        scale: factor on the logits.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask[:, None], -1e30)
    return (logits.softmax(-1) * mask[:, None]) @ value


def head_error(settings: Settings, dtype: torch.dtype) -> Found:
    """NLL, entropy and their gradients, computed chunk by chunk, against the full logits in double precision."""
    from megatron_dllm.model.head import target_cross_entropy

    targets, hidden_size, vocab = (50, 32, 100) if settings.is_small else (500, 512, 20_000)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in ((targets, hidden_size), (vocab, hidden_size))]
    hidden, weight = (tensor.to(settings.device, dtype) for tensor in (drawn[0], drawn[1] * hidden_size**-0.5))
    ids = torch.randint(0, vocab, (targets,), generator=generator).to(settings.device)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    found = target_cross_entropy(hidden, weight, ids, None, chunk_elements=7 * vocab, entropy_temperature=1.0)
    assert found.entropy is not None, "it was asked for"
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    log_p = torch.log_softmax(exact[0] @ exact[1].t(), dim=-1)
    expected_nll = -log_p.gather(1, ids.unsqueeze(1)).squeeze(1)
    expected_entropy = -(log_p.exp() * log_p).sum(-1)
    got = [found.nll, found.entropy, *torch.autograd.grad((found.nll + found.entropy).sum(), inputs)]
    total = (expected_nll + expected_entropy).sum()
    expected = [expected_nll, expected_entropy, *torch.autograd.grad(total, exact)]
    error, place = worst_error(got, expected, ("nll", "entropy", "gradient of hidden", "gradient of weight"))
    return Found(error, LIMITS[dtype], f"largest: {place}")


def experts_error(settings: Settings, way: str, precision: str) -> Found:
    """One way of computing all experts against megatron-core's loop over them, on the same weights."""
    if way == "grouped" and settings.device == "cuda" and precision == "fp32":
        raise NotHere("the grouped product of CUDA is for bf16")
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.parallel.groups import single_rank

    factor = 1 if settings.is_small else 50
    sizes = (64, 32) if settings.is_small else (1024, 512)  # hidden, inner
    with single_rank(0):
        experts = build_experts(NUM_EXPERTS, *sizes, precision, settings.device)
        experts.is_grouped = way == "grouped"
        exact = build_experts(NUM_EXPERTS, *sizes, "fp32", settings.device).double()
        with torch.no_grad():
            for wide, given in zip(exact.parameters(), experts.parameters(), strict=True):
                wide.copy_(given)
        sequential, worst = sequential_like(exact), (0.0, "")
        for name, tokens in EXPERT_TOKENS.items():
            counts = torch.tensor(tokens, device=settings.device) * factor
            got = _through_experts(experts, experts, counts)
            expected = _through_experts(sequential, exact, counts)
            names = ["output", "gradient of tokens", "gradient of probabilities"]
            names += [f"gradient of {name}" for name, _ in experts.named_parameters()]
            worst = max(worst, worst_error(got, expected, [f"{part}, {name}" for part in names]))
    return Found(worst[0], LIMITS[DTYPES[precision]], f"largest: {worst[1]}")


def _through_experts(forward: Callable[..., Any], experts: Any, counts: Tensor) -> list[Tensor]:
    """Outputs and gradients of tokens, probabilities and all weights.

    Args:
        forward: computes the experts.
        experts: whose weights they are.
        counts: [e] int64 tokens of each expert.
    """
    dtype = next(experts.parameters()).dtype
    generator = torch.Generator().manual_seed(int(counts.sum()))
    hidden_size = experts.config.hidden_size
    drawn = [torch.randn(int(counts.sum()), hidden_size, generator=generator) for _ in range(2)]
    # Rounded to bf16, so that every precision computes with the same numbers.
    tokens, grad = (tensor.bfloat16().to(counts.device, dtype) for tensor in drawn)
    probs = torch.rand(len(tokens), generator=generator).to(counts.device)
    inputs = [tokens.requires_grad_(), probs.requires_grad_(), *experts.parameters()]
    out, bias = forward(tokens, counts, probs)
    assert bias is None, "the experts have no bias"
    return [out, *torch.autograd.grad(out, inputs, grad)]
