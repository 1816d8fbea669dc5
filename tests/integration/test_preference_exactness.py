"""Preferences through real rows and a real model: the two-pass step has the gradient of the loss as it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dllm.config import NoiseConfig, ParallelConfig, PreferenceConfig, SftConfig, StageConfig
from megatron_dllm.data.batch import Batch, collate
from megatron_dllm.data.costs import segment_costs
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import RowPlan
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.evaluation.scores import score_documents
from megatron_dllm.model.objective import Objective, objective_of
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.training.frozen import FrozenModel
from megatron_dllm.training.weighing import FrozenReference, StartRefused, check_start_margin, weigh_batches
from tests.reference_model import random_weights, tiny_model, to_megatron

MODEL = tiny_model()
EOS, MASK = MODEL.eos_token_id, MODEL.mask_token_id
CPU = torch.device("cpu")
# Prompt, chosen and rejected answer of each pair.
PAIRS = [(5, 9, 4), (12, 3, 17), (1, 20, 6)]
# Documents of the rows of two micro-batches: both sides of a pair in one row, in two rows, in two micro-batches.
ROWS = [[[0, 1], [2, 4]], [[5], [3]]]
STAGE = StageConfig(
    block_size=8,
    num_tokens=100,
    global_batch_size=4,
    learning_rate=1e-3,
    num_views=3,
    sft=SftConfig(),
    preference=PreferenceConfig(beta=0.2),
)


@dataclass(frozen=True)
class Pairs:
    """Pairs of random tokens: documents 2i and 2i + 1."""

    name: str = "pairs"
    num_tokens: int = 10_000  # more than a row, whatever its length

    @property
    def document_lengths(self) -> Any:
        return np.array([prompt + answer for prompt, *answers in PAIRS for answer in answers])

    @property
    def spans(self) -> Spans:
        return Spans.of_lists(
            [[(prompt, prompt + answer, MASKABLE)] for prompt, *answers in PAIRS for answer in answers]
        )

    def read(self, document: int, offset: int, length: int) -> Any:
        prompt = PAIRS[document // 2][0]
        tokens = np.random.default_rng(document // 2).integers(0, 90, 40)
        tokens[prompt:] = np.random.default_rng(100 + document).integers(0, 90, 40 - prompt)
        return tokens[offset : offset + length]

    def sample_id(self, document: int, offset: int) -> int:
        return document


def build(seed: int) -> Any:
    from megatron_dllm.model.gpt import build_model

    made = build_model(MODEL, ParallelConfig(), Groups.current())
    made.load_state_dict(to_megatron(MODEL, random_weights(MODEL)), strict=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * seed * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def models(one_rank: None) -> tuple[Any, Any]:
    """A model and a reference near it."""
    return build(1), build(0)


def geometry_of(stage: StageConfig) -> RowGeometry:
    return RowGeometry("block_diffusion", stage.block_size, 64, 640, stage.num_views, fill="eos")


def batches_of(stage: StageConfig) -> list[Batch]:
    source = Pairs()
    spec = NoiseSpec.for_stage(NoiseConfig(), stage)
    dataset = RowDataset(source, geometry_of(stage), spec, 7, MASK, 93, EOS)
    lengths = source.document_lengths
    rows = [[[[d, 0, lengths[d], d] for d in row] for row in batch] for batch in ROWS]
    return [collate([dataset[RowPlan(np.array(row), 0)] for row in batch]) for batch in rows]


def reference_of(model: Any) -> FrozenReference:
    return FrozenReference(FrozenModel([model], CPU, Groups.current()))


def document_sums(model: Any, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """[6] minus the weighted NLLs of each document, as autograd sees them, and [6] its maskable tokens."""
    sums, tokens = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for batch in batches:
        outputs = model(batch)
        sums = sums.index_add(0, batch.sample_ids[batch.target_segments], -(outputs.nll * batch.loss_weights).double())
        tokens[batch.sample_ids] = batch.segment_maskable.double()
    return sums, tokens


def gradient_of(model: Any) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


COUPLED = {"num_views": 2, "view_relation": "complementary"}


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({}, {}),
        ({"sft_coefficient": 0.05, "share_levels": True}, {}),
        ({"is_count": False}, {}),
        ({}, {"num_views": 1}),
        ({}, COUPLED),
    ],
    ids=["three views", "SFT term, shared levels", "levels", "the report's", "coupled"],
)
def test_two_passes_have_the_gradient_of_the_loss_itself(
    models: tuple[Any, Any], changes: dict[str, Any], views: dict[str, Any]
) -> None:
    model, frozen = models
    stage = replace(STAGE, preference=replace(STAGE.preference, **changes), **views)
    stage.validate("one", 64)
    beta, sft = stage.preference.beta, stage.preference.sft_coefficient
    batches, objective = batches_of(stage), objective_of(stage, NoiseConfig())

    sums, tokens = document_sums(model, batches)
    with torch.no_grad():
        reference, _ = document_sums(frozen, batches)
    gain = (sums - reference) / stage.num_views
    expected = -torch.log(torch.sigmoid(beta * (gain[0::2] - gain[1::2]))).mean()
    expected = expected - sft * sums[0::2].sum() / stage.num_views / tokens[0::2].sum()
    expected.backward()
    expected_gradient = gradient_of(model)

    weighed, weighing = weigh_batches([model], batches, CPU, Groups.current(), objective, reference_of(frozen))
    assert weighing is not None and weighing.largest_margin > 0.1, "the reference is another model"
    loss_sums = None
    for batch in weighed:
        found = objective.loss(batch, model(batch))
        (found.total / 6).backward()
        loss_sums = found.sums
    assert float(weighing.loss / weighing.count) == pytest.approx(float(expected), rel=1e-6)
    assert sum(int(objective.count(batch)) for batch in weighed) == 6
    gradient = gradient_of(model)
    assert float((gradient - expected_gradient).norm()) <= 1e-5 * float(expected_gradient.norm())
    assert loss_sums is not None and weighing.logged(loss_sums).mean_loss == pytest.approx(float(expected), rel=1e-6)


def test_a_model_that_is_its_reference_has_no_margin_to_the_last_bit(models: tuple[Any, Any]) -> None:
    model, _ = models
    objective, batches = objective_of(STAGE, NoiseConfig()), batches_of(STAGE)
    _, weighing = weigh_batches([model], batches, CPU, Groups.current(), objective, reference_of(build(1)))
    assert weighing is not None and weighing.largest_margin == 0.0
    assert float(weighing.loss / weighing.count) == pytest.approx(math.log(2.0), rel=1e-15)
    check_start_margin(objective, weighing)


def test_a_run_that_does_not_start_from_its_reference_is_refused(models: tuple[Any, Any]) -> None:
    model, frozen = models
    stage = replace(STAGE, preference=PreferenceConfig(beta=1.0))
    for share_noise in (True, False):
        views = replace(stage, num_views=4, view_relation="independent")
        views = replace(views, preference=PreferenceConfig(beta=1.0, share_noise=share_noise))
        objective = objective_of(views, NoiseConfig())
        _, weighing = weigh_batches(
            [model], batches_of(views), CPU, Groups.current(), objective, reference_of(frozen if share_noise else model)
        )
        assert weighing is not None and weighing.largest_margin > 0.1
        if share_noise:
            with pytest.raises(StartRefused, match=r"margins of the first pairs \(up to .* must be 0, within 0\.1,"):
                check_start_margin(objective, weighing)
        else:  # on other masks the same weights have other scores
            check_start_margin(objective, weighing)


def test_an_objective_that_compares_nothing_trains_the_rows_as_they_are(models: tuple[Any, Any]) -> None:
    objective: Objective = objective_of(replace(STAGE, preference=None), NoiseConfig())
    batches = batches_of(replace(STAGE, preference=None))
    assert weigh_batches([models[0]], batches, CPU, Groups.current(), objective, None) == (batches, None)


def test_views_that_share_a_clean_copy_score_as_each_does_alone_and_cost_one_copy(models: tuple[Any, Any]) -> None:
    stage = replace(STAGE, view_relation="independent")
    several = score_documents([models[0]], batches_of(stage), CPU, Groups.current(), 3)
    alone = score_documents([models[0]], batches_of(replace(stage, num_views=1)), CPU, Groups.current(), 1)
    torch.testing.assert_close(several.by_view[:, :1], alone.by_view, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(several.means, several.by_view.sum(1) / 3, rtol=1e-15, atol=0.0)

    lengths, spans = Pairs().document_lengths, Pairs().spans
    costs = {k: segment_costs(geometry_of(replace(stage, num_views=k)), lengths, spans) for k in (1, 2, 3, 8)}
    noisy = costs[2] - costs[1]
    clean = costs[1] - noisy
    assert (noisy > 0).all() and (clean >= 0).all()
    for k, cost in costs.items():
        assert cost.tolist() == (k * noisy + clean).tolist()
    assert [int(b.num_forward_tokens) for b in batches_of(stage)] == [
        sum(int(costs[3][d]) for row in batch for d in row) for batch in ROWS
    ]
