"""The acceptance run's checks of single kernels pass on the CPU, and fail where a kernel is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.checks import NotHere
from benchmarks.gpu.kernels import attention_error, relative_error, worst_error
from benchmarks.gpu.settings import Settings
from megatron_dllm.model.attention import dense


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("cpu", True, tmp_path, 600.0)


class AlmostDense:
    """dense, but for one key that a query should not see."""

    IS_COMPILED_PER_SHAPE = False
    build_plan = staticmethod(dense.build_plan)

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> Tensor:
        wrong = plan.clone()
        wrong[0, 0, 0, -1] = ~wrong[0, 0, 0, -1]
        return dense.attend(query, key, value, wrong, scale)


def test_a_wrong_mask_fails(settings: Settings) -> None:
    assert not attention_error(settings, "dense", torch.float32).is_failure
    assert attention_error(settings, "dense", torch.float32, AlmostDense()).is_failure


def test_a_backend_that_the_product_refuses_is_not_run(settings: Settings) -> None:
    with pytest.raises(NotHere, match="no backward on the CPU"):
        attention_error(settings, "flex", torch.float32)


def test_errors_are_norms_and_nan_is_the_largest() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
    tensors = [expected, expected * float("nan"), expected + 1.0]
    assert worst_error(tensors, [expected] * 3, "abc") == (float("inf"), "b")
