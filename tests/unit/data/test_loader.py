"""A global batch is the same rows whatever the layout; prefetching moves neither numbers nor positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import BatchLoader, GlobalStep, RowDataset
from megatron_dllm.data.memory_source import MemorySource
from megatron_dllm.data.packing import RowStream
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.data.spans_file import write_spans
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from tests.unit.data.conftest import MASK, PAD, random_documents
from tests.unit.data.random_spans import expected_kinds, random_spans

GEOMETRY = RowGeometry("block_diffusion", 4, 32, 64, 1)
AR = RowGeometry("ar", 1, 32, 64, 0)
NOISE = NoiseSpec("block", True, True, "elbo", 0.1, 0.9, 1)
DOCUMENTS = random_documents(120)


@pytest.fixture
def dataset(write_corpus: Callable[..., str], model: ModelConfig) -> RowDataset:
    return RowDataset(
        Corpus(write_corpus(DOCUMENTS), model), GEOMETRY, NOISE, seed=5, mask_token_id=MASK, pad_token_id=PAD
    )


def new_stream(dataset: RowDataset, shuffle: bool = True) -> RowStream:
    return RowStream(dataset.source.document_lengths, seed=5, chunk=32, shuffle=shuffle)


def take(dataset: RowDataset, stream: RowStream, num_steps: int, **settings: Any) -> list[GlobalStep]:
    loader = BatchLoader(dataset, stream, **({"global_batch_size": 8, "micro_batch_size": 2} | settings))
    return [step for _, step in zip(range(num_steps), loader, strict=False)]


def rows_of(batches: list[Batch]) -> list[tuple]:
    """Every row of the batches as something comparable."""
    return [
        (batch.input_ids[i].tolist(), batch.roles[i].tolist(), int(batch.row_keys[i]))
        for batch in batches
        for i in range(len(batch.input_ids))
    ]


def assert_same(one: list[GlobalStep], other: list[GlobalStep]) -> None:
    assert len(one) == len(other)
    for step, expected_step in zip(one, other, strict=True):
        assert step.stream_state == expected_step.stream_state
        for batch, expected_batch in zip(step.micro_batches, expected_step.micro_batches, strict=True):
            for field in fields(Batch):
                assert torch.equal(getattr(batch, field.name), getattr(expected_batch, field.name)), field.name


def test_row_holds_the_documents_tokens(dataset: RowDataset) -> None:
    stream = new_stream(dataset)
    for _ in range(20):
        plan = stream.next(GEOMETRY)
        row = dataset[plan]
        expected_ids = [DOCUMENTS[d][o + i] for d, o, n, _ in plan.segments.tolist() for i in range(n)]
        noisy = row.roles[:, 2] == 1
        unmasked = ~row.is_masked[noisy]
        assert (row.input_ids[noisy][unmasked] == np.array(expected_ids)[unmasked]).all()
        assert row.target_ids.tolist() == np.array(expected_ids)[~unmasked].tolist()
        offsets = np.cumsum([0, *map(len, DOCUMENTS)])
        assert row.sample_ids.tolist() == [offsets[d] + o for d, o, _, _ in plan.segments.tolist()]


@pytest.mark.parametrize(("size", "micro_batch_size"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_global_batch_is_the_same_rows_in_every_layout(dataset: RowDataset, size: int, micro_batch_size: int) -> None:
    expected_steps = take(dataset, new_stream(dataset), 5)
    ranks = [
        take(
            dataset,
            new_stream(dataset),
            5,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )
        for rank in range(size)
    ]
    for number, expected_step in enumerate(expected_steps):
        steps = [rank[number] for rank in ranks]
        assert all(step.stream_state == expected_step.stream_state for step in steps)
        in_order = [step.micro_batches[j] for j in range(len(steps[0].micro_batches)) for step in steps]
        assert rows_of(in_order) == rows_of(expected_step.micro_batches)
        for name in ("num_maskable", "num_document_tokens", "num_forward_tokens"):
            assert sum(getattr(b, name) for b in in_order) == sum(getattr(b, name) for b in expected_step.micro_batches)
        for name in ("num_document_tokens", "num_forward_tokens"):
            expected_total = sum(int(getattr(batch, name)) for batch in in_order)
            assert {getattr(step, name) for step in steps} == {expected_total}


def test_a_rising_level_follows_the_tokens_and_not_the_start(dataset: RowDataset) -> None:
    """t_max is that of the stage's progress when the global batch begins, from whatever step the run goes on."""
    rising = replace(dataset, noise=replace(NOISE, t_max_start=0.2, t_max_ramp_share=0.5))
    steps = take(rising, new_stream(rising), 6, progress=lambda tokens: tokens / 2000)
    done = np.cumsum([0] + [step.num_document_tokens for step in steps])
    largest = [max(float(batch.target_t.max()) for batch in step.micro_batches) for step in steps]
    for consumed, t in zip(done[:-1], largest, strict=True):
        t_max = min(0.2 + 0.7 * consumed / 1000, 0.9)
        assert t_max - 0.08 < t <= t_max + 1e-6
    assert largest[0] < 0.2 < 0.5 < largest[-1]
    stream = new_stream(rising)
    stream.load_state_dict(steps[2].stream_state)
    later = take(rising, stream, 3, progress=lambda tokens: (done[3] + tokens) / 2000)
    assert_same(later, steps[3:])


