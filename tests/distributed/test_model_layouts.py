"""Every layout, started from one checkpoint, gives the loss and the gradients of one rank that skips nothing.

The loss is that of confidence-aware training, which uses all that the head says of a target.

Gradients are compared whole: each rank writes its main gradients through the model's own sharded state dict, so
what is compared has the names and shapes of the undivided model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ranks import run_ranks
from megatron_dllm.config import CapConfig, ModelConfig, ParallelConfig, RotaryScalingConfig, RunConfig, TrainingConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.model.objective import cap_loss
from tests.reference_model import random_weights, tiny_model, to_megatron
from tests.tiny_batch import tiny_batch

ROWS = [[16, 8], [23]]
ROW_LENGTH = 48
# Layouts (with their dispatcher) whose last layer computes every token: see model.last_layer.can_skip_outputs.
PLAIN = {("expert", "allgather"), ("context_expert", "allgather"), ("ulysses", "allgather")}
Case = tuple[str, str, str]
Result = tuple[list[float], dict[str, Tensor]]
NOISE = dict(mask_noise_sigma=0.4, noise_seed=11)
CAP = CapConfig(coefficient=2.0, temperature=0.7)

LAYOUTS = {
    "tensor": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)),
    "pipeline": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "interleaved": (2, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "expert": (2, ParallelConfig(expert_model_parallel_size=2)),
    "context": (2, ParallelConfig(context_parallel_size=2)),
    "tensor_expert": (
        2,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
    ),
    "context_expert": (2, ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2)),
    "ulysses": (2, ParallelConfig(context_parallel_size=2, context_parallel_method="ulysses")),
    "context_tensor": (
        4,
        ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "tensor_only": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "recompute": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, recompute="full")),
    "pipeline_recompute": (2, ParallelConfig(pipeline_model_parallel_size=2, recompute="full")),
    "pipeline_selective": (2, ParallelConfig(pipeline_model_parallel_size=2, recompute="selective")),
}
MODELS: dict[str, dict[str, Any]] = {
    "ling": {},
    "tied": {"tie_word_embeddings": True},
    "dense": {"num_moe_experts": 0},
    "stretched": {"rotary_scaling": RotaryScalingConfig(factor=4.0, original_max_position_embeddings=16)},
}
# Layout, token dispatcher, model. A mixture of experts needs sequence parallelism, a dense model does not.
CASES: list[Case] = [(name, "allgather", "dense" if name == "tensor_only" else "ling") for name in LAYOUTS] + [
    ("expert", "alltoall", "ling"),
    ("context_expert", "alltoall", "ling"),
    ("tensor_expert", "alltoall", "ling"),
    ("pipeline", "allgather", "tied"),
    ("tensor", "allgather", "tied"),
    ("context", "allgather", "stretched"),
    ("ulysses", "allgather", "stretched"),
    ("context_tensor", "allgather", "stretched"),
    ("pipeline_recompute", "allgather", "stretched"),
]


def _model(name: str) -> ModelConfig:
    # So few tokens that some are guessed right by chance.
    return tiny_model(num_layers=4, vocab_size=16, mask_token_id=15, eos_token_id=14, pad_token_id=13, **MODELS[name])


def _weights(model: ModelConfig) -> dict[str, Tensor]:
    """Random weights whose router starves one expert, and in another layer all experts of the second of two ranks."""
    weights = random_weights(model)
    if model.is_moe:
        weights["model.layers.1.mlp.gate.expert_bias"][4:] = -100.0
        weights["model.layers.2.mlp.gate.expert_bias"][5] = -100.0
    return weights


def _rows(model: ModelConfig) -> list[Batch]:
    """Two micro-batches of one row."""
    return [tiny_batch(model, [row], ROW_LENGTH, block_size=4, seed=index) for index, row in enumerate(ROWS)]


def _loss(batch: Batch, groups: Any, output: TargetOutputs) -> tuple[Tensor, Tensor, Tensor]:
    found = cap_loss(CAP.coefficient, batch, output)
    sums, count = found.sums, found.count if groups.context.rank() == 0 else torch.tensor(0)
    logged = [sums.loss, sums.nll, sums.num_correct, *sums.extra.values()]
    levels = [table.sum(0) for table in sums.level_means.values()]
    return found.total, count.int(), torch.cat([torch.stack(logged), *levels])


def _forward(groups: Any, batches: Any, model: Any) -> tuple[Any, Any]:
    batch = next(batches)
    return model(batch, **NOISE, entropy_temperature=CAP.temperature), partial(_loss, batch, groups)


def _chunks(model: ModelConfig, layout: ParallelConfig, groups: Any, skips_outputs: bool = True) -> list[Any]:
    from megatron_dllm.model.gpt import build_model

    training = TrainingConfig(skip_unused_outputs=skips_outputs)
    chunks = []
    for stage in range(layout.virtual_pipeline_model_parallel_size or 1):
        vp_stage = stage if layout.virtual_pipeline_model_parallel_size else None
        chunks.append(build_model(model, layout, groups, vp_stage=vp_stage, training=training))
    return chunks


def _sharded(chunks: list[Any]) -> dict[str, Any]:
    return {f"chunk{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}


def _run_one_rank(folder: str) -> dict[str, Result]:
    """For every model: write the checkpoint that all layouts start from; give the loss and gradients of one rank."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_dllm.parallel import groups

    results = {}
    for name in MODELS:
        model, layout = _model(name), ParallelConfig()
        parallel_state.destroy_model_parallel()
        (built,) = _chunks(model, layout, groups.initialize(layout, RunConfig(name="test")))
        built.load_state_dict(to_megatron(model, _weights(model)), strict=False)
        dist_checkpointing.save(_sharded([built]), _fresh(folder, f"weights_{name}"))
        results[name] = _run_layout(name, layout, "allgather", folder, f"one_rank_{name}", skips_outputs=False)
    return results


