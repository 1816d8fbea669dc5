"""How prompts enter together: groups of passes, and what they take over from one another."""

from __future__ import annotations

from megatron_dllm.diffusion.prefill import Entrant, plan_prefill

HEAD = list(range(100, 112))


def test_prompts_without_anything_in_common_share_a_pass() -> None:
    prompts = [[1] * 8, [], [2] * 4]
    assert list(plan_prefill([], prompts, 4)) == [[Entrant(i, ids) for i, ids in enumerate(prompts)]]
    assert list(plan_prefill([], [], 4)) == []


def test_a_pass_is_bounded_with_its_padding() -> None:
    prompts = [[i] * (40 if i == 2 else 8) for i in range(5)]
    groups = list(plan_prefill([], prompts, 4, max_tokens=24))
    assert [[entrant.slot for entrant in group] for group in groups] == [[0, 1], [2], [3, 4]]


def test_what_is_shared_is_computed_once_and_before_it_is_taken_over() -> None:
    prompts = [[*HEAD, *[i] * 4] for i in range(3)]
    groups = list(plan_prefill([[7] * 4], prompts, 4))
    assert groups == [[Entrant(1, prompts[0])], [Entrant(2, prompts[1], 1, 12), Entrant(3, prompts[2], 1, 12)]]


def test_texts_that_are_there_are_sources_too_in_whole_blocks() -> None:
    present = [[7] * 8, [*HEAD[:11], 5, 5, 5, 5, 5]]
    (group,) = plan_prefill(present, [HEAD, [*HEAD[:4], *[3] * 16]], 4)
    assert group == [Entrant(2, HEAD, 1, 8), Entrant(3, [*HEAD[:4], *[3] * 16])], "a fifth is not worth it"
    (same,) = plan_prefill([HEAD], [HEAD], 4)
    assert same == [Entrant(1, HEAD, 0, 12)] and same[0].num_computed == 0