@pytest.mark.ranks
def test_workers_change_nothing(dataset: RowDataset) -> None:
    expected_steps = take(dataset, new_stream(dataset), 6)
    stream = new_stream(dataset)
    assert_same(take(dataset, stream, 6, num_workers=2), expected_steps)
    # The workers were ahead; the position is not.
    assert stream.state_dict() == expected_steps[-1].stream_state


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.ranks)])
def test_resume_at_any_step_continues_bitwise(dataset: RowDataset, num_workers: int) -> None:
    expected_steps = take(dataset, new_stream(dataset), 24)  # more than an epoch
    assert expected_steps[-1].stream_state["epoch"] >= 1
    for step in (1, 7):
        stream = new_stream(dataset)
        stream.load_state_dict(expected_steps[step - 1].stream_state)
        assert_same(take(dataset, stream, 24 - step, num_workers=num_workers), expected_steps[step:])


@pytest.mark.ranks
def test_next_stage_continues_with_the_same_stream(dataset: RowDataset) -> None:
    ar = RowDataset(dataset.source, AR, None, seed=5, mask_token_id=MASK, pad_token_id=PAD)
    stream = new_stream(dataset)
    steps = take(dataset, stream, 2, num_workers=1) + take(ar, stream, 3)
    expected_stream = new_stream(dataset)
    for number, step in enumerate(steps):
        plans = [expected_stream.next(GEOMETRY if number < 2 else AR) for _ in range(8)]
        used = ar if number >= 2 else dataset
        expected_ids = [used[plan].input_ids.tolist() for plan in plans]
        assert [row[0] for row in rows_of(step.micro_batches)] == expected_ids


def test_validation_ends_and_pads_the_last_step(dataset: RowDataset) -> None:
    expected_rows = rows_of(
        [b for s in take(dataset, new_stream(dataset, False), 2, num_rows=13) for b in s.micro_batches]
    )
    assert len(expected_rows) == 16
    assert [set(row[0]) == {PAD} for row in expected_rows] == [False] * 13 + [True] * 3
    ranks = [
        take(
            dataset,
            new_stream(dataset, False),
            99,
            num_rows=13,
            micro_batch_size=1,
            data_parallel_rank=r,
            data_parallel_size=2,
        )
        for r in range(2)
    ]
    assert [len(steps) for steps in ranks] == [2, 2]
    rows = [
        rows_of([step.micro_batches[j]])[0] for k in range(2) for j in range(4) for step in (ranks[0][k], ranks[1][k])
    ]
    assert rows == expected_rows


def test_loading_leaves_the_random_state_alone(dataset: RowDataset) -> None:
    torch.manual_seed(0)
    expected_state = torch.get_rng_state()
    take(dataset, new_stream(dataset), 1)
    assert torch.equal(torch.get_rng_state(), expected_state)


