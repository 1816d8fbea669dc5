"""Time of a step: sums worked out by hand, and what a change of the machine or the layout does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config import OptimizerConfig, ParallelConfig, PreferenceConfig
from megatron_dllm.planning.engine import measure
from megatron_dllm.planning.layout_plan import Candidate, Setting, plan_stage
from megatron_dllm.planning.links import Links
from megatron_dllm.planning.rows import RowContent
from megatron_dllm.planning.timing import StepTime
from megatron_dllm.planning.work import StageWork, assumed_work
from tests.unit.config.configs import model_config, stage_config, train_config
from tests.unit.planning.setting import setting_for
from tests.unit.planning.slices import slice_of

BF16 = ParallelConfig(precision="bf16")
DENSE = model_config(num_moe_experts=0, moe_shared_expert_intermediate_size=0, num_layers=4, num_dense_layers=0)
MOE = model_config(num_layers=4, num_dense_layers=0)
SHARES = dict(product_efficiency=0.7, link_efficiency=0.65, host_ms_per_layer=0.0)
LINKS = Links(node=100.0, network=10.0, gpus_per_node=8)


def _time(layout: ParallelConfig, num_gpus: int, model=DENSE, setting: Setting | None = None, **batch: int) -> StepTime:
    setting = setting or setting_for(train_config(model=model), **SHARES)
    stage = stage_config(objective="ar", global_batch_size=batch.get("rows", 16))
    row = RowContent(4096, 4096.0, 4096.0, 1e6, "")
    return plan_stage(setting, StageWork("one", stage, row, 10**6), Candidate(layout, num_gpus)).time


def test_products_and_attention_of_a_dense_model() -> None:
    """6 operations a weight and token, 8 in the head; attention 3.5 times 4 x pairs x width of the heads."""
    weights = 4 * (64 * (2 * 8 * 16 + 2 * 4 * 16) + 3 * 64 * 96)
    operations = 16 * 4096 * (6 * weights + 8 * 192 * 64)
    time = _time(BF16, 1)
    assert time.products == pytest.approx(operations / (989e12 * 0.7))
    assert time.attention == pytest.approx(16 * 4 * 3.5 * 4 * 1e6 * 8 * 16 / (989e12 * 0.4))
    assert time.total == pytest.approx(sum(time.parts.values()))


def test_full_recomputation_runs_the_forward_pass_again() -> None:
    plain, again = _time(BF16, 1), _time(replace(BF16, recompute="full"), 1)
    head = 16 * 4096 * 8 * 192 * 64 / (989e12 * 0.7)
    assert again.products - head == pytest.approx((plain.products - head) * 4 / 3)
    assert again.attention == pytest.approx(plain.attention * 4.5 / 3.5)


def test_a_pass_without_gradients_is_a_third_of_a_step() -> None:
    """Preferences are scored before a step, by the model and by a frozen reference: two more forward passes."""
    setting = setting_for(train_config(model=DENSE), **SHARES)
    work = StageWork("one", stage_config(), RowContent(4096, 4096.0, 4096.0, 1e6, ""), 10**6)
    scored = replace(work, config=replace(work.config, preference=PreferenceConfig()))
    plain = plan_stage(setting, work, Candidate(BF16, 1)).time
    time = plan_stage(replace(setting, num_models=2), scored, Candidate(BF16, 1)).time
    # The head: 8 operations a weight and target, and 2 in each of the passes.
    head = 4096 * 192 * 64 / (989e12 * 0.7) * work.config.global_batch_size
    assert time.products - 12 * head == pytest.approx((plain.products - 8 * head) * 5 / 3)
    assert time.attention == pytest.approx(plain.attention * 5.5 / 3.5)


def test_fp8_speeds_up_the_layers_and_not_the_head() -> None:
    head = 16 * 4096 * 8 * 192 * 64 / (989e12 * 0.7)
    plain, fp8 = _time(BF16, 1), _time(replace(BF16, precision="fp8"), 1)
    assert fp8.products - head == pytest.approx((plain.products - head) / 1.45)
    assert fp8.attention == plain.attention


def test_a_pipeline_waits_for_its_first_and_last_micro_batches() -> None:
    """On four ranks three micro-batches' time is lost, on four with two pieces half of that."""
    layout = replace(BF16, pipeline_model_parallel_size=2)
    one = sum(_time(layout, 2, rows=2).parts[name] for name in ("products", "attention", "memory")) / 2
    in_pieces = replace(layout, virtual_pipeline_model_parallel_size=2)
    sends = 2 * 2 * 64 * 4096 * 2 / (450e9 * 0.65)
    assert _time(layout, 2, rows=2).pipeline == pytest.approx(one + 2 * sends / 2, rel=1e-6)
    assert _time(in_pieces, 2, rows=2).pipeline == pytest.approx(one / 2 + 2 * sends, rel=1e-6)


