"""Numbers a user relies on, through the real data path and the real model: ELBO, pruning, both grids."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dllm.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import RowPlan, RowStream
from megatron_dllm.data.row import build_row
from megatron_dllm.data.row_tokens import RowContent
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.parallel.groups import Groups
from tests.reference_model import random_weights, tiny_model, to_megatron

CONTEXT, ROW = 16, 48


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    return tiny_model()


@pytest.fixture(scope="module")
def built(one_rank: None, model_config: ModelConfig) -> Any:
    from megatron_dllm.model.gpt import build_model

    model = build_model(model_config, ParallelConfig(), Groups.current())
    model.load_state_dict(to_megatron(model_config, random_weights(model_config)), strict=False)
    return model


@pytest.fixture(scope="module")
def corpus(one_rank: None, model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Documents from 1 token to beyond the context."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_dllm.data.corpus import Corpus

    prefix = str(tmp_path_factory.mktemp("corpus") / "text")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(3)
    for length in [1, 5, 16, 40, 7, 12, 3, 33, 16, 2, 20, 9]:
        builder.add_document(torch.randint(model_config.vocab_size - 4, (length,), generator=generator), [length])
    builder.finalize(prefix + ".idx")
    return Corpus(prefix, model_config)


def _config(model: ModelConfig, corpus: Any, **data: Any) -> TrainConfig:
    stage = StageConfig(block_size=4, num_tokens=1000, global_batch_size=1, learning_rate=1e-3)
    return TrainConfig(
        run=RunConfig(name="test"),
        model=model,
        data=DataConfig(train=corpus.prefix, packing_chunk=4, **data),
        schedule=ScheduleConfig(context_length=CONTEXT, row_length=ROW, stages={"only": stage}),
        evaluation=EvaluationConfig(block_sizes=[1], num_tokens=60),
    )


def _segments(config: TrainConfig, corpus: Any, name: str) -> list[tuple[int, int, int]]:
    """(document, offset, length) of the segments that validation reads."""
    from megatron_dllm.evaluation.elbo import validation_geometry, validation_lengths

    lengths = validation_lengths(corpus, config.evaluation.num_tokens)
    stream = RowStream(lengths, 0, config.data.packing_chunk, shuffle=False)
    geometry = validation_geometry(config, name)
    segments = []
    while (plan := stream.next(geometry)).epoch == 0:
        segments += [tuple(int(x) for x in segment[:3]) for segment in plan.segments]
    return segments


def _sequential_nll(model: Any, tokens: Tensor, mask_token_id: int) -> float:
    """Exact NLL left to right: for each position one dense pass over the clean prefix and one mask token."""
    total = 0.0
    for place in range(len(tokens)):
        ids = torch.cat([tokens[:place], torch.tensor([mask_token_id])])[None]
        blocks = torch.arange(place + 1)
        view = torch.zeros_like(blocks)
        view[-1] = 1
        roles = torch.stack([torch.zeros_like(blocks), blocks, view], -1).int()[None]
        logits = model.head_logits(model.states(ids, blocks[None], roles, torch.tensor([place])))
        total -= float(logits.double().log_softmax(-1)[0, tokens[place]])
    return total


@torch.no_grad()
def test_elbo_at_block_size_1_is_the_exact_sequential_nll(built: Any, corpus: Any, model_config: ModelConfig) -> None:
    from megatron_dllm.evaluation.elbo import evaluate

    config = _config(model_config, corpus)
    result = evaluate([built], config, Groups.current(), corpus, ["1"], torch.device("cpu"))
    segments = _segments(config, corpus, "1")
    expected_nll = sum(
        _sequential_nll(built, torch.from_numpy(corpus.read(*segment)), model_config.mask_token_id)
        for segment in segments
    )
    num_tokens = sum(length for _, _, length in segments)
    assert result.conditions is not None and result.conditions.num_tokens == num_tokens >= 60
    assert result.nats_per_token["1"] == pytest.approx(expected_nll / num_tokens, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block_origin", ["document", "row"])
def test_blocks_of_one_token_with_a_shift_have_the_nll_of_the_ar_model(
    built: Any, corpus: Any, model_config: ModelConfig, block_origin: str
) -> None:
    from megatron_dllm.evaluation.elbo import evaluate

    config = _config(model_config, corpus, block_origin=block_origin)
    here = (Groups.current(), corpus)
    exact = evaluate([built], config, *here, ["ar"], torch.device("cpu")).nats_per_token["ar"]
    shifted = evaluate([built], config, *here, ["1", "4"], torch.device("cpu"), shift=True).nats_per_token
    assert shifted["1"] == pytest.approx(exact, rel=1e-6)
    assert shifted["4"] != pytest.approx(exact, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("num_views", [1, 2])
def test_a_shifted_loss_is_that_of_its_description(
    built: Any, corpus: Any, model_config: ModelConfig, num_views: int
) -> None:
    """Every target by itself: one dense pass over the clean blocks, and the noisy block where it is not its first."""
    spec = NoiseSpec("block", True, True, "elbo", 0.05, 0.95, num_views, "stratified")
    from megatron_dllm.data.batch import collate
    from megatron_dllm.evaluation.scores import score_documents

    size, length = 4, 13
    geometry = RowGeometry("block_diffusion", size, CONTEXT, 48, num_views, shift=True)
    tokens = torch.from_numpy(corpus.read(3, 0, length))
    plan, content = RowPlan(np.array([[3, 0, length, 0]]), 0), RowContent(tokens.numpy(), np.array([0]))
    ids = (model_config.mask_token_id, model_config.pad_token_id)
    batch = collate([build_row(plan, content, geometry, spec, seed=1, mask_token_id=ids[0], pad_token_id=ids[1])])
    loss = float((built(batch).nll * batch.loss_weights).sum())
    expected_scores = []
    for view in range(1, num_views + 1):
        mine = batch.roles[0, :, 2] == view
        positions = batch.position_ids[0, mine]
        noisy = torch.full((length,), -1)
        noisy[positions] = batch.input_ids[0, mine]
        weight = dict(zip(batch.target_positions.tolist(), batch.loss_weights.tolist(), strict=True))
        slot_of = dict(zip(positions.tolist(), mine.nonzero().squeeze(1).tolist(), strict=True))
        expected_scores.append(0.0)
        for place in range(1, length):
            begin = place // size * size
            is_first = place == begin
            if not is_first and noisy[place] != model_config.mask_token_id:
                continue
            ids = tokens[:begin] if is_first else torch.cat([tokens[:begin], noisy[begin : begin + size]])
            places = torch.arange(len(ids))
            roles = torch.stack([places * 0, places // size, (places >= begin).long()], -1).int()[None]
            slot = torch.tensor([place - 1])
            logits = built.head_logits(built.states(ids[None], places[None], roles, slot))
            nll = -float(logits.double().log_softmax(-1)[0, tokens[place]])
            expected_scores[-1] -= nll * (1.0 if is_first else weight[slot_of[place - 1]])
    assert loss == pytest.approx(-sum(expected_scores), rel=1e-5)
    scores = score_documents([built], [batch], torch.device("cpu"), Groups.current(), num_views)
    assert scores.by_view[0].tolist() == pytest.approx(expected_scores, rel=1e-5)


@torch.no_grad()
def test_elbo_bounds_the_block_wise_likelihood(built: Any, corpus: Any, model_config: ModelConfig) -> None:
    """The same rows and noise give the same ELBO again, and another block size gives another one."""
    from megatron_dllm.evaluation.elbo import evaluate

    config = _config(model_config, corpus)
    first, again = (
        evaluate([built], config, Groups.current(), corpus, ["1", "8"], torch.device("cpu")) for _ in range(2)
    )
    assert first == again and first.conditions is not None and first.conditions.num_tokens >= 60
    assert first.nats_per_token["1"] != first.nats_per_token["8"]


def _loss_and_gradients(
    model: Any, config: TrainConfig, corpus: Any, stage: StageConfig, rows: int
) -> tuple[float, dict[str, Tensor], int]:
    from megatron_dllm.data.batch import collate
    from megatron_dllm.data.loader import RowDataset

    geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
    dataset = RowDataset(
        corpus,
        geometry,
        NoiseSpec.for_stage(config.noise, stage),
        7,
        config.model.mask_token_id,
        config.model.pad_token_id,
    )
    stream = RowStream(corpus.document_lengths, 7, 4, shuffle=False)
    model.zero_grad(set_to_none=True)
    total, forward_tokens, documents = 0.0, 0, 0
    while documents < rows:
        plan = stream.next(geometry)
        documents += len({int(d) for d in plan.segments[:, 0]})
        batch = collate([dataset[plan]])
        loss = (model(batch).nll * batch.loss_weights).sum()
        loss.backward()
        total, forward_tokens = total + float(loss), forward_tokens + int(batch.num_forward_tokens)
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, forward_tokens


@pytest.mark.parametrize("origin", ["document", "row"])
@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize(("block_size", "shift"), [(1, None), (4, None), (16, None), (1, True), (4, True)])
def test_pruning_clean_blocks_changes_no_number(
    built: Any, corpus: Any, model_config: ModelConfig, origin: str, num_views: int, block_size: int, shift: bool | None
) -> None:
    """A clean block that no later block reads may be left out: same loss, same gradients, fewer tokens."""
    stage = StageConfig(
        block_size=block_size, num_tokens=1000, global_batch_size=1, learning_rate=1e-3, num_views=num_views, t_min=0.0
    )
    stage.shift = shift
    config = _config(model_config, corpus, block_origin=origin)
    config.schedule.row_length = corpus.num_tokens * stage.num_views  # so that a chunk's segments share one row, always
    loss, gradients, tokens = _loss_and_gradients(built, config, corpus, stage, 4)
    whole = replace(config, data=replace(config.data, prune_clean=False))
    expected_loss, expected_gradients, expected_tokens = _loss_and_gradients(built, whole, corpus, stage, 4)
    assert tokens < expected_tokens or block_size == 16
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, expected in expected_gradients.items():
        assert float((gradients[name] - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-9, name


def _batches(config: TrainConfig, corpus: Any, stage: StageConfig) -> list[Any]:
    """The rows of all documents, one a batch."""
    from megatron_dllm.data.batch import collate
    from megatron_dllm.data.loader import RowDataset
    from megatron_dllm.model.objective import objective_of

    geometry, model = RowGeometry.of_stage(stage, config.schedule, config.data), config.model
    noise = objective_of(stage, config.noise).noise
    dataset = RowDataset(corpus, geometry, noise, 7, model.mask_token_id, model.pad_token_id)
    stream, batches = RowStream(corpus.document_lengths, 7, 4, shuffle=False), []
    while (plan := stream.next(geometry)).epoch == 0:
        batches.append(collate([dataset[plan]]))
    return batches


@torch.no_grad()
def test_the_ar_loss_of_clean_tokens_is_the_nll_of_the_ar_model(
    built: Any, corpus: Any, model_config: ModelConfig
) -> None:
    """Beside the noisy copies the clean ones compute what an AR model does, bit by bit or nearly."""
    config = _config(model_config, corpus)
    guided = replace(config.schedule.stages["only"], clean_block_size=1, ar_weight=0.5)
    causal = replace(guided, objective="ar", clean_block_size=None, ar_weight=0.0)

    def nlls(stage: StageConfig) -> dict[tuple[int, int], float]:
        found = {}
        for batch in _batches(config, corpus, stage):
            values, places = built(batch).nll.tolist(), batch.position_ids.flatten()[batch.target_positions].tolist()
            rows = zip(
                values, places, batch.sample_ids[batch.target_segments].tolist(), batch.target_views, strict=True
            )
            found |= {(sample, place): value for value, place, sample, view in rows if view == 0}
        return found

    found, expected = nlls(guided), nlls(causal)
    assert found.keys() == expected.keys() and len(found) > 100
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-6 * max(expected.values())


@torch.no_grad()
def test_the_served_mask_is_measured_unless_another_is_asked_for(
    built: Any, corpus: Any, model_config: ModelConfig
) -> None:
    from megatron_dllm.evaluation.elbo import diffusion_names, evaluate

    config = _config(model_config, corpus)
    served = EvaluationConfig(block_sizes=[4, 1], num_tokens=60, with_ar=True)
    causal = EvaluationConfig(block_sizes=[4, 1], num_tokens=60, clean_block_size=1)
    names = diffusion_names(served)
    assert (names, diffusion_names(causal)) == (["4", "1", "ar"], ["4", "1"])
    first, other = (
        evaluate([built], replace(config, evaluation=e), Groups.current(), corpus, names, torch.device("cpu"))
        for e in (served, causal)
    )
    assert first.nats_per_token["4"] != other.nats_per_token["4"]
    assert all(first.nats_per_token[name] == other.nats_per_token[name] for name in ("1", "ar"))
    assert (first.target_block_size, first.difference(other)) == (4, "blocks document, not document, clean blocks of 1")


def test_ar_targets_without_weight_change_no_number(built: Any, corpus: Any, model_config: ModelConfig) -> None:
    """The clean tokens that only an AR target needs are read by no noisy one: same diffusion loss and gradients."""
    config = _config(model_config, corpus)
    config.schedule.row_length = 2 * corpus.num_tokens  # so that a chunk's segments share one row, always
    results = []
    for weight in (0.5, 0.0):
        stage = replace(config.schedule.stages["only"], clean_block_size=1, ar_weight=weight)
        built.zero_grad(set_to_none=True)
        total = 0.0
        for batch in _batches(config, corpus, stage):
            loss = (built(batch).nll * batch.loss_weights * (batch.target_views > 0)).sum()
            loss.backward()
            total += float(loss)
        results.append((total, {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}))
    (loss_value, gradients), (expected_loss, expected_gradients) = results
    assert loss_value == pytest.approx(expected_loss, rel=1e-6)
    for name, expected in expected_gradients.items():
        assert float((gradients[name] - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-9, name


@dataclass(frozen=True)
class _Answer:
    """One conversation: a prompt of 1000 tokens and an answer of 216, which ends with a block of 32."""

    vocab_size: int
    name: str = "answer"
    num_bytes: None = None
    num_tokens: int = 1216
    document_lengths: Any = field(default_factory=lambda: np.array([1216]))
    spans: Spans = field(default_factory=lambda: Spans.of_lists([[(1000, 1216, MASKABLE)]]))

    def read(self, document: int, offset: int, length: int) -> Any:
        return np.random.default_rng(4).integers(0, self.vocab_size - 4, self.num_tokens)[offset : offset + length]

    def sample_id(self, document: int, offset: int) -> int:
        return offset


@pytest.mark.parametrize(
    ("num_views", "relation", "expected_tokens"),
    [(1, "stratified", (1408, 2400)), (2, "complementary", (1632, 3616)), (2, "stratified", (1632, 3616))],
)
def test_blocks_that_no_answer_needs_change_no_number(
    built: Any, model_config: ModelConfig, num_views: int, relation: str, expected_tokens: tuple[int, int]
) -> None:
    """A prompt's noisy copy and the clean copy of the last block may be left out: same loss, same gradients."""
    from megatron_dllm.data.batch import collate
    from megatron_dllm.data.loader import RowDataset

    source = _Answer(model_config.vocab_size)
    spec = NoiseSpec("block", True, True, "elbo", 0.05, 0.95, num_views, relation)
    results = []
    # The unpruned layout also keeps the clean copy of the last block, which the figures of 2400 and 3616 leave out.
    whole = expected_tokens[1] + 32
    for prune_clean, num_tokens in ((True, expected_tokens[0]), (False, whole)):
        geometry = RowGeometry("block_diffusion", 32, 1216, whole, num_views, prune_clean=prune_clean)
        dataset = RowDataset(source, geometry, spec, 7, model_config.mask_token_id, model_config.pad_token_id)
        batch = collate([dataset[RowStream(source.document_lengths, 7, 4, spans=source.spans).next(geometry)]])
        assert int(batch.num_forward_tokens) == num_tokens and int(batch.num_maskable) == 216 * num_views
        built.zero_grad(set_to_none=True)
        loss = (built(batch).nll * batch.loss_weights).sum() / batch.num_maskable
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}
        results.append((float(loss), gradients))
    (loss_value, gradients), (expected_loss, expected_gradients) = results
    assert loss_value == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    differences = {name: (gradients[name] - expected).norm() for name, expected in expected_gradients.items()}
    whole_norm = torch.stack([expected.norm() for expected in expected_gradients.values()]).norm()
    assert torch.stack(list(differences.values())).norm() <= 1e-6 * whole_norm
    for name, expected in expected_gradients.items():  # a few fp32 roundings of its own sums
        assert float(differences[name]) <= 5e-6 * float(expected.norm()) + 1e-9, name
