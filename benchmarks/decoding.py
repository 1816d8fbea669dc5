"""Decoding many prompts at a time: tokens per second against one at a time, and against an exported folder's own code.

    python -m benchmarks.decoding --checkpoint runs/demo/hf

The checkpoint is an exported folder of this project, loaded by this project and by transformers. All ways decode the
same random prompts by the same rule, and their tokens are compared. CPU times are CPU seconds of one thread, prompts
included and loading not, so that other programs on the machine change little.

    one at a time         generate with batch_size=1
    batch N               N prompts at a time
    transformers          the folder's own generate, which keeps keys and values, one prompt after the other
    without a cache       every pass computes prompt, finished blocks and the open block again, as public samplers do
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.config import DecodingConfig, GenerateConfig
from megatron_dllm.diffusion.decode import DecodingContract, decode_stream, requests_of
from megatron_dllm.diffusion.decoding_pass import DecodingPass, Forward

# Prompts differ in length by up to so many tokens.
SPREAD = 32
# No token ends a text: all ways write as many tokens.
NO_EOS = (-1,)
NOTE = (
    "tokens_per_s: generated tokens per CPU second of one thread. ratio: against one at a time at the same length. "
    "model: share of the time that is the forward pass, head included. same: share of the tokens that are those of one "
    "at a time."
)


class TimedForward:
    """A forward whose seconds are counted."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.seconds = 0.0

    def run(self, step: DecodingPass) -> Iterator[tuple[range, Tensor]]:
        """The pass, with all its logits."""
        begun = time.process_time()
        pieces = list(self._forward.run(step))
        self.seconds += time.process_time() - begun
        return iter(pieces)

    def copy(self, source: int, target: int, length: int) -> None:
        """Hand on."""
        self._forward.copy(source, target, length)


@dataclass(frozen=True)
class Way:
    """A way to decode.

    Attributes:
        num_prompts: that are decoded, the first ones.
        decode: prompts to generated tokens, and the share of the time that is the model; None: not known.
    """

    name: str
    num_prompts: int
    decode: Callable[[Sequence[list[int]]], tuple[list[list[int]], float | None]]


def ours(model: Any, config: DecodingConfig, contract: DecodingContract, batch_size: int) -> Any:
    """Decode as `generate` does."""
    from megatron_dllm.inference.cached_forward import CachedForward

    def decode(prompts: Sequence[list[int]]) -> tuple[list[list[int]], float | None]:
        forward, begun = TimedForward(CachedForward(model)), time.process_time()
        found = {
            done.index: done.generation.generated_ids
            for done in decode_stream(forward, requests_of(prompts, config), config, contract, batch_size)
        }
        share = forward.seconds / (time.process_time() - begun)
        return [found[index] for index in range(len(prompts))], share

    return decode


def exported(model: Any, config: DecodingConfig, contract: DecodingContract) -> Any:
    """The `generate` of the folder's modeling file."""
    arguments = dict(max_new_tokens=config.max_new_tokens, threshold=config.threshold, eos_token_id=list(NO_EOS))

    def decode(prompts: Sequence[list[int]]) -> tuple[list[list[int]], None]:
        texts = [model.generate(torch.tensor([ids]), block_size=contract.block_size, **arguments) for ids in prompts]
        return [text[0, len(ids) :].tolist() for text, ids in zip(texts, prompts, strict=True)], None

    return decode


def without_cache(model: Any, config: DecodingConfig, contract: DecodingContract) -> Any:
    """Every pass over the whole text, its logits too; the same rule and the same tokens."""

    def decode(prompts: Sequence[list[int]]) -> tuple[list[list[int]], None]:
        return [_recompute(model, ids, config, contract) for ids in prompts], None

    return decode


