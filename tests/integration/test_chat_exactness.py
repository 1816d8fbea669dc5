"""Chats through the real rows and the real model: the loss is that of the serving of each turn, and of nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.random_roles import draw_inputs
from megatron_dllm.config import (
    CapConfig,
    DataConfig,
    DecodingConfig,
    EvaluationConfig,
    ModelConfig,
    NoiseConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SftConfig,
    StageConfig,
    TrainConfig,
)
from megatron_dllm.config.sft import TURN_BOUNDARIES
from megatron_dllm.data.batch import Batch, collate
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import RowPlan
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.diffusion.decode import DecodingContract, decode
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.diffusion.roles import VIEW
from megatron_dllm.evaluation.conditions import SEED
from megatron_dllm.evaluation.elbo import evaluate
from megatron_dllm.model.attention.backends import Backend
from megatron_dllm.model.objective import objective_of
from megatron_dllm.model.pipeline import EmbeddingNoise
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.training.replay import replay_step
from tests.reference_model import random_weights, tiny_model, to_megatron
from tests.unit.model.attention.test_backends import BACKENDS, expected_results, greatest_error, results

MODEL = tiny_model()
EOS, MASK = MODEL.eos_token_id, MODEL.mask_token_id
# Question and answer lengths of each chat; blocks of 8 and 4 end inside most turns.
TURNS = [[(3, 5), (4, 6), (2, 3)], [(9, 4)], [(1, 2), (1, 1), (5, 9)], [(6, 2), (3, 7)]]
PAIR = StageConfig(
    block_size=8,
    num_tokens=100,
    global_batch_size=1,
    learning_rate=1e-3,
    loss_weight="uniform",
    num_views=2,
    view_relation="complementary",
    t_min=0.2,
    t_max=0.8,
    sft=SftConfig(),
)


@dataclass(frozen=True)
class Chats:
    """Chats of random tokens; `changed` documents have other tokens from a place on."""

    turns: list[list[tuple[int, int]]]
    changed_from: int | None = None
    name: str = "chats"
    fingerprint: str = "chats"
    num_bytes: None = None

    @property
    def document_lengths(self) -> Any:
        return np.array([sum(map(sum, turns)) for turns in self.turns])

    @property
    def num_tokens(self) -> int:
        return 10_000  # more than a row, whatever its length

    @property
    def spans(self) -> Spans:
        documents = []
        for turns in self.turns:
            stops = np.cumsum([part for turn in turns for part in turn]).tolist()
            documents.append([(stops[i], stops[i + 1], MASKABLE) for i in range(0, len(stops), 2)])
        return Spans.of_lists(documents)

    def read(self, document: int, offset: int, length: int) -> Any:
        tokens = np.random.default_rng(document).integers(0, 90, 100)
        if self.changed_from is not None:
            tokens[self.changed_from :] = (tokens[self.changed_from :] + 7) % 90
        return tokens[offset : offset + length]

    def sample_id(self, document: int, offset: int) -> int:
        return 1000 * document + offset


def build(model: ModelConfig = MODEL) -> Any:
    from megatron_dllm.model.gpt import build_model

    made = build_model(model, ParallelConfig(), Groups.current())
    made.load_state_dict(to_megatron(model, random_weights(model)), strict=False)
    return made


@pytest.fixture(scope="module")
def built(one_rank: None) -> Any:
    return build()


def rows(
    source: Chats,
    stage: StageConfig,
    documents: list[int],
    seed: int = 7,
    row_length: int = 800,
    noise: NoiseSpec | None = None,
    **geometry: Any,
) -> Batch:
    """The documents in one row, each in the place of the epoch that its number gives."""
    rules = RowGeometry(
        "block_diffusion",
        stage.block_size,
        64,
        row_length,
        stage.num_views,
        fill=stage.sft.fill,
        turn_boundary=stage.sft.turn_boundary,
        **geometry,
    )
    dataset = RowDataset(source, rules, noise or NoiseSpec.for_stage(NoiseConfig(), stage), seed, MASK, 93, EOS)
    lengths = source.document_lengths
    segments = np.array([[document, 0, lengths[document], document] for document in documents])
    return collate([dataset[RowPlan(segments, 0)]])


def loss_of(model: Any, batch: Batch, stage: StageConfig = PAIR) -> tuple[Tensor, Tensor]:
    """The loss, not divided, and the NLL of each target."""
    outputs = model(batch)
    return objective_of(stage, NoiseConfig()).loss(batch, outputs).total, outputs.nll


def served_nll(model: Any, history: Tensor, block: Tensor, answers: Tensor, size: int) -> Tensor:
    """NLL [n] of the masked tokens of a block, as a server computes it that has read the history and nothing else.

    Args:
        model: to ask.
        history: [h] int64 tokens before the block, whole blocks.
        block: [size] int64 what the block shows.
        answers: [n] int64 what stands behind its mask tokens.
        size: of a block.
    """
    ids = torch.cat([history, block])
    positions = torch.arange(len(ids))
    view = (positions >= len(history)).int()
    targets = torch.nonzero(ids == MASK).flatten()
    zero = torch.zeros(len(targets))
    return model(
        Batch(
            input_ids=ids[None],
            position_ids=positions[None],
            roles=torch.stack([torch.zeros_like(view), (positions // size).int(), view], -1)[None],
            is_masked=(ids == MASK)[None],
            target_positions=targets,
            target_ids=answers,
            target_t=zero,
            loss_weights=zero,
            is_fill=zero.bool(),
            is_ar_target=zero.bool(),
            sample_ids=torch.zeros(1, dtype=torch.int64),
            num_segments=torch.ones(1, dtype=torch.int64),
            segment_epochs=torch.zeros(1, dtype=torch.int64),
            segment_maskable=torch.ones(1, dtype=torch.int64),
            row_keys=torch.zeros(1, dtype=torch.int64),
            **{name: torch.tensor(1) for name in ("num_maskable", "num_answers", "num_ar_maskable")},
            **{name: torch.tensor(1) for name in ("num_document_tokens", "num_forward_tokens")},
        )
    ).nll


@pytest.mark.parametrize("size", [4, 8])
@torch.no_grad()
def test_each_noisy_block_is_what_a_server_sees(built: Any, size: int) -> None:
    source, stage = Chats(TURNS), replace(PAIR, block_size=size)
    batch = rows(source, stage, [0, 1, 2, 3])
    nll = built(batch).nll
    roles, compared = batch.roles[0], 0
    for key in torch.unique(roles[batch.target_positions], dim=0):
        mine = (roles == key).all(-1)
        is_target = mine[batch.target_positions]
        document, block = int(key[0]), int(key[1])
        assert int(mine.sum()) == size and key[VIEW] > 0, "whole blocks are decoded"
        history = torch.from_numpy(source.read(document, 0, block * size))
        expected = served_nll(built, history, batch.input_ids[0, mine], batch.target_ids[is_target], size)
        torch.testing.assert_close(nll[is_target], expected, rtol=1e-5, atol=1e-5)
        compared += int(is_target.sum())
    assert compared == len(nll) > 50


@pytest.mark.parametrize("t", [(0.001, 1.0), (0.2, 0.3)])
@torch.no_grad()
def test_blocks_of_one_token_give_the_sequential_nll_of_the_answers(built: Any, t: tuple[float, float]) -> None:
    """Whatever t is, since every block has a masked token and the weights are corrected for that."""
    stage = replace(PAIR, block_size=1, num_views=1, view_relation="stratified", loss_weight="elbo")
    stage = replace(stage, t_min=t[0], t_max=t[1], sft=SftConfig(fill="none"))
    source = Chats(TURNS)
    batch = rows(source, stage, [0, 1, 2, 3])
    total, _ = loss_of(built, batch, stage)
    expected = []
    for document, turns in enumerate(TURNS):
        place = 0
        for question, answer in turns:
            for position in range(place + question, place + question + answer):
                tokens = torch.from_numpy(source.read(document, 0, position + 1))
                mask = torch.tensor([MASK])
                expected.append(float(served_nll(built, tokens[:-1], mask, tokens[-1:], 1)))
            place += question + answer
    assert int(batch.num_maskable) == len(expected)
    assert float(total / batch.num_maskable) == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize(("boundary", "leaks"), [("split_views", False), ("mask_later", False), ("all", True)])
@torch.no_grad()
def test_a_later_turn_changes_an_earlier_one_in_the_naive_mode_alone(built: Any, boundary: str, leaks: bool) -> None:
    """Chat 3: an answer of tokens 6 and 7 in a block of 16, then another turn in the same block."""
    stage = replace(PAIR, block_size=16, sft=SftConfig(turn_boundary=boundary))
    found = []
    for source in (Chats(TURNS), Chats(TURNS, changed_from=8)):
        batch = rows(source, stage, [3])
        positions = batch.position_ids[0, batch.target_positions]
        is_copy = batch.roles[0, batch.target_positions, VIEW] <= 2
        is_mine = (positions < 8) & is_copy
        assert batch.target_ids[is_mine].tolist() and set(positions[is_mine].tolist()) == {6, 7}
        found.append(built(batch).nll[is_mine])
    assert torch.equal(*found) != leaks


def test_pruning_changes_no_number(built: Any) -> None:
    results = []
    for prune_clean in (True, False):
        batch = rows(Chats(TURNS), PAIR, [0, 1, 2, 3], prune_clean=prune_clean)
        built.zero_grad(set_to_none=True)
        total, _ = loss_of(built, batch)
        (total / batch.num_maskable).backward()
        gradients = [p.grad.clone().flatten() for p in built.parameters() if p.grad is not None]
        results.append((float(total / batch.num_maskable), torch.cat(gradients), int(batch.num_forward_tokens)))
    (loss, gradient, tokens), (expected_loss, expected_gradient, expected_tokens) = results
    assert tokens < expected_tokens
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert float((gradient - expected_gradient).norm()) <= 1e-6 * float(expected_gradient.norm())


@torch.no_grad()
def test_a_pair_with_uniform_weights_trains_each_token_once(built: Any) -> None:
    batch = rows(Chats(TURNS), PAIR, [0, 1, 2, 3])
    total, nll = loss_of(built, batch)
    num_answer = sum(answer for turns in TURNS for _, answer in turns)
    assert int((~batch.is_fill).sum()) == num_answer
    assert len(nll) * 2 == int(batch.num_maskable)
    # No token of a noisy block is the target of both views.
    roles = batch.roles[0, batch.target_positions]
    places = [roles[:, 0], (roles[:, VIEW] - 1) // 2, batch.position_ids[0, batch.target_positions]]
    assert len(set(zip(*(column.tolist() for column in places), strict=True))) == len(nll)
    assert float(total / batch.num_maskable) == pytest.approx(float(nll.sum()) / len(nll) / 2, rel=1e-6)


@torch.no_grad()
def test_packed_chats_lose_what_each_loses_alone(built: Any) -> None:
    source = Chats(TURNS)
    packed, _ = loss_of(built, rows(source, PAIR, [2, 0, 3, 1]))
    expected = sum(float(loss_of(built, rows(source, PAIR, [document]))[0]) for document in range(4))
    assert float(packed) == pytest.approx(expected, rel=1e-6)
    stage = replace(PAIR, sft=SftConfig(loss_per="answer"))
    batch = rows(source, stage, [0, 1, 2, 3])
    assert int(batch.num_answers) == 2 * sum(map(len, TURNS))
    packed = loss_of(built, batch, stage)[0]
    expected = sum(float(loss_of(built, rows(source, stage, [document]), stage)[0]) for document in range(4))
    assert float(packed) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_a_model_that_knows_nothing_loses_log_v(one_rank: None) -> None:
    model = build()
    model.output_layer.weight.zero_()
    batch = rows(Chats(TURNS), PAIR, [0, 1, 2, 3])
    total, nll = loss_of(model, batch)
    assert torch.allclose(nll, torch.tensor(math.log(MODEL.vocab_size)), rtol=1e-6)
    # A pair masks every token in one of its two views, which are both counted.
    assert float(total / batch.num_maskable) == pytest.approx(math.log(MODEL.vocab_size) / 2, rel=1e-6)


def test_the_elbo_weights_of_a_constant_nll_give_it_on_average() -> None:
    stage = replace(PAIR, num_views=1, view_relation="stratified", loss_weight="elbo", t_min=0.001, t_max=1.0)
    source = Chats(TURNS)
    means = []
    for seed in range(300):
        batch = rows(source, stage, [0, 1, 2, 3], seed=seed)
        means.append(float(batch.loss_weights.sum() / batch.num_maskable))
    assert np.mean(means) == pytest.approx(1.0, abs=4 * np.std(means) / math.sqrt(len(means)))
    assert np.std(means) < 0.5


@pytest.mark.parametrize(
    "stage",
    [replace(PAIR, cap=CapConfig(coefficient=2.0)), replace(PAIR, sft=SftConfig(loss_per="answer"))],
    ids=["confidence", "per answer"],
)
def test_a_replay_gives_the_loss_of_the_step(built: Any, stage: StageConfig) -> None:
    """Row by row on one rank, with the step's own denominator."""
    batches = [rows(Chats(TURNS), stage, documents) for documents in ([0, 3], [1, 2])]
    objective = objective_of(stage, NoiseConfig())
    found = replay_step(built, [batches[:1], batches[1:]], objective, EmbeddingNoise(), torch.device("cpu"))
    total, count = 0.0, 0
    for batch in batches:
        outputs = built(batch, entropy_temperature=objective.entropy_temperature)
        loss = objective.loss(batch, outputs)
        total, count = total + loss.total.item(), count + int(loss.count)
    assert found.loss == pytest.approx(total / count, rel=1e-6) and len(found.rows) == 2
    assert count == sum(int(objective.count(batch)) for batch in batches)


