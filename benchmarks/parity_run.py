"""The ranks' side of the parity table: train two steps from the common checkpoint, gather and compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.parity_layouts import (
    EMBEDDING_NOISE,
    EXPECTED,
    LEARNING_RATE,
    SECOND_CORPUS,
    SKIPPING,
    STAGES,
    Layout,
    train_config,
)
from benchmarks.tiny_run import write_corpus
from megatron_dllm.config import RunConfig, TrainConfig

NUM_STEPS = 2
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """What a layout made of one stage. Weights are whole tensors by their global names, on rank 0 alone.

    `replica_spread` is the largest difference between two ranks' copies of the same weights.
    """

    losses: list[float]
    grad_norms: list[float]
    fingerprints: list[str]
    weights: Weights = field(default_factory=dict)
    replica_spread: float = 0.0


@dataclass(frozen=True)
class Difference:
    """Relative differences from one rank; weights and update by their worst tensor."""

    loss: float
    grad_norm: float
    weights: float
    update: float
    replica_spread: float
    worst_tensor: str


def prepare(folder: str, variants: set[str]) -> dict[str, Trained]:
    """On one rank: write corpora, start checkpoints and the expected weights of every stage of these variants."""
    from megatron.core import parallel_state

    from megatron_dllm.parallel import groups

    path = Path(folder)
    write_corpus(path / "corpus", num_documents=300)
    write_corpus(path / SECOND_CORPUS, num_documents=200, seed=1)
    results = {}
    for variant in variants:
        layout = EXPECTED[variant]
        made = groups.initialize(layout.parallel, RunConfig(name="parity"))
        if not (path / _start(layout)).exists():
            write_start(replace(layout, parallel=replace(layout.parallel, precision="fp32")), path, made)
        for stage in STAGES:
            trained = train(layout, stage, path, made)
            save_file(trained.weights, str(path / f"{stage}_{variant}.safetensors"))
            results[f"{stage}_{variant}"] = replace(trained, weights={})
        parallel_state.destroy_model_parallel()
    return results


def compare(
    layout: Layout, folder: str, expected: dict[str, Trained], stages: list[str]
) -> dict[str, tuple[Difference | None, list[str]]]:
    """On every rank: for each stage the layout's difference (on rank 0) and this rank's fingerprints."""
    from megatron_dllm.parallel import groups

    path = Path(folder)
    results: dict[str, tuple[Difference | None, list[str]]] = {}
    start = load_file(str(path / f"{_start(layout)}.safetensors"))
    made = groups.initialize(layout.parallel, RunConfig(name="parity"))
    for stage in stages:
        with _dropped_gradients(layout.defect):
            trained = train(layout, stage, path, made)
        key = f"{stage}_{layout.variant}"
        difference = None
        if dist.get_rank() == 0:
            difference = _difference(layout, trained, expected[key], load_file(str(path / f"{key}.safetensors")), start)
        results[stage] = (difference, trained.fingerprints)
    return results


def train(layout: Layout, stage: str, folder: Path, groups: Any) -> Trained:
    """Two optimizer steps of a stage from the start checkpoint, with the program's own loader, engine and step."""
    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.model.objective import objective_of
    from megatron_dllm.model.pipeline import EmbeddingNoise
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.observers.fingerprint import step_fingerprint
    from megatron_dllm.training.parameter_rates import set_learning_rate
    from megatron_dllm.training.step import train_step
    from megatron_dllm.training.weighing import weigh_batches

    config = train_config(layout, STAGES[stage], folder / "corpus")
    if layout.defect is None:
        config.validate(dist.get_world_size())
    engine = build_engine(config, groups)
    _spoil(engine, layout.defect)
    objective = objective_of(config.schedule.stages["only"], config.noise)
    if layout.model == SKIPPING:
        _check_skipping(engine.chunks, layout not in EXPECTED.values())
    load_weights(folder / _start(layout), engine.chunks, hash_content=False)
    engine.optimizer.reload_model_params()
    set_learning_rate(engine.optimizer, LEARNING_RATE)
    losses, norms, fingerprints = [], [], []
    for index, step in enumerate(islice(_loader(config, groups), NUM_STEPS)):
        noise = EmbeddingNoise(EMBEDDING_NOISE.get(stage, 0.0), 1000 + index)
        batches, _ = weigh_batches(engine.chunks, step.micro_batches, torch.device("cpu"), groups, objective, None)
        result = train_step(engine, batches, torch.device("cpu"), objective.at(index), noise)
        assert result.is_applied, f"step {index} of {stage}: {result.reason}"
        losses.append(result.loss)
        norms.append(result.grad_norm)
        fingerprints.append(step_fingerprint(step.micro_batches, groups.data))
    if layout.has_overlap:
        for chunk in engine.chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
    weights, spread = gather_weights(engine.chunks)
    return Trained(losses, norms, fingerprints, weights, spread)


def _check_skipping(chunks: list[nn.Module], expected: bool) -> None:
    from megatron_dllm.model.gpt import DiffusionGPTModel

    for module in (module for chunk in chunks for module in chunk.modules() if isinstance(module, DiffusionGPTModel)):
        if module.post_process:
            assert module.skips_outputs == expected, "the comparison is about outputs that one side leaves out"