def _run_cases(cases: list[Case], folder: str) -> list[Result]:
    return [
        _run_layout(
            model_name,
            LAYOUTS[name][1],
            dispatcher,
            folder,
            f"{name}_{dispatcher}_{model_name}",
            skips_outputs=(name, dispatcher) not in PLAIN,
        )
        for name, dispatcher, model_name in cases
    ]


def _run_layout(
    model_name: str, layout: ParallelConfig, dispatcher: str, folder: str, name: str, skips_outputs: bool
) -> Result:
    """Loss sums of the global batch and its gradients, of the whole model."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_dllm.parallel import groups

    model = _model(model_name)
    from megatron_dllm.run.place import world_size

    layout.validate(world_size(), model)
    parallel_state.destroy_model_parallel()
    made = groups.initialize(layout, RunConfig(name="test"))
    chunks = _chunks(model, replace(layout, moe_token_dispatcher=dispatcher), made, layout != ParallelConfig())
    assert not chunks[-1].post_process or chunks[-1].skips_outputs == skips_outputs, name
    loaded = dist_checkpointing.load(_sharded(chunks), f"{folder}/weights_{model_name}")
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk{index}"])
        chunk.train()
    sums = _forward_backward(model, chunks, made)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    gradients = _fresh(folder, name)
    dist_checkpointing.save(_sharded(chunks), gradients)
    tensors = dist_checkpointing.load_plain_tensors(gradients)
    return sums.tolist(), {key: value for key, value in tensors.items() if isinstance(value, Tensor)}


def _forward_backward(model: ModelConfig, chunks: list[Any], groups: Any) -> Tensor:
    """Run megatron-core's schedule over this rank's share of the rows; [10] sums of the global batch."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_dllm.data.context_shard import take_context_shard

    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
    wrapped[0].config.finalize_model_grads_func = finalize_model_grads
    context = groups.context
    rows = _rows(model)[groups.data.rank() :: groups.data.size()]
    batches = [take_context_shard(batch, context.rank(), context.size()) for batch in rows]
    iterators = [iter(batches) for _ in wrapped]
    sums = get_forward_backward_func()(
        forward_step_func=partial(_forward, groups),
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=wrapped,
        num_microbatches=len(batches),
        seq_length=ROW_LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    total = torch.stack(sums).sum(0) if sums else torch.zeros(10, dtype=torch.float64)
    if groups.tensor.rank() > 0:
        total.zero_()
    torch.distributed.all_reduce(total)
    return total


def _fresh(folder: str, name: str) -> str:
    """An empty folder, made by the first rank before any uses it."""
    path = Path(folder) / name
    if torch.distributed.get_rank() == 0:
        path.mkdir()
    torch.distributed.barrier()
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def expected(folder: str) -> dict[str, Result]:
    (results,) = run_ranks(_run_one_rank, 1, folder)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_layouts_give_the_loss_and_gradients_of_one_rank(
    world_size: int, folder: str, expected: dict[str, Result]
) -> None:
    cases = [case for case in CASES if LAYOUTS[case[0]][0] == world_size]
    for results in run_ranks(_run_cases, world_size, cases, folder):
        for case, (sums, gradients) in zip(cases, results, strict=True):
            expected_sums, expected_gradients = expected[case[2]]
            assert expected_sums[3] > 0.01 * expected_sums[0], "confidence has no part in the loss"
            assert sums == pytest.approx(expected_sums, rel=1e-5), case
            assert gradients.keys() == expected_gradients.keys(), case
            for key, expected_gradient in expected_gradients.items():
                if key.endswith("expert_bias"):
                    continue
                scale = float(expected_gradient.abs().max())
                assert scale > 0, f"{key} has no gradient: the comparison would say nothing"
                error = float((gradients[key] - expected_gradient).abs().max())
                assert error <= 2e-5 * scale, f"{case}: gradient of {key} is off by {error / scale:.1e} of its largest"
