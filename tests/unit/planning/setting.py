"""A machine, and runs to be planned on it."""

from __future__ import annotations

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.hardware import HardwareConfig
from megatron_dllm.planning.layout_plan import Setting
from megatron_dllm.planning.links import Links
from megatron_dllm.planning.timing import Machine

H100 = HardwareConfig(
    memory_gb=80, bf16_tflops=989, memory_gb_per_s=3350, node_gb_per_s=450, network_gb_per_s=50, price_per_hour=2.0
)


def setting_for(config: TrainConfig, memory_gb: float = 80.0, **assumed: float) -> Setting:
    """Nodes of eight H100, with as much memory as is asked for."""
    hardware = HardwareConfig(**{**vars(H100), "memory_gb": memory_gb})
    assumptions = AssumptionsConfig(**assumed)
    links = Links.of(ClusterConfig(hardware=hardware), assumptions)
    return Setting(config.model, config.training, config.optimizer, Machine(hardware, links, assumptions))