def test_the_host_is_the_least_time_of_a_layer() -> None:
    slow = setting_for(train_config(model=DENSE), host_ms_per_layer=1000.0)
    assert _time(BF16, 1, setting=slow).total == pytest.approx(16 * 4.0, rel=0.01)


def test_a_cpu_starts_and_computes_one_after_the_other() -> None:
    """Four layers of a second each for 16 micro-batches, and then the same products as without."""
    setting = setting_for(train_config(model=DENSE), host_ms_per_layer=1000.0)
    hardware = replace(setting.machine.hardware, is_asynchronous=False)
    on_cpu = replace(setting, machine=replace(setting.machine, hardware=hardware))
    free = setting_for(train_config(model=DENSE), host_ms_per_layer=0.0)
    assert _time(BF16, 1, setting=on_cpu).total == pytest.approx(16 * 4.0 + _time(BF16, 1, setting=free).total)


def test_experts_beyond_the_node_wait_for_the_network() -> None:
    inside = _time(replace(BF16, expert_model_parallel_size=8), 16, MOE)
    beyond = _time(replace(BF16, expert_model_parallel_size=16), 16, MOE)
    assert beyond.experts > 4 * inside.experts > 0.0


def test_overlapped_gradients_hide_behind_the_last_micro_batch() -> None:
    setting = setting_for(train_config(model=DENSE), **SHARES)
    overlapped = replace(setting, optimizer=OptimizerConfig(overlap_grad_reduce=True, overlap_param_gather=True))
    apart, together = _time(BF16, 2, setting=setting), _time(BF16, 2, setting=overlapped)
    weights = 4 * (64 * 384 + 3 * 64 * 96 + 2 * 64 + 32) + 2 * 192 * 64 + 64
    assert apart.gradients == pytest.approx(weights * 6 / 2 / (450e9 * 0.65))
    assert together.gradients == 0.0 and together.products == apart.products
    short = replace(setting, optimizer=OptimizerConfig(gradients="bf16"))
    assert _time(BF16, 2, setting=short).gradients == pytest.approx(apart.gradients * 4 / 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini", "mini recomputed", "flash over tensor ranks"])
def test_work_and_traffic_of_a_slice_are_those_of_the_engine(name: str) -> None:
    """Some layers of the real models, one row of 8192 tokens; links as fast between nodes as inside."""
    config, num_gpus = slice_of(name)
    layout, rates = config.parallel, dict(product_efficiency=1.0, attention_efficiency=1.0, host_ms_per_layer=0.0)
    setting = setting_for(config, **rates, expert_imbalance=1.0)
    machine = replace(setting.machine, links=Links(1.0, 1.0, 8))
    (work,) = assumed_work(config, setting.machine.assumptions)
    time = plan_stage(replace(setting, machine=machine), work, Candidate(layout, num_gpus)).time
    answer = measure(config, layout, num_gpus, 0, "one").worst
    assert (time.products + time.attention) * machine.product_rate == pytest.approx(answer.flops, rel=0.1)

    def expected(group: str, size: int, *kinds: str) -> float:
        """Bytes that leave a rank: all but its own share."""
        sent = sum(entry.num_bytes for entry in answer.traffic if entry.group == group and entry.kind in kinds)
        return sent * (size - 1) / size

    ep, tp = layout.expert_model_parallel_size, layout.tensor_model_parallel_size
    assert time.experts == pytest.approx(expected("ep", ep, "all_to_all"), rel=0.1)
    assert time.tensor == pytest.approx(expected("tp", tp, "all_gather", "reduce_scatter"), rel=0.1)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [(1, 1, 0.0), (8, 1, 7 / 8 / 100), (2, 8, 1 / 2 / 10), (16, 1, 15 / 16 / 80), (4, 4, 3 / 4 / 20)],
)
def test_a_ring_goes_over_the_network_of_all_its_members(size: int, stride: int, expected: float) -> None:
    """Rates of 100 in a node and 10 a GPU to others: two nodes of eight members have 80 between them."""
    assert LINKS.ring_seconds(1.0, size, stride) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [(1, 1, 0.0), (8, 1, 7 / 8 / 100), (16, 1, (1 / 2 - 1 / 16) / 100 + 1 / 2 / 10), (2, 8, 1 / 2 / 10)],
)
def test_an_exchange_goes_over_each_gpu_s_own_network(size: int, stride: int, expected: float) -> None:
    assert LINKS.exchange_seconds(1.0, size, stride) == pytest.approx(expected)
