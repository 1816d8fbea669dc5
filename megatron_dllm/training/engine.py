"""Model chunks, their data-parallel wrapper and the optimizer: what one rank trains with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_dllm.config import OptimizerConfig, TrainConfig
from megatron_dllm.model.attention.backends import BACKENDS, Backend
from megatron_dllm.model.gpt import build_model
from megatron_dllm.model.paths import Paths, choose_paths
from megatron_dllm.parallel.device import DeviceFacts, local_device
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.parallel.optimizer_parts import optimizer_parts
from megatron_dllm.training.finalizing import gradient_finalizer
from megatron_dllm.training.offload import offload_adam
from megatron_dllm.training.parameter_rates import rate_overrides
from megatron_dllm.training.self_check import check_paths, check_together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """The local part of the model, its optimizer, and the groups it is split over."""

    # megatron-core's DistributedDataParallel, whose methods torch's Module does not have.
    chunks: list[Any]
    optimizer: MegatronOptimizer
    groups: Groups

    @property
    def transformer_config(self) -> TransformerConfig:
        """megatron-core's TransformerConfig of the chunks."""
        return self.chunks[0].config


def paths_here(config: TrainConfig, is_training: bool) -> Paths:
    """What runs on this process's device."""
    backend = config.training.attention_backend
    return choose_paths(config.model, config.parallel, DeviceFacts.here(), backend, is_training, config.optimizer)


def _announced_paths(config: TrainConfig, groups: Groups, is_training: bool) -> Paths:
    """What runs on this process's device, which the first rank logs."""
    paths = paths_here(config, is_training)
    if groups.world.rank() == 0:
        # What is slower than it needs to be shows on every terminal.
        is_slow = torch.cuda.is_available() and not paths.uses_transformer_engine
        log.log(logging.WARNING if is_slow else logging.INFO, "%s", paths)
    return paths


def build_chunks(
    config: TrainConfig,
    groups: Groups,
    is_training: bool = False,
    paths: Paths | None = None,
    backends: Mapping[str, Backend] = BACKENDS,
) -> list[nn.Module]:
    """The model chunks of this pipeline rank (several with virtual stages), in the training precision.

    Args:
        config: of the run.
        groups: of its layout.
        is_training: gradients are needed.
        paths: the implementations; None: those chosen for this process's device, which are logged.
        backends: of attention, by name.
    """
    paths = paths or _announced_paths(config, groups, is_training)
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks: list[nn.Module] = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunks.append(
            build_model(
                config.model,
                config.parallel,
                groups,
                vp_stage=vp_stage,
                paths=paths,
                training=config.training,
                backends=backends,
            )
        )
    if config.parallel.precision != "fp32":
        return [Float16Module(chunk.config, chunk) for chunk in chunks]
    return chunks


def build_engine(
    config: TrainConfig, groups: Groups, paths: Paths | None = None, backends: Mapping[str, Backend] = BACKENDS
) -> Engine:
    """Build model, data-parallel wrapper and distributed optimizer, with weights not loaded yet.

    Args:
        config: of the run.
        groups: of its layout.
        paths: the implementations; None: those chosen for this process's device, and checked on it.
        backends: of attention, by name.

    Raises:
        ValueError: on every rank, where a fast path gives other numbers than the plain one on some rank's device.
    """
    if paths is None:
        paths = _announced_paths(config, groups, is_training=True)
        chosen = paths
        check_together(lambda: check_paths(chosen, config, local_device()))
    chunks = build_chunks(config, groups, is_training=True, paths=paths, backends=backends)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.optimizer.gradients == "fp32",
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    megatron_config = _megatron_config(config.optimizer, config.parallel.precision)
    overrides = rate_overrides(config, wrapped, megatron_config)
    optimizer = get_megatron_optimizer(megatron_config, wrapped, overrides, use_gloo_process_groups=False)
    if config.optimizer.offload == "cpu":
        offload_adam(optimizer, config.optimizer)
    elif paths.fusions.name == "compiled":
        fuse_adam(optimizer)
    transformer_config = wrapped[0].config
    transformer_config.finalize_model_grads_func = gradient_finalizer(groups)
    transformer_config.grad_scale_func = None
    if config.optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        start = [chunk.start_grad_sync for chunk in wrapped]
        transformer_config.no_sync_func = no_sync[0] if len(wrapped) == 1 else no_sync
        if config.parallel.virtual_pipeline_model_parallel_size:
            transformer_config.grad_sync_func = start
    return Engine(wrapped, optimizer, groups)


def _megatron_config(optimizer: OptimizerConfig, precision: str) -> MegatronOptimizerConfig:
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=1.0,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision != "fp32",
        params_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_param_gather=optimizer.overlap_param_gather,
        log_num_zeros_in_grad=False,
        **moment_settings(optimizer.moments),
    )
    # The distributed optimizer leaves gradients and fp32 weights to the one behind it. By the public flag it would
    # insist on TransformerEngine's.
    if optimizer.offload == "cpu":
        settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    return settings


def moment_settings(precision: str) -> dict[str, Any]:
    """How megatron-core is told to keep the moments; the fp32 weights stay whole, as checkpoints hold them."""
    if precision == "fp32":
        return {}
    return dict(
        use_precision_aware_optimizer=True,
        store_param_remainders=False,
        exp_avg_dtype=torch.bfloat16,
        exp_avg_sq_dtype=torch.bfloat16,
    )


def fuse_adam(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam update each parameter by one kernel, which reads and writes everything once.

    Before the first step. megatron-core takes torch's Adam where neither TransformerEngine nor Apex has one, and asks
    it for nothing; by itself it chooses a kernel for every operation. Other optimizers stay as they are.
    """
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False


@contextmanager
def gathered_parameters(engine: Engine, is_gathered_late: bool) -> Iterator[None]:
    """Have whole weights while the block runs, where a step's weights are gathered only in the next forward pass."""
    if not is_gathered_late:
        yield
        return
    for chunk in engine.chunks:
        chunk.disable_forward_pre_hook(param_sync=True)
    yield
    for chunk in engine.chunks:
        chunk.enable_forward_pre_hook()