def _loader(config: TrainConfig, groups: Any) -> Iterator[Any]:
    from megatron_dllm.data.geometry import RowGeometry
    from megatron_dllm.data.loader import BatchLoader, RowDataset
    from megatron_dllm.diffusion.noise_spec import NoiseSpec
    from megatron_dllm.training.blends import stage_shares
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import new_stream

    stage, sources = config.schedule.stages["only"], Sources(config)
    stream = new_stream(config, sources)
    stream.use(stage_shares(config, sources)["only"])
    dataset = RowDataset(
        stream.documents,
        RowGeometry.of_stage(stage, config.schedule, config.data),
        None if stage.objective == "ar" else NoiseSpec.for_stage(config.noise, stage),
        config.run.seed,
        config.model.mask_token_id,
        config.model.pad_token_id,
        config.model.eos_token_id,
    )
    return iter(
        BatchLoader(
            dataset,
            stream,
            global_batch_size=stage.global_batch_size,
            micro_batch_size=stage.micro_batch_size,
            data_parallel_rank=groups.data.rank(),
            data_parallel_size=groups.data.size(),
        )
    )


def gather_weights(chunks: list[nn.Module]) -> tuple[Weights, float]:
    """Whole weights on rank 0 from every rank's shards, without the checkpoint writer; and the replicas' spread."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_dllm.checkpoint.sharded_state import model_state

    state = model_state(chunks)
    apply_factories(state)
    mine = [
        (
            tensor.key,
            tuple(tensor.global_shape),
            tuple(tensor.global_offset),
            tensor.data.detach().clone(),
            tensor.prepend_axis_num,
        )
        for tensor in nested_values(state)
        if isinstance(tensor, ShardedTensor)
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, everyone if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return {}, 0.0
    weights: Weights = {}
    spread = 0.0
    for key, shape, offset, data, num_prepended in (shard for shards in everyone for shard in shards):
        if key not in weights:
            weights[key] = torch.full(shape, float("nan"), dtype=data.dtype)
        data = data.reshape((1,) * num_prepended + tuple(data.shape))
        place = weights[key][tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))]
        if not place.isnan().any():
            spread = max(spread, float((place - data).abs().max()))
        else:
            place.copy_(data)
    holes = [key for key, tensor in weights.items() if tensor.isnan().any()]
    assert not holes, f"no rank holds all of {holes}"
    return weights, spread


def _difference(
    layout: Layout, trained: Trained, expected: Trained, expected_weights: Weights, start: Weights
) -> Difference:
    assert trained.weights.keys() == expected_weights.keys(), trained.weights.keys() ^ expected_weights.keys()
    by_weights, by_update = {}, {}
    for key, expected_tensor in expected_weights.items():
        tensor, reference = trained.weights[key].double(), expected_tensor.double()
        error = float((tensor - reference).norm())
        moved = float((reference - start[key].double()).norm())
        if layout.model == SKIPPING and key.endswith("expert_bias"):
            assert error == moved == 0, f"{key} moved, which stands still without an update rate"
            continue
        assert moved > 0, f"{key} did not move: the comparison would say nothing"
        by_weights[key] = error / float(reference.norm())
        by_update[key] = error / moved
    return Difference(
        loss=_relative(trained.losses, expected.losses),
        grad_norm=_relative(trained.grad_norms, expected.grad_norms),
        weights=max(by_weights.values()),
        update=max(by_update.values()),
        replica_spread=trained.replica_spread,
        worst_tensor=max(by_update, key=by_update.__getitem__),
    )


def _relative(values: list[float], expected: list[float]) -> float:
    return max(abs(value - e) / abs(e) for value, e in zip(values, expected, strict=True))


def _start(layout: Layout) -> str:
    return f"start_{layout.model.replace(' ', '_')}"


def write_start(layout: Layout, folder: Path, groups: Any) -> None:
    """Random weights, with router biases that are not zero, as a checkpoint and as plain tensors."""
    from megatron_dllm.checkpoint.meta import CheckpointMeta
    from megatron_dllm.checkpoint.saving import CheckpointWriter
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.start import semantics_of

    config = train_config(layout, STAGES["ar"], folder / "corpus")
    engine = build_engine(config, groups)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in engine.chunks[0].named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
    name = _start(layout)
    meta = CheckpointMeta(asdict(config.model), semantics_of(config, config.schedule.stages["only"]))
    written = CheckpointWriter(folder / f"written_{name}", groups.data_context).save(0, engine.chunks, None, meta, {})
    (folder / name).symlink_to(written)
    save_file(gather_weights(engine.chunks)[0], str(folder / f"{name}.safetensors"))


def _spoil(engine: Any, defect: str | None) -> None:
    """Make an engine that was built right wrong in the named way."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_dllm.model.norm import RMSNorm

    if defect == "unscaled_gradient":
        engine.transformer_config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: (
            finalize_model_grads(model, **kwargs)
        )
    elif defect == "unsummed_norms":
        for module in (module for chunk in engine.chunks for module in chunk.modules()):
            if isinstance(module, RMSNorm):
                module.weight.sequence_parallel = False


@contextmanager
def _dropped_gradients(defect: str | None) -> Iterator[None]:
    """Where that is the defect, drop the key gradients of other ranks while the block runs.

    A wrong backward pass is no part that a run could be handed, so this one replaces it on purpose.
    """
    from megatron_dllm.model.attention import context_parallel

    def own_part(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None

    with pytest.MonkeyPatch.context() as patch:
        if defect == "dropped_key_gradients":
            patch.setattr(context_parallel._GatherSequence, "backward", staticmethod(own_part))
        yield