@torch.no_grad()
def _recompute(model: Any, prompt: list[int], config: DecodingConfig, contract: DecodingContract) -> list[int]:
    size, ids = contract.block_size, torch.tensor(prompt)
    while len(ids) < len(prompt) + config.max_new_tokens:
        start = len(ids) // size * size
        ids = torch.cat([ids, torch.full((start + size - len(ids),), contract.mask_token_id)])
        block = torch.arange(len(ids)) // size
        mask = (block.unsqueeze(0) <= block.unsqueeze(1))[None, None]
        while bool((is_masked := ids == contract.mask_token_id).any()):
            logits = model(ids.unsqueeze(0), attention_mask=mask).logits[0].float()
            confidence = torch.softmax(logits, dim=1)
            logits[:, contract.mask_token_id] = -torch.inf
            tokens = logits.argmax(dim=1)
            chance = confidence.gather(1, tokens.unsqueeze(1)).squeeze(1).masked_fill(~is_masked, -1.0)
            is_kept = chance > config.threshold
            is_kept[chance.argmax()] = True
            ids = torch.where(is_kept, tokens, ids)
    return ids[len(prompt) : len(prompt) + config.max_new_tokens].tolist()


def draw_prompts(length: int, number: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of about a length; tokens below 8, among which special ones are, do not occur."""
    generator = torch.Generator().manual_seed(length)
    lengths = torch.randint(length - SPREAD // 2, length + SPREAD // 2, (number,), generator=generator).tolist()
    return [torch.randint(8, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def measure(ways: Sequence[Way], length: int, vocab_size: int) -> list[dict[str, Any]]:
    """A row for each way, the base of the ratios first."""
    prompts = draw_prompts(length, max(way.num_prompts for way in ways), vocab_size)
    rows: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    for way in ways:
        way.decode(prompts[:1])  # whatever is made once
        begun = time.process_time()
        found, share = way.decode(prompts[: way.num_prompts])
        speed = sum(map(len, found)) / (time.process_time() - begun)
        expected = expected or found
        row = dict(prompt=length, way=way.name, prompts=way.num_prompts, tokens_per_s=speed)
        row |= dict(
            ratio=speed / (rows[0]["tokens_per_s"] if rows else speed), model=share, same=_same(found, expected)
        )
        rows.append(row)
        print(row, flush=True)
    return rows


def _same(found: Sequence[list[int]], expected: Sequence[list[int]]) -> float:
    """Share of equal tokens, of the prompts that both decoded."""
    pairs = [
        (mine, theirs)
        for ids, reference in zip(found, expected, strict=False)
        for mine, theirs in zip(ids, reference, strict=True)
    ]
    return sum(mine == theirs for mine, theirs in pairs) / len(pairs)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="exported folder of this project")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1024], help="tokens of the prompts, about")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="generated after each prompt")
    parser.add_argument("--threshold", type=float, default=0.5, help="of accepting a token")
    parser.add_argument("--num_alone", type=int, default=3, help="prompts of the ways that take them one at a time")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoding_cpu", help="without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from megatron_dllm.host import prepare_host

    prepare_host()
    from transformers import AutoModelForCausalLM

    from megatron_dllm.inference.load import load_model
    from megatron_dllm.inference.source import read_source
    from megatron_dllm.parallel.groups import single_rank

    source = read_source(GenerateConfig(checkpoint=str(args.checkpoint)))
    contract = replace(source.contract, eos_token_ids=NO_EOS)
    config = DecodingConfig(threshold=args.threshold, max_new_tokens=args.max_new_tokens)
    theirs = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
    with single_rank(0) as groups:
        model = load_model(source, groups, "fp32", "auto")
        alone = args.num_alone
        ways = [
            Way("one at a time", alone, ours(model, config, contract, 1)),
            Way("batch 8", max(8, alone), ours(model, config, contract, 8)),
            Way("batch 64", 64, ours(model, config, contract, 64)),
            Way("transformers", alone, exported(theirs, config, contract)),
            Way("without a cache", alone, without_cache(theirs, config, contract)),
        ]
        rows = [row for length in args.lengths for row in measure(ways, length, source.model.vocab_size)]
    facts = machine() | dict(block_size=contract.block_size, max_new_tokens=args.max_new_tokens)
    write_results(args.output, "Decoding", facts, {"ways": rows}, NOTE)


if __name__ == "__main__":
    main()
