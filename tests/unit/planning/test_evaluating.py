"""What a plan of an evaluation says, against what measuring the ELBO allocates here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_dllm.config import EvaluationConfig, ParallelConfig, ScheduleConfig, TrainConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.planning.evaluating import EvaluationPlan, plan_evaluation
from tests.planning_case import MODEL
from tests.unit.config.configs import stage_config
from tests.unit.planning.setting import setting_for

CONTEXT_LENGTH, ROW_LENGTH = 256, 768


def _config(vocab_size: int, rows: int, **evaluation: Any) -> PlanConfig:
    measured = EvaluationConfig(block_sizes=[32], num_tokens=8 * CONTEXT_LENGTH, micro_batch_size=rows)
    schedule = ScheduleConfig(CONTEXT_LENGTH, row_length=ROW_LENGTH, stages={"one": stage_config()})
    model = replace(MODEL, vocab_size=vocab_size)
    assumptions = AssumptionsConfig(expert_imbalance=1.0, reserve_gb=0.0)
    return PlanConfig(
        model=model,
        schedule=schedule,
        evaluation=replace(measured, **evaluation),
        cluster=ClusterConfig(gpus_per_node=1),
        assumptions=assumptions,
    )


def _plan(config: PlanConfig) -> EvaluationPlan:
    training = TrainConfig(model=config.model, parallel=config.parallel)
    return plan_evaluation(config, setting_for(training, expert_imbalance=1.0, reserve_gb=0.0))


def _measure(config: PlanConfig, groups: Any) -> tuple[int, int]:
    """Bytes of the weights, and of the peak beside them, of a real measurement on this CPU."""
    import torch

    from megatron_dllm.evaluation.elbo import score_corpus
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts
    from megatron_dllm.planning.engine_memory import LiveMemory
    from megatron_dllm.planning.engine_rows import FullDocuments

    corpus, memory = FullDocuments(CONTEXT_LENGTH, config.model.vocab_size), LiveMemory()
    lengths = corpus.document_lengths[: config.evaluation.num_tokens // CONTEXT_LENGTH]
    with memory:
        paths = choose_paths(config.model, config.parallel, DeviceFacts.here(), "auto")
        model = build_model(config.model, config.parallel, groups, paths=paths, training=config.training).eval()
        weights = memory.live
        memory.start_peak()
        found = list(score_corpus([model], config, groups, corpus, lengths, "32", torch.device("cpu")))
    assert sum(len(scores.means) for scores in found) == len(lengths)
    return weights, memory.peak - weights


@pytest.mark.parametrize(("vocab_size", "rows", "moment"), [(1024, 4, "activations"), (32768, 1, "head")])
def test_an_evaluation_holds_what_is_planned(vocab_size: int, rows: int, moment: str, one_rank: Any) -> None:
    """The weights, and the activations of a layer or the logits, whichever are more."""
    config = _config(vocab_size, rows)
    weights, peak = _measure(config, one_rank)
    planned = _plan(config).worst
    assert planned.weights == pytest.approx(weights, rel=0.01)
    assert planned.parts[moment] == planned.total - planned.weights == pytest.approx(peak, rel=0.1)


def test_pipeline_ranks_divide_the_layers_and_the_last_one_has_the_logits() -> None:
    config = _config(32768, 1)
    config.parallel, config.cluster.gpus_per_node = ParallelConfig(pipeline_model_parallel_size=2), 2
    first, last = _plan(config).memory
    assert first.head == 0 < first.activations and last.activations == 0 < last.head


def test_what_is_measured_beside_the_elbo_takes_time_too() -> None:
    """The exact NLL of the next token reads clean tokens alone: more documents to a row, and every token a target."""
    plain, both = (_plan(_config(1024, 1, with_ar=with_ar)) for with_ar in (False, True))
    assert [time.name for time in plain.times] == ["32"] and [time.name for time in both.times] == ["32", "ar"]
    diffusion, ar = both.times
    assert ar.row.targets == ar.row.document_tokens == ROW_LENGTH and ar.number < diffusion.number
    assert both.seconds == pytest.approx(plain.seconds + ar.seconds)
