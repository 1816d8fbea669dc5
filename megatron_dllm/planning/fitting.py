"""Whether a training job can fit at all, asked before it is queued: closed form alone, and no torch.

Only what cannot be is refused: experts are taken as balanced and the whole memory of a GPU counts, so a job that
passes may still be tight (`python -m megatron_dllm.plan` says how tight).
"""

from __future__ import annotations

from dataclasses import fields

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.planning.options import near_options, remedy
from megatron_dllm.planning.run_plan import plan_run, setting_of
from megatron_dllm.planning.screen import shortfall
from megatron_dllm.planning.work import assumed_work


def why_not(config: TrainConfig, cluster: ClusterConfig, nodes: int) -> str | None:
    """One sentence with what is missing and what would fit; None where the job fits, or the hardware is not known.

    Args:
        config: of the job, validated for its ranks.
        cluster: on which it is to run.
        nodes: that it is to have.
    """
    if not cluster.gpus_per_node or not cluster.hardware.memory_gb:
        return None
    kept = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    assumptions = AssumptionsConfig(expert_imbalance=1.0, memory_limit=1.0)
    planned = PlanConfig(**kept, cluster=cluster, nodes=nodes, assumptions=assumptions)
    setting, work = setting_of(planned), assumed_work(planned, assumptions)
    plan = plan_run(planned, setting, work, planned.num_gpus)
    if plan.fits:
        return None
    options = near_options(planned, setting, work, plan)
    return f"{shortfall(plan)}; {remedy(planned, setting, work, options)}"
