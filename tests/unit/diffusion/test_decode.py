"""Decoding against a slow reference without cache, and what each of its rules promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.config.generate import RULES
from megatron_dllm.diffusion.decode import decode, decode_all, decode_stream, requests_of
from megatron_dllm.diffusion.decoding_pass import DecodingPass
from megatron_dllm.diffusion.generation import Generation, Request
from tests.unit.diffusion.toy_decoder import (
    CONTRACT,
    EOS,
    MASK,
    MAX_LENGTH,
    OTHER_EOS,
    PROMPT,
    VOCAB,
    CachedForward,
    ScriptedForward,
    ToyModel,
)


def expected_decode(
    model: ToyModel, prompt: list[int], block_size: int, num_tokens: int, threshold: float, clean: int | None = None
) -> tuple[list[int], list[int]]:
    """Greedy decoding written from its description: the whole dense model over [clean blocks ; block], every step."""
    text, steps = list(prompt), []
    while len(text) < len(prompt) + num_tokens:
        begin = len(text) - len(text) % block_size
        block: list[int | None] = [text[i] if i < len(text) else None for i in range(begin, begin + block_size)]
        steps.append(0)
        while None in block:
            ids = text[:begin] + [MASK if token is None else token for token in block]
            size = clean or block_size
            roles = [(0, (i if i < begin else begin) // size, 0 if i < begin else 1) for i in range(len(ids))]
            logits = model.logits(torch.tensor(ids), torch.arange(len(ids)), torch.tensor(roles))
            proposals = {}
            for i, token in enumerate(block):
                if token is None:
                    distribution = logits[begin + i].softmax(0).tolist()
                    best = max((p, -v) for v, p in enumerate(distribution) if v != MASK)
                    proposals[i] = (best[0], -best[1])
            sure = [i for i, (p, _) in proposals.items() if p > threshold]
            for i in sure or [max(proposals, key=lambda i: (proposals[i][0], -i))]:
                block[i] = proposals[i][1]
            steps[-1] += 1
        text = text[:begin] + [token for token in block if token is not None]
    return text[len(prompt) : len(prompt) + num_tokens], steps


def run(
    block_size: int = 4, prompt: list[int] = PROMPT, model_seed: int = 0, sharpness: float = 6.0, **options: float
) -> tuple[Generation, CachedForward]:
    forward = CachedForward(ToyModel(model_seed, sharpness))
    config = replace(DecodingConfig(max_new_tokens=18, threshold=0.6), **options)
    return decode(forward, prompt, config, replace(CONTRACT, block_size=block_size)), forward


@pytest.mark.parametrize("block_size", [1, 2, 4, 5, 8, 32])
@pytest.mark.parametrize("prompt_length", [1, 4, 7, 8])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 1.0])
def test_equals_slow_reference(block_size: int, prompt_length: int, threshold: float) -> None:
    prompt = (PROMPT * 2)[:prompt_length]
    for seed in range(2):
        result, _ = run(block_size, prompt, model_seed=seed, threshold=threshold)
        expected_ids, expected_steps = expected_decode(ToyModel(seed), prompt, block_size, 18, threshold)
        assert result.generated_ids == expected_ids
        assert result.steps_per_block == expected_steps
        assert result.stop_reason == "max_new_tokens"


@pytest.mark.parametrize("clean", [1, 2, 4])
def test_finished_blocks_are_kept_in_blocks_of_their_own(clean: int) -> None:
    """As trained: a clean token sees those of its small block and before, a noisy one its whole block."""
    contract, texts = replace(CONTRACT, clean_block_size=clean), set()
    for seed in range(3):
        config = DecodingConfig(max_new_tokens=18, threshold=0.6)
        result = decode(CachedForward(ToyModel(seed)), PROMPT, config, contract)
        assert (result.generated_ids, result.steps_per_block) == expected_decode(
            ToyModel(seed), PROMPT, 4, 18, 0.6, clean
        )
        texts.add(tuple(result.generated_ids) != tuple(run(4, model_seed=seed)[0].generated_ids))
    assert (True in texts) == (clean < 4), "the comparison would be empty if the clean blocks made no difference"


def test_a_block_that_clean_blocks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block_size \(4\) must be a multiple of 3, the clean_block_size"):
        replace(CONTRACT, clean_block_size=3).validate()


def expected_shifted_decode(
    model: ToyModel, prompt: list[int], block_size: int, num_tokens: int, threshold: float
) -> tuple[list[int], list[int]]:
    """`expected_decode` where the slot before a token predicts it."""

    def guess(ids: list[int], num_clean: int, slot: int) -> tuple[float, int]:
        roles = [(0, i // block_size, 0 if i < num_clean else 1) for i in range(len(ids))]
        logits = model.logits(torch.tensor(ids), torch.arange(len(ids)), torch.tensor(roles))
        best = max((p, -v) for v, p in enumerate(logits[slot].softmax(0).tolist()) if v != MASK)
        return best[0], -best[1]

    text, steps = list(prompt), []
    while len(text) < len(prompt) + num_tokens:
        begin = len(text) - len(text) % block_size
        block: list[int | None] = [text[i] if i < len(text) else None for i in range(begin, begin + block_size)]
        steps.append(0)
        if block[0] is None:
            block[0] = guess(text, begin, begin - 1)[1]
            steps[-1] += 1
        while None in block:
            ids = text[:begin] + [MASK if token is None else token for token in block]
            found = {i: guess(ids, begin, begin + i - 1) for i, token in enumerate(block) if token is None}
            sure = [i for i, (p, _) in found.items() if p > threshold]
            for i in sure or [max(found, key=lambda i: (found[i][0], -i))]:
                block[i] = found[i][1]
            steps[-1] += 1
        text = text[:begin] + [token for token in block if token is not None]
    return text[len(prompt) : len(prompt) + num_tokens], steps


@pytest.mark.parametrize("block_size", [1, 2, 4, 5, 32])
@pytest.mark.parametrize("prompt_length", [1, 4, 7, 8])
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_a_shifted_model_equals_slow_reference(block_size: int, prompt_length: int, threshold: float) -> None:
    prompt, contract = (PROMPT * 2)[:prompt_length], replace(CONTRACT, block_size=block_size, shift=True)
    config = DecodingConfig(max_new_tokens=18, threshold=threshold)
    forward = CachedForward(ToyModel(1))
    result = decode(forward, prompt, config, contract)
    expected_ids, expected_steps = expected_shifted_decode(ToyModel(1), prompt, block_size, 18, threshold)
    assert (result.generated_ids, result.steps_per_block) == (expected_ids, expected_steps)
    assert forward.num_passes == sum(expected_steps) + result.num_commit_forwards
    assert result.num_commit_forwards == int((prompt_length - 1) // block_size > 0)


def test_a_shifted_model_writes_the_same_among_others() -> None:
    contract, config = replace(CONTRACT, shift=True), DecodingConfig(max_new_tokens=14, threshold=0.6)
    prompts = [(PROMPT * 2)[:length] for length in (8, 1, 4, 7, 8, 5)]
    alone = [decode(CachedForward(ToyModel()), prompt, config, contract) for prompt in prompts]
    together = decode_all(CachedForward(ToyModel()), requests_of(prompts, config), config, contract, batch_size=3)
    assert [text.generated_ids for text in together] == [text.generated_ids for text in alone]
    assert [text.accepted_in_pass for text in together] == [text.accepted_in_pass for text in alone]


def test_blocks_of_one_token_with_a_shift_decode_as_an_autoregressive_model() -> None:
    model = ToyModel()
    contract = replace(CONTRACT, block_size=1, shift=True)
    result = decode(CachedForward(model), PROMPT, DecodingConfig(max_new_tokens=18), contract)
    text = list(PROMPT)
    for _ in range(18):
        roles = torch.tensor([(0, i, 0) for i in range(len(text))])
        logits = model.logits(torch.tensor(text), torch.arange(len(text)), roles)[-1]
        logits[MASK] = -math.inf
        text.append(int(logits.argmax()))
    assert result.generated_ids == text[len(PROMPT) :]
    assert (result.steps_per_block, result.tokens_per_forward) == ([1] * 18, 1.0)


def test_toy_model_is_worth_decoding() -> None:
    """The comparison above would be empty if thresholds, blocks or committed keys made no difference."""
    texts = {tuple(run(b, threshold=t)[0].generated_ids) for b in (1, 4, 8) for t in (0.6, 1.0)}
    assert len(texts) == 5  # at block size 1 the threshold decides nothing
    steps = run(4)[0].steps_per_block
    assert any(1 < n < 4 for n in steps), steps


def test_block_size_one_is_greedy_left_to_right() -> None:
    model = ToyModel()
    result, _ = run(block_size=1, threshold=0.01)
    text = list(PROMPT)
    for _ in range(18):
        roles = torch.tensor([(0, i, int(i == len(text))) for i in range(len(text) + 1)])
        logits = model.logits(torch.tensor([*text, MASK]), torch.arange(len(text) + 1), roles)[-1]
        logits[MASK] = -math.inf
        text.append(int(logits.argmax()))
    assert result.generated_ids == text[len(PROMPT) :]
    assert result.steps_per_block == [1] * 18
    assert result.tokens_per_forward == 1.0


def test_block_as_long_as_the_context_commits_nothing() -> None:
    result, forward = run(block_size=MAX_LENGTH)
    assert result.num_commit_forwards == 0
    assert all(not commit and len(ids) == MAX_LENGTH for commit, ids, _, _ in forward.calls)
    assert len(result.generated_ids) == 18


def test_prompt_tail_shares_the_first_block_and_stays() -> None:
    result, forward = run()
    commit, ids, positions, roles = forward.calls[0]
    assert (commit, ids, positions) == (True, PROMPT[:4], [0, 1, 2, 3])
    assert roles == [[0, 0, 0]] * 4
    commit, ids, positions, roles = forward.calls[1]
    assert (commit, ids, positions) == (False, [*PROMPT[4:], MASK], [4, 5, 6, 7])
    assert roles == [[0, 1, 1]] * 4
    commit, ids, positions, roles = forward.calls[1 + result.steps_per_block[0]]
    assert (commit, ids, positions) == (True, PROMPT[4:] + result.generated_ids[:1], [4, 5, 6, 7])
    assert roles == [[0, 1, 0]] * 4


def test_prompt_of_whole_blocks_is_committed_in_one_pass_with_its_block_ids() -> None:
    _, forward = run(prompt=[*PROMPT, 6])
    assert forward.calls[0][0] and forward.calls[0][1] == [*PROMPT, 6]
    assert [role[1] for role in forward.calls[0][3]] == [0] * 4 + [1] * 4
    assert forward.calls[1][1] == [MASK] * 4 and forward.calls[1][2] == [8, 9, 10, 11]


def test_counts_of_passes() -> None:
    # 7 prompt tokens: positions 7 | 8..11 | 12..15 | 16..19 | 20..23 are 17 tokens in 5 blocks.
    result, forward = run(max_new_tokens=17)
    commits = sum(commit for commit, *_ in forward.calls)
    assert len(result.steps_per_block) == 5
    assert result.num_commit_forwards == commits == 1 + 4  # prompt, and every block but the last
    assert result.num_denoising_forwards == len(forward.calls) - commits == sum(result.steps_per_block)
    assert result.tokens_per_forward == 17 / sum(result.steps_per_block)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"rule": "factor"}, {"rule": "hierarchy"}, {"rule": "credit"}]
)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_texts_decoded_together_are_those_of_their_prompts_alone(options: dict[str, Any], batch_size: int) -> None:
    prompts = [[*PROMPT, 6], [1, *PROMPT, 6, 3, 3], [8] * 11, [EOS] * 10, [5], [*PROMPT, 6, 2], [8] * 12]
    config = replace(DecodingConfig(max_new_tokens=26, threshold=0.6), **options)
    contract = replace(CONTRACT, eos_token_ids=(EOS, 12), context_length=30)
    model = ToyModel(1, sharpness=4.0)
    expected = [
        decode(CachedForward(model), prompt, replace(config, seed=config.seed + index), contract)
        for index, prompt in enumerate(prompts)
    ]
    forward = CachedForward(model)
    assert decode_all(forward, requests_of(prompts, config), config, contract, batch_size) == expected
    assert len({len(generation.steps_per_block) for generation in expected}) > 1, "all texts end at once"
    num_passes = sum(text.num_denoising_forwards + text.num_commit_forwards for text in expected)
    assert forward.num_passes <= num_passes / (1 if batch_size == 1 else 1.5)


def test_a_hundred_random_cases_decode_as_they_do_alone() -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for case in range(100):
        model, block_size = ToyModel(case, sharpness=4.0), draw(1, 9)
        contract = replace(CONTRACT, block_size=block_size, eos_token_ids=(EOS,), context_length=draw(30, 50))
        rule = RULES[case % len(RULES)]
        config = DecodingConfig(rule=rule, threshold=0.7, entropy_bound=0.5, temperature=float(case % 3 == 0))
        shared = [draw(0, 20) for _ in range(draw(0, 20))]
        prompts = [shared + [draw(0, 20) for _ in range(draw(1, 9))] for _ in range(draw(2, 4))]
        requests = [Request(ids, draw(1, 14), seed) for seed, ids in enumerate(prompts)]
        expected = [
            decode(
                CachedForward(model),
                request.ids,
                replace(config, seed=request.seed, max_new_tokens=request.max_new_tokens),
                contract,
            )
            for request in requests
        ]
        assert decode_all(CachedForward(model), requests, config, contract, draw(1, 6)) == expected


def test_a_text_that_ends_makes_room_at_once() -> None:
    prompts = [[9] * 4, [1] * 4, [2] * 4, [3] * 4]
    config, contract = DecodingConfig(), replace(CONTRACT, eos_token_ids=(EOS,))
    requests = [Request(ids, length, 0) for ids, length in zip(prompts, (24, 4, 4, 4), strict=True)]
    done = list(decode_stream(ScriptedForward({}), requests, config, contract, batch_size=2))
    assert [text.index for text in done] == [1, 2, 3, 0], "the short ones share the second place, one after the other"
    assert all(text.seconds > 0 for text in done)


def test_prompts_that_begin_alike_compute_the_beginning_once() -> None:
    prompts = [[*PROMPT, 6, *PROMPT, token] for token in (1, 2, 3)]  # 16 tokens, the first 12 in common
    config = DecodingConfig(max_new_tokens=4)
    forward = CachedForward(ToyModel())
    found = decode_all(forward, requests_of(prompts, config), config, CONTRACT)
    assert found == [decode(CachedForward(ToyModel()), prompt, config, CONTRACT) for prompt in prompts]
    assert [len(ids) for commit, ids, *_ in forward.calls if commit] == [16, 4, 4]


def test_a_stop_ends_a_text_behind_its_block_and_cuts_it() -> None:
    asked = []

    def stop(generated: Sequence[int]) -> int | None:
        asked.append(list(generated))
        return 3 if len(generated) > 4 else None

    contract = replace(CONTRACT, eos_token_ids=(EOS,))
    requests = [Request([9] * 4, 20, 0, stop), Request([9] * 4, 8, 0)]
    stopped, free = decode_all(ScriptedForward({}), requests, DecodingConfig(), contract)
    assert (stopped.generated_ids, stopped.stop_reason, stopped.steps_per_block) == ([7] * 3, "stop", [1, 1])
    assert (free.generated_ids, free.stop_reason) == ([7] * 8, "max_new_tokens")
    assert asked == [[7] * 4, [7] * 8]
    asked.clear()
    (ended,) = decode_all(ScriptedForward({6: (EOS, 0.99)}), requests[:1], DecodingConfig(), contract)
    assert (ended.generated_ids, ended.stop_reason, asked) == ([7, 7, EOS], "eos", [[7, 7]])
    (late,) = decode_all(ScriptedForward({10: (EOS, 0.99)}), requests[:1], DecodingConfig(), contract)
    assert (late.generated_ids, late.stop_reason) == ([7] * 3, "stop"), "the stop comes before the eos"


def test_every_token_knows_the_pass_that_accepted_it() -> None:
    result, _ = run(max_new_tokens=17)
    firsts = [0, *itertools.accumulate(result.steps_per_block)]
    for position, accepted in enumerate(result.accepted_in_pass, start=len(PROMPT)):
        block = position // 4 - len(PROMPT) // 4
        assert firsts[block] < accepted <= firsts[block + 1]
    assert set(result.accepted_in_pass) == set(range(1, result.num_denoising_forwards + 1))
    assert result.accepted_in_pass != sorted(result.accepted_in_pass), "the model is sure from left to right"


def test_tokens_per_forward_counts_what_is_kept() -> None:
    forward = ScriptedForward({8: (EOS, 0.99)})
    result = decode(forward, [1] * 4, DecodingConfig(max_new_tokens=16), replace(CONTRACT, eos_token_ids=(EOS,)))
    # Two blocks, one pass each; 5 of the 8 tokens survive the eos.
    assert result == Generation([7, 7, 7, 7, EOS], "eos", [1, 1], 2, [1, 1, 1, 1, 2])
    assert result.tokens_per_forward == 5 / 2


def test_threshold_accepts_above_and_falls_back_to_the_most_probable() -> None:
    script = {4: (1, 0.5), 5: (2, 0.96), 6: (3, 0.6), 7: (4, 0.97)}

    forward = ScriptedForward(script)
    result = decode(forward, [9] * 4, DecodingConfig(max_new_tokens=4), CONTRACT)
    assert forward.seen[1:] == [[MASK] * 4, [MASK, 2, MASK, 4], [MASK, 2, 3, 4]]
    assert result.steps_per_block == [3]


def test_min_tokens_per_step_bounds_the_number_of_steps() -> None:
    result, _ = run(block_size=8, prompt=[1] * 8, threshold=1.0, min_tokens_per_step=3, max_new_tokens=16)
    assert result.steps_per_block == [3, 3]


@pytest.mark.parametrize("eos", [EOS, OTHER_EOS])
def test_eos_ends_the_text_at_its_first_place_once_the_block_is_finished(eos: int) -> None:
    forward = ScriptedForward({6: (eos, 0.99), 5: (3, 0.4), 7: (EOS, 0.99)})
    result = decode(forward, [9] * 5, DecodingConfig(), replace(CONTRACT, eos_token_ids=(EOS, OTHER_EOS)))
    assert result == Generation([3, eos], "eos", [2], 1, [2, 1])
    assert forward.num_commits == 1  # the prompt; nothing reads the last block


def test_eos_of_the_prompt_does_not_stop() -> None:
    result = decode(
        ScriptedForward({}), [EOS] * 6, DecodingConfig(max_new_tokens=5), replace(CONTRACT, eos_token_ids=(EOS,))
    )
    assert result.generated_ids == [7] * 5 and result.stop_reason == "max_new_tokens"


def test_eos_past_max_new_tokens_does_not_count() -> None:
    result = decode(
        ScriptedForward({6: (EOS, 0.99)}),
        [9] * 4,
        DecodingConfig(max_new_tokens=2),
        replace(CONTRACT, eos_token_ids=(EOS,)),
    )
    assert result.generated_ids == [7, 7] and result.stop_reason == "max_new_tokens"


@pytest.mark.parametrize("context_length", [12, 10, 8])
def test_context_ends_the_text_with_a_shorter_block_if_need_be(context_length: int) -> None:
    forward = CachedForward(ToyModel())
    result = decode(forward, PROMPT, DecodingConfig(), replace(CONTRACT, context_length=context_length))
    assert len(result.generated_ids) == context_length - len(PROMPT)
    assert result.stop_reason == "context_length"
    assert forward.calls[-1][2][-1] == context_length - 1


def test_sampling_is_reproducible_by_seed() -> None:
    first, again, other = (run(sharpness=2.0, temperature=1.0, seed=seed)[0] for seed in (0, 0, 7))
    assert first == again
    assert other.generated_ids != first.generated_ids


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrow_sampling_is_greedy(options: dict[str, float]) -> None:
    sampled, _ = run(**{"temperature": 1.0, **options})
    assert sampled == run()[0]


@pytest.mark.parametrize(
    ("prompt", "contract", "message"),
    [
        ([], {}, r"prompt \(\[\]\) is empty"),
        ([1] * 64, {}, r"prompt \(64 tokens\) must be shorter than context_length \(64\)"),
        ([1, 2, MASK], {}, r"mask token \(22\) at position 2"),
        ([1], {"block_size": 0}, r"block_size \(0\) must be positive"),
        ([1], {"context_length": -1}, r"context_length \(-1\) must be positive"),
        ([1], {"eos_token_ids": (MASK,)}, r"mask_token_id \(22\) must not be among eos_token_ids"),
    ],
)
def test_impossible_prompt_or_contract_is_refused(prompt: list[int], contract: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(ScriptedForward({}), prompt, DecodingConfig(), replace(CONTRACT, **contract))


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0},
        {"threshold": 1.01},
        {"threshold": math.nan},
        {"rule": "best"},
        {"factor": -1.0},
        {"low_threshold": 1.5},
        {"entropy_bound": math.inf},
        {"credit_weight": -0.1},
        {"credit_decay": 1.0},
        {"credit_exponent": math.nan},
        {"min_tokens_per_step": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
    ],
)
def test_impossible_option_is_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(options))} \("):
        run(**options)


def test_broken_logits_are_refused() -> None:
    class Broken(ScriptedForward):
        def run(self, step: DecodingPass) -> Iterator[tuple[range, Tensor]]:
            yield range(1), torch.full((len(step.wanted), VOCAB), math.nan)

    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"logits .* must be finite"):
            decode(Broken({}), [1], DecodingConfig(temperature=temperature), CONTRACT)


def expected_of_sglang(model: ToyModel, request: Request, block_size: int, threshold: float) -> tuple[list[int], int]:
    """SGLang's LowConfidence: tokens, and forward passes behind the prompt's; tokens hold MASK where it wins.

    All tokens above the threshold are kept, else the leftmost of the most probable; the mask token may win. A block is
    done when it enters a pass without masks, which keeps its keys and values.
    """
    ids, num_passes = list(request.ids), 0
    while len(ids) < len(request.ids) + request.max_new_tokens:
        start = len(ids) // block_size * block_size
        ids += [MASK] * (start + block_size - len(ids))
        places = torch.arange(len(ids))
        roles = torch.stack([torch.zeros_like(places), places // block_size, (places >= start).long()], 1)
        is_open = torch.tensor(ids) == MASK
        while bool(is_open.any()):
            probability, best = model.logits(torch.tensor(ids), places, roles).softmax(1).max(dim=1)
            probability = probability.masked_fill(~is_open, -1.0)
            is_kept = probability > threshold
            is_kept[probability.argmax()] |= not bool(is_kept.any())
            ids = torch.where(is_kept, best, torch.tensor(ids)).tolist()
            is_open &= ~is_kept
            num_passes += 1
            if MASK in torch.tensor(ids)[is_kept]:
                return ids, num_passes
        num_passes += 1
    return ids[len(request.ids) : len(request.ids) + request.max_new_tokens], num_passes


def test_tokens_and_passes_are_those_of_sglang_in_a_hundred_random_cases() -> None:
    generator = torch.Generator().manual_seed(9)
    num_compared = 0
    for case in range(120):
        low, high, block, length = (
            int(torch.randint(*bounds, (), generator=generator)) for bounds in ((1, 9), (9, 16), (1, 9), (1, 24))
        )
        requests = [Request(list(range(count)), length, 0) for count in (low, high)]
        model, config = ToyModel(case, sharpness=4.0), DecodingConfig(threshold=0.7)
        found = decode_all(CachedForward(model), requests, config, replace(CONTRACT, block_size=block), batch_size=2)
        for request, text in zip(requests, found, strict=True):
            expected, num_passes = expected_of_sglang(model, request, block, config.threshold)
            if MASK in expected:
                continue  # ours never writes the mask token
            assert text.generated_ids == expected
            # SGLang also keeps the last block, which nothing reads.
            num_commits = text.num_commit_forwards + 1 - (len(request.ids) >= block)
            assert text.num_denoising_forwards + num_commits == num_passes
            num_compared += 1
    assert num_compared >= 100
