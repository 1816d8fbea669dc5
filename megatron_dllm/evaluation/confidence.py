"""How sure a model is of right answers, without decoding any: what predicts the speed at a threshold in a few passes.

Blocks of right answers are masked in part and predicted once. For each number of masked tokens, that gives the share of
predictions above a threshold and how many of them are right; and from the shares, how many passes a block would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.decode import DecodingContract
from megatron_dllm.diffusion.decoding_pass import DecodingPass, Forward, Peers, clean_pass, places
from megatron_dllm.diffusion.prediction import Proposals, predict
from megatron_dllm.evaluation.study_results import Confidence

# Views of a block: their numbers of masked tokens are spread evenly over 1 .. all.
NUM_VIEWS = 4


@dataclass(frozen=True)
class Prediction:
    """One masked token of a right answer.

    Attributes:
        num_masked: tokens of its block that were masked with it.
        confidence: probability of the predicted token.
        is_right: whether that is the token of the answer.
    """

    num_masked: int
    confidence: float
    is_right: bool


@dataclass(frozen=True)
class _Block:
    """A block of an answer: tokens up to the answer's end in it, where it and the answer begin, and its length."""

    ids: list[int]
    start: int
    first: int
    length: int

    def masked(self, view: int, generator: torch.Generator) -> Tensor:
        """[n] bool, the tokens of the answer that a view masks, as many as its stratum says."""
        count = len(self.ids) - self.first
        level = (view + float(torch.rand((), generator=generator))) / NUM_VIEWS
        chosen = torch.randperm(count, generator=generator)[: 1 + int(level * count)]
        is_masked = torch.zeros(self.length, dtype=torch.bool)
        is_masked[chosen + self.first - self.start] = True
        return is_masked


def _blocks(prompt: Sequence[int], answer: Sequence[int], contract: DecodingContract) -> Iterator[_Block]:
    ids, size = [*prompt, *answer][: contract.context_length], contract.block_size
    for start in range(len(prompt) // size * size, len(ids), size):
        length = min(size, contract.context_length - start)
        yield _Block(ids[: start + length], start, max(start, len(prompt)), length)


def mean_block(answers: Sequence[tuple[Sequence[int], Sequence[int]]], contract: DecodingContract) -> float:
    """Tokens of an answer in a block, on average over the blocks of all answers, each with its prompt before it.

    As in `predict_answers`, an answer ends where the context does.
    """
    counts = [len(block.ids) - block.first for pair in answers for block in _blocks(*pair, contract)]
    return sum(counts) / len(counts)


def predict_answers(
    forward: Forward,
    peers: Peers,
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
    contract: DecodingContract,
    device: torch.device | str,
    seed: int = 0,
) -> list[Prediction]:
    """Predict masked tokens of right answers, each block given the clean ones before it (a collective).

    What lies behind the answer in its last block is masked, as when it is decoded, and does not count; nor does what
    lies behind the end of the context.

    Args:
        forward: the model; its slots are overwritten.
        peers: the other ranks.
        answers: tokens of each prompt and of its answer, the same on every rank.
        contract: block grid and mask token.
        device: where the logits are.
        seed: of the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    greedy, sampler = DecodingConfig(), torch.Generator(device=device)
    found: list[Prediction] = []
    for prompt, answer in answers:
        num_kept = 0
        for block in _blocks(prompt, answer, contract):
            masks = torch.stack([block.masked(view, generator) for view in range(NUM_VIEWS)])
            if block.start > num_kept:
                runs = [(num_kept, block.ids[num_kept : block.start])]
                _compute(forward, peers, clean_pass(0, runs, contract.grid))
                num_kept = block.start
                for view in range(1, NUM_VIEWS):
                    forward.copy(0, view, num_kept)
            step = _noisy_pass(block, masks, contract)
            counts = step.counts
            pieces = [
                predict(logits, contract.mask_token_id, greedy, [sampler] * len(rows), [counts[row] for row in rows])
                for rows, logits in _compute(forward, peers, step)
            ]
            packed = torch.cat([piece.packed().cpu() for piece in pieces]) if pieces else None
            found += _judge(block, masks, peers.share(packed, len(step.wanted)))
    return found


def _compute(forward: Forward, peers: Peers, step: DecodingPass) -> list[tuple[range, Tensor]]:
    return [piece for piece in forward.run(step.padded(*peers.agree(step.shape))) if len(piece[1])]


def _noisy_pass(block: _Block, masks: Tensor, contract: DecodingContract) -> DecodingPass:
    """The views of a block, [k, n] bool of the answer's masked tokens, one a row."""
    num_views, length = masks.shape
    starts, lengths = torch.full((num_views,), block.start), torch.full((num_views,), length)
    is_clean = torch.zeros(num_views, dtype=torch.bool)
    positions, roles = places(starts, lengths, length, contract.grid, is_clean)
    ids = torch.full((num_views, length), contract.mask_token_id)
    known = torch.tensor(block.ids[block.start :])
    ids[:, : len(known)] = known
    ids[masks] = contract.mask_token_id
    return DecodingPass(0, ids, positions, roles, masks.flatten().nonzero().squeeze(1), masks.sum(dim=1).tolist())


def _judge(block: _Block, masks: Tensor, packed: Tensor) -> Iterator[Prediction]:
    """The predictions [P, NUM_VALUES] of the masked tokens of [k, n] views, compared with the block."""
    found = Proposals.unpacked(packed, masks)
    target = torch.tensor(block.ids[block.start :])
    for view, places_of_view in enumerate(masks):
        for place in places_of_view.nonzero().squeeze(1).tolist():
            is_right = bool(found.token_ids[view, place] == target[place])
            yield Prediction(int(places_of_view.sum()), float(found.confidence[view, place]), is_right)


def table(predictions: Sequence[Prediction], block_size: int, threshold: float) -> list[Confidence]:
    """The counts of predictions, by how many tokens were masked: 1, 2 to 3, 4 to 7, ..."""
    rows: dict[int, Confidence] = {}
    for prediction in predictions:
        bucket = 1 << (prediction.num_masked.bit_length() - 1)
        row = rows.get(bucket, Confidence(block_size, threshold, bucket, 0, 0, 0, 0))
        is_sure = prediction.confidence > threshold
        rows[bucket] = replace(
            row,
            num_tokens=row.num_tokens + 1,
            num_right=row.num_right + prediction.is_right,
            num_sure=row.num_sure + is_sure,
            num_sure_and_right=row.num_sure_and_right + (is_sure and prediction.is_right),
        )
    return [rows[bucket] for bucket in sorted(rows)]


def expected_tokens_per_forward(rows: Sequence[Confidence], num_tokens: float) -> float:
    """Tokens per pass of a block of so many masks, if every pass keeps the share of its row, one token at least.

    Args:
        rows: of one threshold; a number of masks without a row takes the nearest row below, else the first.
        num_tokens: masked tokens at the beginning.
    """
    left, passes = num_tokens, 0.0
    while left > 1e-9:
        below = [row for row in rows if row.num_masked <= left]
        row = below[-1] if below else rows[0]
        # Less than one token is left to some blocks only, and only they take the pass.
        passes += min(left, 1.0)
        left -= max(1.0, left * row.num_sure / row.num_tokens)
    return num_tokens / passes
