"""How much the preference loss and its gradient vary with the noise: by number of views, and by what shares masks.

    python -m benchmarks.preference_variance --policy runs/demo/dpo --reference runs/demo/sft --pairs runs/demo/pairs

The first pairs of a corpus are scored and differentiated again and again, with other masks each time, by a model and
its reference (runs or torch_dist checkpoints), through the program's own rows, scorer and objective. Views that both
share are compared with views of their own for each, at the same number of views of the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.config import ModelConfig, NoiseConfig, ParallelConfig, PreferenceConfig, SftConfig, StageConfig
from megatron_dllm.data.batch import Batch, collate
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import RowPlan
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.model.objective import objective_of
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.training.frozen import FrozenModel
from megatron_dllm.training.weighing import FrozenReference, weigh_batches

NOTE = (
    "views: of the model. noise: whether model and reference are scored on the same masks. gradient_deviation: root "
    "mean square length of the gradient's deviation from its mean over draws. Its tails are heavy, as a mask of few "
    "tokens weighs each of them up to block_size times: compare numbers of views only where largest_share, the largest "
    "draw's share of the squares, is small, or else by median_deviation, the median of the lengths. gradient_length: "
    "of the mean gradient, corrected for the number of draws. margin_deviation: standard deviation of a pair's margin, "
    "nats (root mean square over pairs). loss: mean over draws; Jensen's inequality puts it above the loss of the "
    "exact scores. model_tokens: that model and reference see in all passes of a step, for each pair."
)
PASSES = 3  # scores, reference, training


@dataclass(frozen=True)
class Case:
    """A number of views of the model, and whether its reference shares them."""

    views: int
    shares: bool

    @property
    def stage(self) -> StageConfig:
        """The stage that has these views."""
        return StageConfig(
            block_size=32,
            num_tokens=1,
            global_batch_size=2,
            learning_rate=1.0,
            num_views=self.views if self.shares else 2 * self.views,
            view_relation="stratified" if self.shares else "independent",
            sft=SftConfig(),
            preference=PreferenceConfig(share_noise=self.shares),
        )


@dataclass(frozen=True)
class Draw:
    """What one set of masks came to: [n] fp32 gradient, [p] fp64 margins, and the loss."""

    gradient: Tensor
    margins: Tensor
    loss: float


def batches_of(corpus: Corpus, model: ModelConfig, case: Case, num_pairs: int, seed: int) -> list[Batch]:
    """A micro-batch for each of the first pairs: both sides in one row."""
    lengths = np.asarray(corpus.document_lengths[: 2 * num_pairs], dtype=np.int64)
    stage, longest = case.stage, int(lengths.max())
    size = -(-longest // stage.block_size) * stage.block_size
    geometry = RowGeometry(
        "block_diffusion", stage.block_size, size, 2 * (stage.num_views + 1) * size, stage.num_views, fill="eos"
    )
    dataset = RowDataset(
        corpus,
        geometry,
        NoiseSpec.for_stage(NoiseConfig(), stage),
        seed,
        model.mask_token_id,
        model.pad_token_id,
        model.eos_token_id,
    )
    segments = np.stack([np.arange(2 * num_pairs), np.zeros_like(lengths), lengths, np.arange(2 * num_pairs)], axis=1)
    return [collate([dataset[RowPlan(segments[first : first + 2], 0)]]) for first in range(0, 2 * num_pairs, 2)]


def draw(policy: Any, reference: FrozenReference, batches: Sequence[Batch], case: Case) -> Draw:
    """Loss, margins and gradient under the masks of some batches."""
    objective, groups = objective_of(case.stage, NoiseConfig()), Groups.current()
    weighed, weighing = weigh_batches([policy], batches, torch.device("cpu"), groups, objective, reference)
    assert weighing is not None, "the objective compares documents"
    policy.zero_grad(set_to_none=True)
    for batch in weighed:
        (objective.loss(batch, policy(batch)).total / (2 * len(batches))).backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return Draw(gradient, weighing.margins, float(weighing.loss / weighing.count))


def spread(draws: Sequence[Draw]) -> dict[str, float]:
    """Deviations of gradient and margins, the length of the mean gradient, and the mean loss."""
    gradients = torch.stack([found.gradient for found in draws]).double()
    squares = (gradients - gradients.mean(0)).square().sum(1)
    variance = float(squares.sum()) / (len(draws) - 1)
    # The squared length of a mean of n draws exceeds that of the true mean by the n-th part of the variance.
    square = float(gradients.mean(0).square().sum()) - variance / len(draws)
    margins = torch.stack([found.margins for found in draws])
    return {
        "gradient_deviation": variance**0.5,
        "median_deviation": float(squares.sqrt().quantile(0.5)),
        "largest_share": float(squares.max() / squares.sum()),
        "gradient_length": max(square, 0.0) ** 0.5,
        "margin_deviation": float(margins.var(0).mean()) ** 0.5,
        "loss": sum(found.loss for found in draws) / len(draws),
    }


def load(run: Path, groups: Groups) -> tuple[Any, ModelConfig]:
    """The model of a run or checkpoint, whole, on this process."""
    from megatron_dllm.checkpoint.folder import resolve_checkpoint
    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.checkpoint.stored_model import read_stored_model
    from megatron_dllm.model.gpt import build_model

    folder = resolve_checkpoint(run)
    model = read_stored_model(folder).model
    built = build_model(model, ParallelConfig(), groups)
    load_weights(folder, [built])
    return built, model


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each number of views, shared and not."""
    from megatron_dllm.parallel.groups import single_rank

    lines = []
    with single_rank(0) as groups:
        (policy, model), (frozen, _) = load(options.policy, groups), load(options.reference, groups)
        corpus = Corpus(str(options.pairs), model)
        num_pairs = min(options.num_pairs, len(corpus.document_lengths) // 2)
        reference = FrozenReference(FrozenModel([frozen], torch.device("cpu"), groups))
        for views in options.views:
            for shares in (True, False):
                case = Case(views, shares)
                made = [batches_of(corpus, model, case, num_pairs, seed) for seed in range(options.draws)]
                found = spread([draw(policy, reference, batches, case) for batches in made])
                tokens = sum(int(batch.num_forward_tokens) for batch in made[0])
                lines.append(
                    {"views": views, "noise": "shared" if shares else "apart", **found}
                    | {"model_tokens": PASSES * tokens / num_pairs}
                )
                print(lines[-1], flush=True)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="run or checkpoint")
    parser.add_argument("--reference", type=Path, required=True, help="run or checkpoint that it started from")
    parser.add_argument("--pairs", type=Path, required=True, help="corpus of pairs, without suffix")
    parser.add_argument("--num_pairs", type=int, default=12, help="pairs of a step")
    parser.add_argument("--draws", type=int, default=24, help="sets of masks")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--output", type=Path, default=RESULTS / "preference_variance", help="without suffix")
    options = parser.parse_args(arguments)
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    torch.set_num_threads(1)
    lines = measure(options)
    about = machine() | {name: getattr(options, name) for name in ("num_pairs", "draws")}
    write_results(options.output, "Variance of the preference loss", about, {"variance": lines}, NOTE)
    return 0


if __name__ == "__main__":
    main()