def test_a_chat_that_is_learned_by_heart_is_answered_and_ended(one_rank: None) -> None:
    """The last block, most of which is fill, takes no more passes than others."""
    from megatron_dllm.inference.cached_forward import CachedForward

    model, source = build(), Chats([[(5, 21)]])  # answer: tokens 5..25, the last block begins at 24
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(300):
        batch = rows(source, PAIR, [0], seed=step, row_length=184)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        optimizer.zero_grad()
        total, _ = loss_of(model, batch)
        (total / batch.num_maskable).backward()
        optimizer.step()
    model.eval()
    tokens = source.read(0, 0, 26).tolist()
    contract = DecodingContract(block_size=8, context_length=64, mask_token_id=MASK, eos_token_ids=(EOS,))
    found = decode(CachedForward(model), tokens[:5], DecodingConfig(threshold=0.9, max_new_tokens=40), contract)
    assert found.stop_reason == "eos" and found.generated_ids == [*tokens[5:], EOS]
    assert len(found.steps_per_block) == 4 and found.steps_per_block[-1] <= max(found.steps_per_block[:-1])


@pytest.mark.parametrize("boundary", ["split_views", "mask_later"])
@torch.no_grad()
def test_a_validation_measures_chats_in_the_rows_of_training(built: Any, boundary: str) -> None:
    """Each chat alone in its row, its fill and turns as the stage says, under the noise of a validation."""
    source, size, sft = Chats(TURNS), PAIR.block_size, SftConfig(turn_boundary=boundary)
    stage = replace(PAIR, num_views=1, view_relation="independent", sft=sft)
    config = TrainConfig(
        run=RunConfig(name="test"),
        model=MODEL,
        data=DataConfig(train="chats", packing_chunk=4),
        schedule=ScheduleConfig(context_length=64, row_length=800, stages={"sft": stage}),
        evaluation=EvaluationConfig(block_sizes=[size], num_tokens=10_000),
    )
    expected = 0.0
    num_supervised = 0
    for document in range(len(TURNS)):
        batch = rows(source, stage, [document], SEED, noise=NoiseSpec.for_validation())
        expected += float((built(batch).nll.double() * batch.loss_weights).sum())
        num_supervised += int(batch.num_maskable)
    found = evaluate([built], config, Groups.current(), source, [str(size)], torch.device("cpu"), sft=sft)
    assert found.nats_per_token[str(size)] == pytest.approx(expected / num_supervised, rel=1e-6)
    assert found.conditions is not None
    assert found.conditions.blocks == f"document, fill eos, turns {boundary}"
    if boundary == "split_views":
        ends = [np.cumsum([part for turn in turns for part in turn])[1::2] for turns in TURNS]
        answers = sum(answer for turns in TURNS for _, answer in turns)
        assert num_supervised == answers + sum(int((-stops % size).sum()) for stops in ends)
    plain = evaluate([built], config, Groups.current(), source, [str(size)], torch.device("cpu"))
    assert plain.nats_per_token != found.nats_per_token and plain.difference(found)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("boundary", TURN_BOUNDARIES)
def test_every_attention_backend_computes_the_rows_of_chats(backend: Backend, boundary: str) -> None:
    roles = rows(Chats(TURNS), replace(PAIR, sft=SftConfig(turn_boundary=boundary)), [0, 1, 2, 3], row_length=400).roles
    assert (int(roles[..., VIEW].max()) > PAIR.num_views) == (boundary == "split_views")
    inputs, grad = draw_inputs(roles, roles)
    found, expected = (compute(inputs, grad, roles, roles) for compute in (partial(results, backend), expected_results))
    assert greatest_error(found, expected) < 1e-12