@pytest.mark.parametrize(("num_rows", "expected_steps"), [(8, 1), (9, 2), (20, 3)])
def test_a_loader_that_ends_knows_its_steps(num_rows: int, expected_steps: int, dataset: RowDataset) -> None:
    loader = BatchLoader(dataset, new_stream(dataset), global_batch_size=8, micro_batch_size=2, num_rows=num_rows)
    assert loader.num_steps == len(list(loader)) == expected_steps
    assert BatchLoader(dataset, new_stream(dataset), global_batch_size=8, micro_batch_size=2).num_steps is None


def test_a_global_batch_that_cannot_be_dealt_is_asserted(dataset: RowDataset) -> None:
    with pytest.raises(AssertionError, match=r"global_batch_size \(8\) must be a multiple of .*\(3 x 1\)"):
        BatchLoader(dataset, new_stream(dataset), global_batch_size=8, micro_batch_size=3)


# --- spans, and a source that is not a corpus -------------------------------------------------------------------


@dataclass(frozen=True)
class Squares:
    """A source made up in a few lines: document d is d % 7 + 8 tokens, all 100 + d; its second half carries a loss."""

    num_documents: int
    name: str = "squares"
    num_bytes: None = None

    @property
    def document_lengths(self) -> np.ndarray:
        return 8 + np.arange(self.num_documents) % 7

    @property
    def num_tokens(self) -> int:
        return int(self.document_lengths.sum())

    @property
    def spans(self) -> Spans:
        return Spans.of_lists([[(int(n) // 2, int(n), MASKABLE)] for n in self.document_lengths])

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        return np.full(length, 100 + document)

    def sample_id(self, document: int, offset: int) -> int:
        return 1000 * document + offset


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.ranks)])
def test_a_source_of_a_few_lines_is_read_like_a_corpus(num_workers: int) -> None:
    source = Squares(40)
    dataset = RowDataset(source, GEOMETRY, NOISE, seed=5, mask_token_id=MASK, pad_token_id=PAD)
    stream = RowStream(source.document_lengths, 5, 32, spans=source.spans)
    steps = take(dataset, stream, 2, num_workers=num_workers)
    batches = [batch for step in steps for batch in step.micro_batches]
    for batch in batches:
        documents = batch.sample_ids[batch.target_segments] // 1000
        assert torch.equal(batch.target_ids, 100 + documents) and len(documents)
        positions = batch.position_ids.flatten()[batch.target_positions]
        assert (positions >= (8 + documents % 7) // 2).all()
    for name in ("num_document_tokens", "num_forward_tokens"):
        totals = [sum(int(getattr(batch, name)) for batch in step.micro_batches) for step in steps]
        assert totals == [getattr(step, name) for step in steps]


def test_siblings_have_the_same_noise() -> None:
    documents, ids = [list(range(3, 11))] * 3, [(5 << 8) + 1, (5 << 8) + 7, (6 << 8) + 1]
    source = MemorySource(documents, ids)
    dataset = RowDataset(source, GEOMETRY, replace(NOISE, is_stratified=False), 5, MASK, PAD, num_sibling_bits=8)
    plans = RowStream(source.document_lengths, 5, 32, shuffle=False)
    row = dataset[plans.next(GEOMETRY)]
    masked = {int(key): row.is_masked[(row.roles[:, 0] == number)] for number, key in enumerate(row.sample_ids)}
    assert (masked[ids[0]] == masked[ids[1]]).all() and (masked[ids[0]] != masked[ids[2]]).any()


def test_spans_beside_a_corpus_say_what_carries_a_loss(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    prefix = write_corpus(DOCUMENTS)
    lengths = [len(document) for document in DOCUMENTS]
    spans = random_spans(lengths)
    write_spans(Path(prefix + ".spans"), spans)
    corpus = Corpus(prefix, model)
    dataset = RowDataset(corpus, GEOMETRY, NOISE, seed=5, mask_token_id=MASK, pad_token_id=PAD)
    stream = RowStream(corpus.document_lengths, 5, 32, spans=corpus.spans)
    num_maskable = 0
    for _ in range(20):
        plan = stream.next(GEOMETRY)
        row = dataset[plan]
        expected = [k for d, o, n, _ in plan.segments.tolist() for k in expected_kinds(spans, d, lengths[d])[o : o + n]]
        assert row.num_maskable == expected.count(MASKABLE) > 0
        num_maskable += row.num_maskable
    assert num_maskable < sum(lengths)
