"""Every dataclass of the configuration, with units, defaults and the rules that a run must satisfy.

Hydra composes YAML onto these classes (strict: an unknown key is an error); `TrainConfig.validate`
checks what types cannot, before any process group or device exists. Every failure is a ValueError
that says name (value), the rule, and the remedy.

Token counts are *document tokens*: tokens of the corpus, counted once however many noisy or clean
copies of them the model sees.
"""

from __future__ import annotations

from megatron_dllm.config.alignment import AlignmentConfig
from megatron_dllm.config.annealing import AttentionAnnealConfig
from megatron_dllm.config.cap import CapConfig
from megatron_dllm.config.data import DataConfig, NoiseConfig
from megatron_dllm.config.distill import DistillConfig, TeacherConfig
from megatron_dllm.config.generate import DecodingConfig, GenerateConfig
from megatron_dllm.config.model import ModelConfig
from megatron_dllm.config.parallel import ParallelConfig
from megatron_dllm.config.preference import PreferenceConfig, ReferenceConfig
from megatron_dllm.config.rotary_scaling import RotaryScalingConfig
from megatron_dllm.config.run import CheckpointConfig, EvaluationConfig, LoggingConfig, OptimizerConfig, RunConfig
from megatron_dllm.config.schedule import ScheduleConfig, StageConfig
from megatron_dllm.config.sft import SftConfig
from megatron_dllm.config.study import StudyConfig
from megatron_dllm.config.train import TrainConfig
from megatron_dllm.config.training import TrainingConfig

__all__ = [
    "AlignmentConfig",
    "AttentionAnnealConfig",
    "CapConfig",
    "CheckpointConfig",
    "DataConfig",
    "DecodingConfig",
    "DistillConfig",
    "EvaluationConfig",
    "GenerateConfig",
    "LoggingConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreferenceConfig",
    "ReferenceConfig",
    "RotaryScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SftConfig",
    "StageConfig",
    "StudyConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainingConfig",
]
